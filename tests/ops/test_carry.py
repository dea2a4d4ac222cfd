"""bk_carry: three forms with one meaning, against the dense resolvent and each other."""

import pytest
import torch
from dense_oracle import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.ops import bk_carry, bk_core, bk_tunnel
from resnet_bk.ops.carry import choose_carry_backend, operators
from resnet_bk.ops.carry.chunked import CHUNK, Decays

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 17 * CHUNK + 5]
NAMES = ("q", "k", "v", "log_l", "initial_state", "angle", "skip")


def arguments(
    length,
    *,
    angle=False,
    starts=False,
    skip=False,
    key_size=6,
    value_size=5,
    dtype=torch.float32,
    seed=0,
    device="cpu",
):
    """Two rows, three heads, whose decays are next to none, slow, and at once."""
    generator = torch.Generator().manual_seed(seed)
    rows, heads = 2, 3

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    inputs = {
        "q": normal(rows, length, heads, key_size),
        "k": normal(rows, length, heads, key_size),
        "v": normal(rows, length, heads, value_size),
        "log_l": (-torch.rand(rows, length, heads, generator=generator) * torch.tensor([1e-3, 0.1, 9.0])).to(device),
        "initial_state": normal(rows, heads, key_size, value_size).float(),
    }
    if angle:
        inputs["angle"] = normal(rows, length, heads).float()
    if skip:
        inputs["skip"] = normal(heads).float()
    if starts:
        inputs["starts"] = (torch.rand(rows, length, generator=generator) < 0.03).to(device)
    return inputs


def everything(inputs, **options):
    """Output, final state and the gradients of all real inputs for fixed random weights."""
    inputs = {name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    o, final = bk_carry(**inputs, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(x.device) for x in (o, final)]
    total = (o.double() * weights[0]).sum() + (final.double() * weights[1]).sum()
    names = [name for name in NAMES if name in inputs]
    gradients = torch.autograd.grad(total, [inputs[name] for name in names])
    return {"o": o, "final": final, **dict(zip(names, gradients, strict=True))}


def reference(inputs):
    """The same in the quadratic form in double precision."""
    doubles = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    return everything(doubles, form="quadratic")


def assert_equal(actual, expected, tolerance):
    errors = {name: relative_error(actual[name], expected[name]) for name in expected if expected[name].norm() > 0}
    assert max(errors.values(), default=0) <= tolerance, errors
    for name in set(expected) - set(errors):
        assert not actual[name].any(), name


@pytest.mark.parametrize("regime", ["tunnelling", "scattering"])
def test_it_carries_content_by_the_resolvent_of_the_chain_cut_at_each_token(regime):
    length, heads = 9, 2
    v = torch.rand(1, length, heads, dtype=torch.float64)
    if regime == "tunnelling":
        a, log_l, angle = 2 + v + 0j, bk_tunnel(v), None
    else:
        z = torch.tensor([0.3 + 0.2j, -1.1 + 0.05j], dtype=torch.complex128)
        ratios = bk_core(v, z, h0=0.0)
        a, log_l, angle = v - z, ratios.abs().log(), ratios.angle()
    q, k, x = (torch.randn(1, length, heads, 4, dtype=torch.float64) for _ in range(3))
    skip = torch.randn(heads, dtype=torch.float64)
    o = bk_carry(q, k, x, log_l, angle=angle, skip=skip) - skip.unsqueeze(-1) * x
    for head in range(heads):
        # With an angle, coordinates (i, i + 2) are real and imaginary part.
        q_, k_ = ((y[0, :, head, :2] + 1j * y[0, :, head, 2:]) if angle is not None else y[0, :, head] for y in (q, k))
        side = -torch.ones(length - 1, dtype=torch.complex128)
        matrix = torch.diag(a[0, :, head].to(torch.complex128)) + torch.diag(side, 1) + torch.diag(side, -1)
        for i in range(length):
            resolvent_row = torch.linalg.inv(matrix[: i + 1, : i + 1])[i]
            scores = (k_[: i + 1].to(torch.complex128) @ q_[i].conj().to(torch.complex128)) * resolvent_row
            assert relative_error(o[0, i, head], scores.real @ x[0, : i + 1, head]) < 1e-11


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("angle", [False, True])
@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_all_forms_agree_with_every_gradient(length, angle, starts, skip):
    inputs = arguments(length, angle=angle, starts=starts, skip=skip)
    expected = reference(inputs)
    assert_equal(everything(inputs), expected, 5e-6)
    if length <= 2 * CHUNK:
        assert_equal(everything(inputs, form="recurrent"), expected, 5e-6)
    doubles = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    assert_equal(everything(doubles), expected, 1e-12)


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 3 * CHUNK),
    key_size=st.integers(1, 9),
    value_size=st.integers(1, 9),
    starts=st.booleans(),
    skip=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(length, key_size, value_size, starts, skip, seed):
    inputs = arguments(length, key_size=key_size, value_size=value_size, starts=starts, skip=skip, seed=seed)
    assert_equal(everything(inputs), reference(inputs), 5e-6)


