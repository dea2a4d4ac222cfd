"""The gap of a rate: what it means for a chain, and its gradient."""

import torch

from resnet_bk.ops.bk import bk_tunnel
from resnet_bk.ops.gap import LARGEST_RATE, _gap, gap_of_rate


def test_a_chain_of_constant_gap_decays_at_the_rate():
    rates = torch.tensor([1e-3, 1e-2, 0.3, 2.0, 10.0], dtype=torch.float64)
    log_l = bk_tunnel(gap_of_rate(rates).expand(1, 20_000, -1))
    torch.testing.assert_close(log_l[0, -1], -rates, rtol=1e-6, atol=0.0)


def test_its_gradient():
    rate = torch.tensor([0.1, 1e-2, 0.5, 3.0, 12.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gap_of_rate, rate)


def test_it_is_not_written_in_place():
    """Else torch 2.11 loses its gradient in compiled models; with that torch tests/models/test_compiled.py sees it."""
    assert _gap(torch.rand(3))._version == 0


def test_small_rates_keep_their_digits():
    rate = torch.tensor([1e-6, 1e-3], dtype=torch.float32)
    torch.testing.assert_close(gap_of_rate(rate).double(), rate.double() ** 2, rtol=1e-6, atol=0.0)


def test_above_the_largest_rate_nothing_overflows_and_nothing_pulls():
    rate = torch.tensor([LARGEST_RATE, 1e3, 1e30], requires_grad=True)
    gap = gap_of_rate(rate)
    assert torch.isfinite(gap).all()
    assert gap[1] == gap[0] == gap[2]
    gap.sum().backward()
    assert rate.grad[1:].tolist() == [0.0, 0.0]
