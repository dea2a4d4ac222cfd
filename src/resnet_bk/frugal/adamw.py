"""AdamW's update of one tensor in host memory, by torch's fused kernel, in place."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

# Elements that are float32 for a moment, where gradients or moments are of another type: small enough for a cache, and
# a multiple of every vector's length, so that the kernel treats each element as it would in one piece.
PIECE = 2**20


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    """A parameter group's settings at one step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def update(
    weights: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    settings: AdamWSettings,
    *,
    seed: tuple[int, ...] = (0,),
) -> None:
    """One step. Float32 ``weights`` and ``step`` (a scalar, counted up); gradient and moments of any floating type.

    Moments that are not float32 are rounded up or down at random, in proportion to what is cut off, so that small
    changes are kept on average: to nearest, a second moment would stop falling. ``seed`` decides.
    """
    if gradient.dtype == exp_avg.dtype == torch.float32:
        _fused(weights, gradient, exp_avg, exp_avg_sq, step, settings)
        return
    rounds = exp_avg.dtype != torch.float32
    generator = torch.Generator().manual_seed(_number(seed)) if rounds else None
    before = step.clone()
    for start in range(0, weights.numel(), PIECE):
        piece = slice(start, start + PIECE)
        first, second = exp_avg.view(-1)[piece], exp_avg_sq.view(-1)[piece]
        wide_first, wide_second = first.float(), second.float()
        wide_gradient = gradient.view(-1)[piece].float()
        _fused(weights.view(-1)[piece], wide_gradient, wide_first, wide_second, step.copy_(before), settings)
        if generator is not None:
            round_stochastically(wide_first, first, generator)
            round_stochastically(wide_second, second, generator)


def round_stochastically(x: Tensor, out: Tensor, generator: torch.Generator) -> None:
    """Writes float32 ``x`` into bfloat16 ``out``: one of the two neighbours, the nearer one more often."""
    # The sixteen bits that bfloat16 lacks, plus as many random ones, carry into those it has.
    noise = torch.randint(0, 2**16, x.shape, dtype=torch.int32, generator=generator)
    out.copy_(noise.add_(x.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32))


def _fused(
    weights: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, settings: AdamWSettings
) -> None:
    adamw(
        [weights],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        foreach=False,
        fused=True,
        amsgrad=False,
        maximize=False,
        lr=settings.lr,
        beta1=settings.beta1,
        beta2=settings.beta2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )


def _number(seed: tuple[int, ...]) -> int:
    return int(np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0]) >> 1
