"""Operators of one token: the same numbers as torch's, and torch's own wherever somebody keeps account."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.ops import one_token, one_token_kernels
from resnet_bk.ops.bk import bk_tunnel
from resnet_bk.ops.carry import bk_carry
from resnet_bk.ops.gap import gap_of_rate
from resnet_bk.ops.gated_norm import gated_norm
from resnet_bk.ops.local_attention import local_attention
from resnet_bk.ops.moe import chosen_expert
from resnet_bk.ops.one_token import choose_one_token_backend, is_alone, linear
from resnet_bk.ops.projections import queries_keys_values

KERNELS = [name for name in vars(one_token_kernels) if name.endswith("_kernel") and name != "product_kernel"]


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def kernel(monkeypatch):
    """Counts the calls of the compiled one."""
    calls, compiled = [], one_token_kernels.linear_kernel
    monkeypatch.setattr(one_token_kernels, "linear_kernel", lambda *args: (calls.append(args), compiled(*args)))
    return calls


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 300),
    hidden=st.integers(1, 300),
    leading=st.lists(st.just(1), max_size=3),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_it_is_the_product(width, hidden, leading, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, hidden, generator=generator)
    weight = torch.randn(width, hidden, generator=generator)
    found, exact = linear(x, weight), F.linear(x.double(), weight.double())
    assert found.shape == exact.shape and found.dtype == torch.float32
    size = x.double().abs() @ weight.double().abs().T
    assert ((found - exact).abs() <= 1e-6 * size + 1e-30).all()


@torch.no_grad()
def test_one_token_is_read_by_the_kernel(kernel):
    linear(torch.ones(1, 1, 8), torch.ones(4, 8))
    assert len(kernel) == 1
    assert choose_one_token_backend(torch.device("cpu")).name == "numba"


@torch.no_grad()
def test_a_token_that_lies_apart_in_memory(kernel):
    x = torch.randn(8, 3).t()[1:2]
    weight = torch.randn(4, 8)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    assert len(kernel) == 1


@torch.no_grad()
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_show(bad, kernel):
    weight = torch.ones(3, 40)
    weight[1, 5] = bad
    found = linear(torch.ones(1, 40), weight)
    torch.testing.assert_close(found, F.linear(torch.ones(1, 40), weight), equal_nan=True)
    assert len(kernel) == 1


def test_a_gradient_goes_through_torch(kernel):
    x, weight = torch.randn(1, 8, requires_grad=True), torch.randn(4, 8)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0, keepdim=True))
    assert not kernel


@torch.no_grad()
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.ones(1, 2, 8), torch.ones(4, 8)),
        (torch.ones(1, 8, dtype=torch.float64), torch.ones(4, 8, dtype=torch.float64)),
        (torch.ones(1, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16)),
        (torch.ones(1, 8), torch.ones(8, 4).t()),
    ],
    ids=["two tokens", "float64", "bfloat16", "a transposed matrix"],
)
def test_everything_else_is_torchs(x, weight, kernel):
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert not kernel


@torch.no_grad()
def test_autocast_and_modes_see_torchs_operator(kernel):
    x, weight = torch.ones(1, 8), torch.ones(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 4 * 8
    assert not kernel


@torch.no_grad()
def test_with_many_threads_it_is_torchs(kernel, monkeypatch):
    monkeypatch.setattr(one_token.torch, "get_num_threads", lambda: 3)
    linear(torch.ones(1, 8), torch.ones(4, 8))
    assert not kernel
    assert choose_one_token_backend(torch.device("cpu")).name == "torch"


@torch.no_grad()
def test_it_compiles_into_one_graph(kernel):
    x, weight = torch.randn(1, 8), torch.randn(4, 8)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))
    assert not kernel


@torch.no_grad()
def test_a_large_matrix_is_read_by_every_thread(kernel, monkeypatch):
    monkeypatch.setattr(one_token, "WORTH_TWO_THREADS", 21)
    x, weight = torch.randn(1, 3), torch.randn(7, 3)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    assert sorted(len(rows) for rows, _, _ in kernel) == ([3, 4] if torch.get_num_threads() == 2 else [7])
    linear(x, weight[:6])
    assert len(kernel[-1][0]) == 6


@pytest.fixture
def called(monkeypatch):
    """Which kernels were called."""
    names = set()

    def noted(name, compiled):
        return lambda *args: (names.add(name), compiled(*args))

    for name in KERNELS:
        monkeypatch.setattr(one_token_kernels, name, noted(name, getattr(one_token_kernels, name)))
    return names


def projection(seed, heads, key_size, value_size, taps, scale=1.0):
    """What ``queries_keys_values`` takes of one token."""
    generator = torch.Generator().manual_seed(seed)
    channels = heads * (2 * key_size + value_size)
    angle = 6 * torch.rand(1, 1, key_size // 2, generator=generator)
    return {
        "x": scale * torch.randn(1, 1, channels, generator=generator),
        "weight": torch.randn(taps, channels, generator=generator),
        "window": scale * torch.randn(1, taps - 1, channels, generator=generator),
        "rotary": (angle.cos(), angle.sin()),
    }


def doubled(arguments):
    return {
        name: tuple(x.double() for x in value) if isinstance(value, tuple) else value.double()
        for name, value in arguments.items()
    }


def assert_near(found, exact, tolerance=2e-6):
    for ours, wanted in zip(found, exact, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == wanted.shape and ours.is_contiguous()
        assert (ours - wanted).norm() <= tolerance * wanted.norm() + 1e-30


sizes = st.integers(1, 40)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 99),
    heads=st.integers(1, 5),
    half=sizes,
    value_size=sizes,
    taps=st.integers(1, 5),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
@torch.no_grad()
def test_queries_keys_and_values(seed, heads, half, value_size, taps, scale):
    arguments = projection(seed, heads, 2 * half, value_size, taps, scale)
    wanted = queries_keys_values(num_heads=heads, key_size=2 * half, **doubled(arguments))
    found = queries_keys_values(num_heads=heads, key_size=2 * half, **arguments)
    # A norm of numbers near 0 is what their rounding is: by as much as the convolution's terms cancel.
    assert_near(found, wanted, 1e-5)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 99), heads=st.integers(1, 20), rate=st.floats(-12, 4))
@torch.no_grad()
def test_the_chain(seed, heads, rate):
    generator = torch.Generator().manual_seed(seed)
    potential = 5 * torch.randn(1, 1, heads, generator=generator)
    log_rate, state = torch.full((heads,), rate), torch.rand(1, heads, generator=generator)
    gap = gap_of_rate(F.softplus(potential.double()) * log_rate.double().exp())
    wanted = bk_tunnel(gap, initial_state=state.double())
    assert_near(one_token.tunnel(potential, log_rate, state), (wanted, -torch.expm1(wanted[:, -1])), 5e-7)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 99), heads=st.integers(1, 5), key_size=sizes, value_size=sizes, decay=st.floats(-80, 0))
@torch.no_grad()
def test_the_carry(seed, heads, key_size, value_size, decay):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, heads, key_size, generator=generator)
    v = torch.randn(1, 1, heads, value_size, generator=generator)
    state = torch.randn(1, heads, key_size, value_size, generator=generator)
    log_l, skip = torch.full((1, 1, heads), decay), torch.randn(heads, generator=generator)
    before = state.clone()
    single, double = (
        bk_carry(
            *(x.to(dtype) for x in (q, k, v, log_l)),
            initial_state=state.to(dtype),
            skip=skip.to(dtype),
            output_final_state=True,
            form="recurrent",
        )
        for dtype in (torch.float32, torch.float64)
    )
    terms = (q.norm() * k.norm() + skip.norm()) * v.norm() + q.norm() * state.norm()
    assert (single[0] - double[0]).norm() <= 1e-6 * terms
    assert (single[1] - double[1]).norm() <= 1e-6 * (k.norm() * v.norm() + state.norm())
    assert torch.equal(state, before), "the old state is somebody else's"


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 99),
    heads=st.integers(1, 5),
    size=sizes,
    past=st.integers(1, 90),
    log_rate=st.floats(-9, 2),
    scale=st.sampled_from([1.0, 30.0]),
)
@torch.no_grad()
def test_local_attention(seed, heads, size, past, log_rate, scale):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 1, heads, size, generator=generator)
    keys, values = torch.randn(2, 1, past, heads, size, generator=generator)
    before = keys.clone(), values.clone()
    rates = torch.full((heads,), log_rate).exp()
    found, *remembered = one_token.attend(scale * q, k, v, keys, values, rates)
    wanted = [torch.cat(pair, dim=1) for pair in ((keys, k), (values, v))]
    assert all(torch.equal(*pair) for pair in zip(remembered, wanted, strict=True))
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1]), "the old ones are somebody else's"
    doubles = [x.double() for x in (scale * q, *wanted)]
    exact = local_attention(*doubles, window=past + 1, rates=rates.double())
    # Logits are rounded relative to their size, and so are weights.
    assert_near([found], [exact], 1e-6 * (4 + scale * q.norm() * k.norm()))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 99), heads=st.integers(1, 5), size=sizes, scale=st.sampled_from([1e-8, 1.0, 1e8]))
@torch.no_grad()
def test_the_gated_norm(seed, heads, size, scale):
    generator = torch.Generator().manual_seed(seed)
    o = scale * torch.randn(1, 1, heads, size, generator=generator)
    weight, gate = torch.randn(size, generator=generator), 5 * torch.randn(1, 1, heads * size, generator=generator)
    wanted = gated_norm(o.double(), weight.double(), gate.double(), 1e-5)
    assert_near([gated_norm(o, weight, gate, 1e-5)], [wanted])


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 99), hidden=st.integers(1, 70), inner=st.integers(1, 70))
@torch.no_grad()
def test_the_chosen_expert(seed, hidden, inner):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, hidden, generator=generator)
    up, down = (torch.randn(3, *shape, generator=generator) for shape in ((hidden, inner), (inner, hidden)))
    for expert in range(3):
        wanted = F.gelu(x.double() @ up[expert].double()) @ down[expert].double()
        size = F.gelu(x.double() @ up[expert].double()).abs() @ down[expert].double().abs()
        found = chosen_expert(x, torch.tensor([expert]), up, down)
        assert found.dtype == torch.float32
        assert ((found - wanted).abs() <= 1e-5 * (size + x.norm() * up[expert].norm() * down[expert].norm())).all()


@torch.no_grad()
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_shows_behind_every_operator(bad):
    arguments = projection(0, 2, 4, 3, 3)
    arguments["x"][0, 0, 9] = bad  # a value, which no norm touches
    *_, v = queries_keys_values(num_heads=2, key_size=4, **arguments)
    assert not v.isfinite().all()
    log_l, state = one_token.tunnel(torch.tensor([[[bad, 0.0]]]), torch.zeros(2), torch.ones(1, 2))
    assert log_l[0, 0, 0].isnan() == math.isnan(bad) and log_l[0, 0, 1].isfinite() and state[0, 1].isfinite()
    o = torch.ones(1, 1, 2, 3)
    o[0, 0, 1] = bad
    normed = gated_norm(o, torch.ones(3), torch.ones(1, 1, 6), 1e-5)
    assert normed[..., :3].isfinite().all() and normed[..., 3:].isnan().all()


def decoded(model, tokens):
    """Logits of each token, one at a time."""
    cache, logits = None, []
    for token in tokens.unbind(1):
        output = model(token.unsqueeze(1), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["fading", "rotary"])
def test_a_model_decodes_by_kernels_what_it_decodes_by_torch(called, monkeypatch, positions):
    torch.manual_seed(0)
    local = {"local_attention_every": 2, "local_attention_window": 6, "local_attention_positions": positions}
    config = ResNetBKConfig.from_preset("tiny", vocab_size=100, **local)
    model = ResNetBKForCausalLM(config).eval()
    tokens = torch.randint(100, (1, 12))
    ours = decoded(model, tokens)
    assert called == set(KERNELS) and len(KERNELS) == 7
    called.clear()
    monkeypatch.setattr(one_token.torch, "get_num_threads", lambda: 3)
    torch.testing.assert_close(ours, decoded(model, tokens), rtol=1e-4, atol=1e-5)
    assert not called


@pytest.mark.parametrize("rows", [1, 2])
def test_with_a_gradient_or_a_second_row_all_is_torchs(called, rows):
    model = ResNetBKForCausalLM(ResNetBKConfig.from_preset("tiny", vocab_size=100)).eval()
    with torch.set_grad_enabled(rows == 1):
        decoded(model, torch.randint(100, (rows, 3)))
    assert not called


@torch.no_grad()
def test_what_is_alone():
    x = torch.ones(1, 4)
    assert is_alone(1, x, torch.nn.Parameter(x))
    assert not is_alone(2, x)
    assert not is_alone(1, x, x.double())
    assert not is_alone(1, x, torch.ones(4, 2).t())
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_alone(1, x)
    with FlopCounterMode(display=False):
        assert not is_alone(1, x)
    with torch.enable_grad():
        assert not is_alone(1, x)
