"""The mixture of experts gives what every expert on every token with all but one masked does, for less work."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.ops.moe import balanced_bias, chosen_expert, gumbel_noise, load_balancing_loss, straight_through


def dense_mixture(x, expert, up, down):
    every = torch.einsum("tei,eid->ted", F.gelu(torch.einsum("td,edi->tei", x, up)), down)
    return every[torch.arange(len(x)), expert]


def mixture_that_drops(x, expert, up, down):
    """What a fixed capacity does: experts take their tokens in order of need, and those left over get nothing."""
    capacity = len(x) // len(up)
    kept = torch.zeros(len(x), dtype=torch.bool)
    for number in range(len(up)):
        mine = (expert == number).nonzero().flatten()
        kept[mine[x[mine].norm(dim=1).argsort(descending=True)][:capacity]] = True
    return dense_mixture(x, expert, up, down) * kept.unsqueeze(1)


def inputs(tokens=17, experts=4, hidden=4, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64, requires_grad=True)  # noqa: E731
    x, up, down = make(tokens, hidden), make(experts, hidden, width), make(experts, width, hidden)
    return x, torch.randint(experts, (tokens,), generator=generator), up, down


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(0, 17), experts=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_values_and_gradients_are_the_dense_ones(tokens, experts, seed):
    x, expert, up, down = inputs(tokens, experts, seed=seed)
    ours, dense = chosen_expert(x, expert, up, down), dense_mixture(x, expert, up, down)
    assert torch.allclose(ours, dense, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(dense)
    for got, wanted in zip(
        torch.autograd.grad((ours * weights).sum(), (x, up, down)),
        torch.autograd.grad((dense * weights).sum(), (x, up, down)),
        strict=True,
    ):
        assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("number", range(4))
def test_a_token_to_decode_meets_its_expert(number):
    x, _, up, down = inputs(tokens=1)
    expert = torch.tensor([number])
    with torch.no_grad():
        assert torch.allclose(chosen_expert(x, expert, up, down), dense_mixture(x, expert, up, down), rtol=1e-10)


def test_straight_through_changes_no_value_and_pulls_on_the_probability():
    x, weight = inputs()[0], torch.randn(17, 4, dtype=torch.float64)
    probability = torch.rand(17, 1, dtype=torch.float64, requires_grad=True)
    same = straight_through(x, probability)
    assert torch.equal(same, x)
    actual = torch.autograd.grad((same * weight).sum(), (x, probability))
    scaled = x * (1 + probability - probability.detach())
    for mine, wanted in zip(actual, torch.autograd.grad((scaled * weight).sum(), (x, probability)), strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-12)


def test_torchs_own_gradient_check():
    x, expert, up, down = inputs()
    assert torch.autograd.gradcheck(lambda x, up, down: chosen_expert(x, expert, up, down), (x, up, down))


def test_only_the_chosen_experts_work_is_done():
    x, up, down = (torch.randn(*size, requires_grad=True) for size in ((32, 8), (4, 8, 16), (4, 16, 8)))
    once = 2 * 32 * (8 * 16 + 16 * 8)
    with FlopCounterMode(display=False) as forward:
        y = chosen_expert(x, torch.randint(4, (32,)), up, down)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert (forward.get_total_flops(), backward.get_total_flops()) == (once, 2 * once)


def largest_change_before(mixture, place, seed):
    """The most that other values of the tokens from ``place`` on change the outputs before it; routes stay."""
    x, expert, up, down = (tensor.detach() for tensor in inputs(64, seed=seed))
    changed = x.clone()
    changed[place:] = 3 * torch.randn_like(changed[place:])
    before, after = (mixture(tokens, expert, up, down)[:place] for tokens in (x, changed))
    return float((before - after).abs().max())


@settings(max_examples=20, deadline=None)
@given(place=st.integers(1, 63), seed=st.integers(0, 2**31))
def test_no_token_depends_on_a_later_one_when_routes_are_held_fixed(place, seed):
    assert largest_change_before(chosen_expert, place, seed) <= 1e-12


@settings(max_examples=20, deadline=None)
@given(place=st.integers(1, 63), seed=st.integers(0, 2**31))
def test_where_later_tokens_go_changes_only_the_order_of_sums(place, seed):
    x, expert, up, down = (tensor.detach() for tensor in inputs(64, seed=seed))
    elsewhere = torch.cat([expert[:place], torch.randint(4, (64 - place,))])
    before, after = (chosen_expert(x, routes, up, down)[:place] for routes in (expert, elsewhere))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-12)


def test_that_check_finds_a_mixture_with_a_capacity():
    assert max(largest_change_before(mixture_that_drops, 32, seed) for seed in range(5)) > 1e-2


def test_balancing_loss_is_one_when_even_and_e_when_all_go_to_one():
    even = torch.full((8, 4), 0.25)
    assert load_balancing_loss(even, torch.full((4,), 0.25)).item() == pytest.approx(1.0)
    one = F.one_hot(torch.zeros(8, dtype=torch.int64), 4).float()
    assert load_balancing_loss(one, one[0]).item() == pytest.approx(4.0)


def test_a_bias_moves_towards_experts_with_less_than_their_share():
    bias, load = torch.tensor([0.0, 0.5, -0.5, 0.0]), torch.tensor([0.7, 0.05, 0.0, 0.25])
    assert torch.allclose(balanced_bias(bias, load, 0.1), torch.tensor([-0.1, 0.6, -0.4, 0.0]))
    assert torch.equal(balanced_bias(bias, torch.full((4,), 0.25), 0.1), bias)


def test_gumbel_noise_makes_the_argmax_a_sample():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(200_000, 3)
    chosen = (logits + gumbel_noise(logits)).argmax(-1)
    shares = torch.bincount(chosen, minlength=3) / len(chosen)
    assert torch.allclose(shares, F.softmax(logits[0], dim=-1), atol=5e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while it traces
def test_compiled_as_one_graph_it_is_the_same():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(chosen_expert, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x, expert, up, down = inputs(seed=seed)
        ours, eager = compiled(x, expert, up, down), chosen_expert(x, expert, up, down)
        torch.testing.assert_close(ours, eager)
        torch.testing.assert_close(
            torch.autograd.grad(ours.sum(), (x, up, down)), torch.autograd.grad(eager.sum(), (x, up, down))
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "other routes need no other graph"
