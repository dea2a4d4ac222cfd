"""The layer norm in Triton: one pass over memory forward, one backward."""

import torch
import triton
from torch import Tensor

from resnet_bk.ops.layer_norm_kernels import backward_kernel, forward_kernel

TILE = 4096  # numbers of a tile
BACKWARD_TILE = 2048
MOST_ROWS = 64
MOST_PROGRAMS = 1024  # backward, each with sums of its own: all that a large GPU has at once, and more
NUMBERS_OF_A_WARP = 512


def forward(
    x: Tensor, added: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x + added in x's type (empty if nothing is added), and the norm in ``dtype``."""
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    total = x.new_empty(0) if added is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, tiles, constants = _launch(x, TILE)
    if rows:
        tensors = ((x if y is None else y).contiguous() for y in (x, added, weight_D, bias_D))
        forward_kernel[(tiles,)](*tensors, total, out, rows, eps, ADDS=added is not None, **constants)
    return total, out


def backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight_D: Tensor, eps: float, added: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of what was added to it, in the type ``added`` (empty if nothing was), of weight and bias."""
    x_bar = torch.empty_like(x, memory_format=torch.contiguous_format)
    added_bar = x.new_empty(0) if added is None else torch.empty_like(x_bar, dtype=added)
    rows, tiles, constants = _launch(x, BACKWARD_TILE)
    programs = min(MOST_PROGRAMS, tiles)
    weight_parts, bias_parts = (x.new_empty(programs, x.shape[-1], dtype=torch.float32) for _ in range(2))
    if rows:
        tensors = ((grad if y is None else y).contiguous() for y in (grad, grad_total, x, weight_D))
        outputs = (x_bar, added_bar, weight_parts, bias_parts)
        constants |= {"GOES_ON": grad_total is not None, "ADDS": added is not None}
        backward_kernel[(programs,)](*tensors, *outputs, rows, eps, tiles=tiles, **constants)
    return x_bar, added_bar, weight_parts.sum(0).to(weight_D.dtype), bias_parts.sum(0).to(weight_D.dtype)


def _launch(x: Tensor, numbers: int) -> tuple[int, int, dict[str, int]]:
    """Rows, tiles of about so many ``numbers``, and the compile-time arguments."""
    if x.dtype == torch.float64:
        raise ValueError("the triton backend computes in float32, and x is float64; use backend='torch'")
    rows, size = x.shape[:-1].numel(), x.shape[-1]
    width = max(16, int(triton.next_power_of_2(size)))
    in_tile = max(1, min(MOST_ROWS, numbers // width))
    num_warps = max(4, min(16, in_tile * width // NUMBERS_OF_A_WARP))
    return rows, triton.cdiv(rows, in_tile), {"size": size, "ROWS": in_tile, "D": width, "num_warps": num_warps}
