"""The gated norm in Triton: one pass over memory forward, one backward."""

import torch
import triton
from torch import Tensor

from resnet_bk.ops.gated_norm_kernels import backward_kernel, forward_kernel

TILE = 4096  # numbers of a tile
MOST_ROWS = 64


def forward(o_BNHV: Tensor, weight_V: Tensor, gate_BND: Tensor, eps: float) -> Tensor:
    """``(B, N, D)`` in the gate's type."""
    out = torch.empty_like(gate_BND, memory_format=torch.contiguous_format)
    rows, programs, constants = _launch(o_BNHV, gate_BND)
    if out.numel():
        tensors = (x.contiguous() for x in (o_BNHV, weight_V, gate_BND))
        forward_kernel[(programs,)](*tensors, out, rows, eps, **constants)
    return out


def backward(
    grad_BND: Tensor, o_BNHV: Tensor, weight_V: Tensor, gate_BND: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of o, weight and gate, in their types."""
    o_bar = torch.empty_like(o_BNHV, memory_format=torch.contiguous_format)
    gate_bar = torch.empty_like(gate_BND, memory_format=torch.contiguous_format)
    rows, programs, constants = _launch(o_BNHV, gate_BND)
    parts = o_BNHV.new_empty(programs, len(weight_V), dtype=torch.float32)
    if o_bar.numel():
        tensors = (x.contiguous() for x in (grad_BND, o_BNHV, weight_V, gate_BND))
        backward_kernel[(programs,)](*tensors, o_bar, parts, gate_bar, rows, eps, **constants)
    return o_bar, parts.sum(0).to(weight_V.dtype), gate_bar


def _launch(o_BNHV: Tensor, gate_BND: Tensor) -> tuple[int, int, dict[str, int]]:
    """Rows, programs and the compile-time arguments."""
    if torch.float64 in (o_BNHV.dtype, gate_BND.dtype):
        raise ValueError("the triton backend computes in float32, and o or gate is float64; use backend='torch'")
    rows, size = o_BNHV.shape[:3].numel(), o_BNHV.shape[3]
    width = max(16, int(triton.next_power_of_2(size)))
    in_tile = max(2, min(MOST_ROWS, TILE // width))
    num_warps = max(4, min(16, in_tile * width // 1024))
    return rows, triton.cdiv(rows, in_tile), {"size": size, "ROWS": in_tile, "V": width, "num_warps": num_warps}
