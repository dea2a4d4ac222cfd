"""AdamW's update of one tensor in host memory, by torch's fused kernel, in place."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

# Elements that are float32 for a moment, where gradients or moments are of another type: few enough for a cache, enough
# to give sixteen threads as many as torch wants each to have, and a multiple of every vector's length, so that the
# kernel treats each element as it would in one piece.
PIECE = 2**19


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
    noise = Noise(weights.numel(), seed) if exp_avg.dtype != torch.float32 else None
    before = step.clone()
    for start in range(0, weights.numel(), PIECE):
        piece = slice(start, start + PIECE)
        first, second = exp_avg.view(-1)[piece], exp_avg_sq.view(-1)[piece]
        wide_first, wide_second = first.float(), second.float()
        wide_gradient = gradient.view(-1)[piece].float()
        _fused(weights.view(-1)[piece], wide_gradient, wide_first, wide_second, step.copy_(before), settings)
        if noise is not None:
            round_stochastically(wide_first, first, noise)
            round_stochastically(wide_second, second, noise)


class Noise:
    """Sixteen random bits for each element, as many as are asked for.

    Drawing is done by one thread, and rounding by all. So no more is drawn than two pieces need, and each takes its
    bits from another place there: for every element they are uniform, which is all that rounding asks for.
    """

    def __init__(self, numel: int, seed: tuple[int, ...]) -> None:
        """For a tensor of ``numel`` elements."""
        self._length = min(numel, PIECE)
        self._generator = torch.Generator().manual_seed(_number(seed))
        four_each = torch.empty(-(-2 * self._length // 4), dtype=torch.int64)
        four_each.random_(-(2**63), None, generator=self._generator)
        self._bits = four_each.view(torch.int16)

    def take(self, numel: int) -> Tensor:
        """int32 from 0 to 2^16 - 1."""
        start = int(torch.randint(0, self._length + 1, (), generator=self._generator))
        return self._bits[start : start + numel].to(torch.int32).bitwise_and_(2**16 - 1)


def round_stochastically(x: Tensor, out: Tensor, noise: Noise) -> None:
    """Writes float32 ``x`` into bfloat16 ``out``: one of the two neighbours, the nearer one more often."""
    # The sixteen bits that bfloat16 lacks, plus as many random ones, carry into those it has.
    carried = noise.take(x.numel()).view(x.shape).add_(x.view(torch.int32))
    out.copy_(carried.bitwise_and_(-(2**16)).view(torch.float32))


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