# Each two of type, starts and skip in each of their four combinations.
@pytest.mark.parametrize(
    ("dtype", "starts", "skip"),
    [
        (torch.float32, False, False),
        (torch.float32, True, True),
        (torch.float16, False, True),
        (torch.float16, True, False),
    ],
)
@pytest.mark.parametrize("length", [1, CHUNK - 1, 2 * CHUNK + 1, 6 * CHUNK])
def test_the_triton_kernels_agree(dtype, length, starts, skip):
    inputs = arguments(length, starts=starts, skip=skip, key_size=8, value_size=20, dtype=dtype, device=DEVICE)
    tolerance = 5e-6 if dtype == torch.float32 else 3e-3
    assert_equal(everything(inputs, backend="triton"), reference(inputs), tolerance)


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize("angle", [False, True])
def test_pieces_joined_by_their_states_are_the_whole(form, angle):
    inputs = arguments(2 * CHUNK + 9, angle=angle, dtype=torch.float64)
    inputs = {name: x.double() for name, x in inputs.items()}
    whole, final = bk_carry(**inputs, output_final_state=True, form=form)
    state, pieces = inputs.pop("initial_state"), []
    for piece in (slice(0, 7), slice(7, 8), slice(8, 100), slice(100, None)):
        part = {name: x[:, piece] for name, x in inputs.items()}
        o, state = bk_carry(**part, initial_state=state, output_final_state=True, form=form)
        pieces.append(o)
    assert relative_error(torch.cat(pieces, dim=1), whole) < 1e-12
    assert relative_error(state, final) < 1e-12


@pytest.mark.parametrize("form", ["chunked", "recurrent", "quadratic"])
def test_no_output_reads_a_later_token(form):
    inputs = arguments(CHUNK + 20)
    before = bk_carry(**inputs, form=form)
    for place in (3, CHUNK - 1, CHUNK, CHUNK + 10):
        changed = {name: x.clone() for name, x in inputs.items()}
        for name in ("q", "k", "v", "log_l"):
            changed[name][:, place] -= 1
        after = bk_carry(**changed, form=form)
        assert torch.equal(before[:, :place], after[:, :place])
        assert not torch.equal(before[:, place:], after[:, place:])


@pytest.mark.parametrize("form", ["chunked", "recurrent", "quadratic"])
def test_documents_of_a_row_are_as_if_each_were_alone(form):
    inputs = arguments(3 * CHUNK)
    starts = torch.zeros(2, 3 * CHUNK, dtype=torch.bool)
    places = [20, 21, CHUNK, 2 * CHUNK - 1, 3 * CHUNK - 5]
    starts[:, places] = True
    packed, final = bk_carry(**inputs, starts=starts, output_final_state=True, form=form)
    state, ends = inputs.pop("initial_state"), [*places, 3 * CHUNK]
    for begin, end in zip([0, *places], ends, strict=True):
        part = {name: x[:, begin:end] for name, x in inputs.items()}
        alone, last = bk_carry(**part, initial_state=state, output_final_state=True, form=form)
        assert relative_error(packed[:, begin:end], alone) < 2e-6
        state = None
    assert relative_error(final, last) < 2e-6


def test_an_empty_sequence_passes_its_state_on():
    inputs = arguments(0)
    o, final = bk_carry(**inputs, output_final_state=True)
    assert o.shape == inputs["v"].shape
    assert torch.equal(final, inputs["initial_state"])


@pytest.mark.parametrize("log_l", [0.0, -1e-30, -60.0, -1e30])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_extreme_decays_stay_finite(log_l, backend):
    inputs = arguments(CHUNK + 3, device=DEVICE if backend == "triton" else "cpu")
    inputs["log_l"] = torch.full_like(inputs["log_l"], log_l)
    actual = everything(inputs, backend=backend)
    for name, x in actual.items():
        assert x.isfinite().all(), name
    assert_equal(actual, reference(inputs), 5e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_token_right_behind_a_decay_to_nothing_has_its_own_decay_to_the_last_digit(backend):
    # Sums of logarithms that are as large as this have no digit left for those after them.
    inputs = arguments(9, device=DEVICE if backend == "triton" else "cpu")
    inputs["log_l"] = torch.full_like(inputs["log_l"], -0.1)
    inputs["log_l"][:, 4] = -3e5
    assert_equal(everything(inputs, backend=backend), reference(inputs), 5e-6)


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.integers(0, 3),
    size=st.integers(1, CHUNK),
    slowest=st.floats(-6, 3),
    written_at_exit=st.booleans(),
    starts=st.booleans(),
    seed=st.integers(0, 99),
)
def test_decays_by_the_compiled_loop_are_the_exponentials(pieces, size, slowest, written_at_exit, starts, seed):
    generator = torch.Generator().manual_seed(seed)
    log_l = -torch.rand(pieces, 2, size, generator=generator, dtype=torch.float64) * 10**slowest
    log_sum = log_l.cumsum(-1)
    ahead = log_sum if written_at_exit else log_sum - log_l
    counts = (torch.rand(pieces, 2, size, generator=generator) < 0.2).int().cumsum(-1, dtype=torch.int32)
    single, double = (
        Decays(log_sum=log_sum, ahead=ahead, starts=counts if starts else None, dtype=dtype).between()
        for dtype in (torch.float32, torch.float64)
    )
    assert single.dtype == torch.float32 and single.shape == double.shape
    torch.testing.assert_close(single, double.float(), rtol=3e-7, atol=1e-37)


