"""The mixture of experts gives what every expert on every token with all but one masked does, for less work."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.ops.moe import chosen_expert, gumbel_noise, load_balancing_loss


def dense_mixture(x, expert, up, down):
    every = torch.einsum("tei,eid->ted", F.gelu(torch.einsum("td,edi->tei", x, up)), down)
    return every[torch.arange(len(x)), expert]


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 17), experts=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_values_and_gradients_are_the_dense_ones(tokens, experts, seed):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64, requires_grad=True)  # noqa: E731
    x, up, down = make(tokens, 4), make(experts, 4, 6), make(experts, 6, 4)
    expert = torch.randint(experts, (tokens,), generator=generator)
    ours, dense = chosen_expert(x, expert, up, down), dense_mixture(x, expert, up, down)
    assert torch.allclose(ours, dense, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(dense)
    for got, wanted in zip(
        torch.autograd.grad((ours * weights).sum(), (x, up, down)),
        torch.autograd.grad((dense * weights).sum(), (x, up, down)),
        strict=True,
    ):
        assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-12)


def test_only_the_chosen_experts_work_is_done():
    x, up, down = torch.randn(32, 8), torch.randn(4, 8, 16), torch.randn(4, 16, 8)
    with FlopCounterMode(display=False) as counter:
        chosen_expert(x, torch.randint(4, (32,)), up, down)
    assert counter.get_total_flops() == 2 * 32 * (8 * 16 + 16 * 8)


def test_balancing_loss_is_one_when_even_and_e_when_all_go_to_one():
    even = torch.full((8, 4), 0.25)
    assert load_balancing_loss(even, torch.full((4,), 0.25)).item() == pytest.approx(1.0)
    one = F.one_hot(torch.zeros(8, dtype=torch.int64), 4).float()
    assert load_balancing_loss(one, one[0]).item() == pytest.approx(4.0)


def test_gumbel_noise_makes_the_argmax_a_sample():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(200_000, 3)
    chosen = (logits + gumbel_noise(logits)).argmax(-1)
    shares = torch.bincount(chosen, minlength=3) / len(chosen)
    assert torch.allclose(shares, F.softmax(logits[0], dim=-1), atol=5e-3)
