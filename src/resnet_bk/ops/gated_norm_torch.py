"""The gated norm in plain torch, on every device, as many tokens at a time as a cache holds.

With r = 1 / rms(o), n = o r and y' the gradient of the result,

    n' = y' silu(gate) weight,          o' = r (n' - n mean(n' n))
    weight' = sum y' silu(gate) n,      gate' = y' n weight silu'(gate)
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 2**18  # numbers of o


def forward(o_BNHV: Tensor, weight_V: Tensor, gate_BND: Tensor, eps: float) -> Tensor:
    """``(B, N, D)`` in the gate's type."""
    dtype = _wide(o_BNHV, gate_BND)
    weight = weight_V.to(dtype)

    def whole(o: Tensor, gate: Tensor) -> Tensor:
        return _normed(o.to(dtype), eps)[0].mul_(weight).mul_(F.silu(gate.to(dtype)))

    if o_BNHV.numel() <= PIECE:
        return whole(o_BNHV, gate_BND.reshape(o_BNHV.shape)).to(gate_BND.dtype).flatten(-2)
    result = torch.empty_like(gate_BND, memory_format=torch.contiguous_format)
    o, gate, out = (_heads(x, o_BNHV) for x in (o_BNHV, gate_BND, result))
    for piece in _pieces(o):
        out[piece] = whole(o[piece], gate[piece])
    return result


def backward(
    grad_BND: Tensor, o_BNHV: Tensor, weight_V: Tensor, gate_BND: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of o, weight and gate, in their types."""
    o_bar = torch.empty_like(o_BNHV, memory_format=torch.contiguous_format)
    gate_bar = torch.empty_like(gate_BND, memory_format=torch.contiguous_format)
    o, gate, grad, o_out, gate_out = (_heads(x, o_BNHV) for x in (o_BNHV, gate_BND, grad_BND, o_bar, gate_bar))
    dtype = _wide(o_BNHV, gate_BND)
    weight = weight_V.to(dtype)
    weight_bar = torch.zeros_like(weight)
    for piece in _pieces(o):
        wide_gate, wide_grad = gate[piece].to(dtype), grad[piece].to(dtype)
        normed, root = _normed(o[piece].to(dtype), eps)
        weighted_bar = wide_grad * F.silu(wide_gate)
        gate_out[piece] = torch.ops.aten.silu_backward(wide_grad * normed * weight, wide_gate)
        along = weighted_bar * normed
        weight_bar += along.sum((0, 1))
        n_bar = weighted_bar.mul_(weight)
        mean = along.mul_(weight).mean(-1, keepdim=True)
        o_out[piece] = n_bar.addcmul_(normed, mean, value=-1).mul_(root)
    return o_bar, weight_bar.to(weight_V.dtype), gate_bar


def _heads(x: Tensor, o_BNHV: Tensor) -> Tensor:
    """``(T, H, V)``."""
    return x.reshape(-1, *o_BNHV.shape[2:])


def _wide(o: Tensor, gate: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(o.dtype, gate.dtype), torch.float32)


def _pieces(o_THV: Tensor) -> Iterator[slice]:
    tokens, heads, size = o_THV.shape
    step = max(1, PIECE // (heads * size) if o_THV.device.type == "cpu" else tokens)
    for first in range(0, tokens, step):
        yield slice(first, first + step)


def _normed(o: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """o by its root mean square, a new tensor, and what it was multiplied by."""
    root = o.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return o * root, root