def test_decays_are_the_same_to_the_last_bit_whoever_keeps_account():
    log_sum = torch.linspace(-1, -9, CHUNK, dtype=torch.float64).expand(2, 3, CHUNK)
    decays = Decays(log_sum=log_sum, ahead=log_sum, starts=None, dtype=torch.float32)
    by_loop = decays.between()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(log_sum)
        assert Decays(log_sum=fake, ahead=fake, starts=None, dtype=torch.float32).between().shape == by_loop.shape
    with FlopCounterMode(display=False):
        assert torch.equal(decays.between(), by_loop)


@pytest.mark.slow
def test_a_million_tokens_do_not_drift():
    length = 2**20
    generator = torch.Generator().manual_seed(0)
    w = torch.rand(1, length, 2, generator=generator) * torch.tensor([1e-6, 1e-2])
    q, k, v = (torch.randn(1, length, 2, 2, generator=generator) for _ in range(3))
    o = bk_carry(q, k, v, bk_tunnel(w))
    expected = bk_carry(*(x.double() for x in (q, k, v)), bk_tunnel(w.double()))
    for part in (slice(0, 1000), slice(length // 2, length // 2 + 1000), slice(length - 1000, length)):
        assert relative_error(o[:, part], expected[:, part]) < 1e-5


@pytest.mark.parametrize("with_starts", [False, True])
@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_accepts_the_operator(with_starts, with_skip, dtype):
    q, k, v, log_l, state = (
        x.to(dtype).requires_grad_() for x in arguments(CHUNK + 2, key_size=3, value_size=2).values()
    )
    starts = torch.rand(2, CHUNK + 2) < 0.05 if with_starts else None
    skip = torch.randn(3, dtype=dtype, requires_grad=True) if with_skip else None
    torch.library.opcheck(operators.carry, (q, k, v, log_l, starts, state, skip, "torch"))


def test_its_products_are_counted():
    inputs = {name: x.requires_grad_() for name, x in arguments(30, key_size=4, value_size=8).items()}
    tokens_and_heads = 2 * 30 * 3
    counter = FlopCounterMode(display=False)
    with counter:
        o = bk_carry(**inputs)
    # Scores and their values over a whole chunk; the state is written and read.
    assert counter.get_total_flops() == tokens_and_heads * 2 * (CHUNK * (4 + 8) + 2 * 4 * 8)
    with counter:
        o.sum().backward()
    assert counter.get_total_flops() == tokens_and_heads * 2 * (CHUNK * (3 * 4 + 2 * 8) + 5 * 4 * 8)


@pytest.mark.parametrize(
    ("device", "dtype", "width", "name"),
    [
        ("cpu", torch.float32, 64, "torch"),
        ("mps", torch.float32, 64, "torch"),
        ("cuda", torch.float32, 64, "triton"),
        ("cuda", torch.float64, 64, "torch"),
        ("cuda", torch.float32, 256, "torch"),
    ],
)
def test_the_backend_is_the_fastest_that_can(device, dtype, width, name):
    assert choose_carry_backend(torch.device(device), dtype, width).name == name


def test_the_triton_kernels_refuse_what_they_cannot_do():
    inputs = {name: x.double().to(DEVICE) for name, x in arguments(5).items()}
    with pytest.raises(ValueError, match="backend='torch'"):
        bk_carry(**inputs, backend="triton")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.zeros(2, 4, 3)}, "q has shape"),
        ({"v": torch.zeros(2, 5, 3, 5)}, "v has shape"),
        ({"log_l": torch.zeros(2, 4)}, "log_l"),
        ({"log_l": torch.zeros(2, 4, 3, dtype=torch.long)}, "real"),
        ({"initial_state": torch.zeros(2, 3, 5, 6)}, "initial_state"),
        ({"starts": torch.zeros(2, 4)}, "bool"),
        ({"skip": torch.zeros(2)}, "skip"),
        ({"form": "magic"}, "form"),
        ({"backend": "magic"}, "backend"),
        (
            {
                "q": torch.zeros(2, 4, 3, 5),
                "k": torch.zeros(2, 4, 3, 5),
                "initial_state": None,
                "angle": torch.zeros(2, 4, 3),
            },
            "even",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_mend(changes, words):
    with pytest.raises(ValueError, match=words):
        bk_carry(**{**arguments(4), **changes})
