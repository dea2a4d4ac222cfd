"""AdamW's update of one tensor in host memory, in place: by torch's fused kernel, or with moments in bfloat16."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.adamw import adamw

from resnet_bk.imagined import is_imagined
from resnet_bk.threads import ELEMENTS_WORTH_A_THREAD, in_threads

# Elements whose gradient is float32 for a moment, where it is of another type: few enough for a cache, enough to give
# sixteen threads as many as torch wants each to have, and a multiple of every vector's length, so that the kernel
# treats each element as it would in one piece.
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
    """One step. Float32 ``weights`` and ``step`` (a scalar, counted up); gradient of any floating type.

    Moments are float32 or bfloat16. The latter are rounded up or down at random, in proportion to what is cut off, so
    that small changes are kept on average: to nearest, a second moment would stop falling. ``seed`` decides.
    """
    if exp_avg.dtype != torch.float32:
        _with_half_moments(weights, gradient, exp_avg, exp_avg_sq, step, settings, seed)
        return
    if gradient.dtype == torch.float32:
        _fused(weights, gradient, exp_avg, exp_avg_sq, step, settings)
        return
    before = step.clone()
    for start in range(0, weights.numel(), PIECE):
        first, second, slopes, piece = (
            x.view(-1)[start : start + PIECE] for x in (exp_avg, exp_avg_sq, gradient, weights)
        )
        _fused(piece, slopes.float(), first, second, step.copy_(before), settings)


def _with_half_moments(
    weights: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    settings: AdamWSettings,
    seed: tuple[int, ...],
) -> None:
    if is_imagined():
        return
    from resnet_bk.frugal import adamw_kernels as kernels  # a compiler: slow to load

    count = float(step.add_(1))
    numbers = [
        1 - settings.lr * settings.weight_decay,
        1 - settings.beta1,
        settings.beta2,
        1 - settings.beta2,
        settings.lr / (1 - settings.beta1**count),
        math.sqrt(1 - settings.beta2**count),
        settings.eps,
    ]
    slopes = gradient if gradient.dtype in (torch.float32, torch.bfloat16) else gradient.float()
    kernel: Any = kernels.half_gradient_kernel if slopes.dtype == torch.bfloat16 else kernels.single_gradient_kernel
    arrays = [_array(x) for x in (slopes, weights, exp_avg, exp_avg_sq)]
    constants = tuple(np.float32(number) for number in numbers)
    number, numel = np.uint32(_number(seed) & 0xFFFFFFFF), weights.numel()
    share = max(ELEMENTS_WORTH_A_THREAD, -(-numel // torch.get_num_threads()))
    ranges = [(begin, min(begin + share, numel)) for begin in range(0, numel, share)]

    def work(begin: int, end: int) -> None:
        kernel(begin, end, *arrays, constants, number)

    in_threads(work, ranges)


def _array(x: Tensor) -> NDArray[Any]:
    """The tensor's memory, flat; of bfloat16 numbers, which numpy has not, their bits."""
    flat = x.view(-1)
    array: NDArray[Any] = (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()
    return array


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
