"""The gap of a tunnelling chain by the rate at which it is to decay."""

from typing import Any

import torch
from torch import Tensor

LARGEST_RATE = 20.0  # a factor of 2e-9 a token; the gap is 5e8, far from float32's largest number


class _Gap(torch.autograd.Function):
    """It keeps the rate alone."""

    @staticmethod
    def forward(ctx: Any, rate: Tensor) -> Tensor:
        ctx.save_for_backward(rate)
        return _gap(rate)

    @staticmethod
    def backward(ctx: Any, grad_gap: Tensor) -> Tensor:
        (rate,) = ctx.saved_tensors
        slope = rate.clamp(max=LARGEST_RATE).sinh_().mul_(2)
        grad_rate: Tensor = slope.mul_(grad_gap).masked_fill_(rate > LARGEST_RATE, 0)
        return grad_rate


def gap_of_rate(rate: Tensor) -> Tensor:
    """w = 4 sinh(r / 2)^2, at which l = exp(-r) solves l = 1 / (2 + w - l): the decay of a chain of constant gap.

    ``rate`` >= 0, of any shape; above 20 it counts as 20, and has no gradient.
    """
    if not torch.is_grad_enabled():
        return _gap(rate)  # of a token to decode, half of the time is what autograd would do
    gap: Tensor = _Gap.apply(rate)  # type: ignore[no-untyped-call]
    return gap


def _gap(rate: Tensor) -> Tensor:
    # Not mul_: torch 2.11 compiles a function whose result was written in place without its gradient.
    return (rate.clamp(max=LARGEST_RATE) / 2).sinh_().square_().mul(4)
