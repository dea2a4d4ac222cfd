"""The Triton kernels of the gated norm: a program has some heads of some tokens, which lie one behind the other."""

import triton.language as tl

from resnet_bk.ops.kernels import kernel


@kernel
def forward_kernel(o, weight, gate, out, rows, eps, size: tl.constexpr, ROWS: tl.constexpr, V: tl.constexpr):
    """o / rms(o) * weight * silu(gate)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, V)[None, :]
    there, where = (row < rows) & (column < size), row * size + column
    o_ = tl.load(o + where, mask=there, other=0.0).to(tl.float32)
    gate_ = tl.load(gate + where, mask=there, other=0.0).to(tl.float32)
    weight_ = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    root = (1.0 / tl.sqrt(tl.sum(o_ * o_, 1) / size + eps))[:, None]
    result = o_ * root * weight_ * (gate_ / (1.0 + tl.exp(-gate_)))
    tl.store(out + where, result.to(out.dtype.element_ty), mask=there)


@kernel
def backward_kernel(
    grad,
    o,
    weight,
    gate,
    grad_o,
    grad_weight,
    grad_gate,
    rows,
    eps,
    size: tl.constexpr,
    ROWS: tl.constexpr,
    V: tl.constexpr,
):
    """Gradients of o and gate, and this program's part of the weight's; the formulas are in ``gated_norm_torch``."""
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, V)[None, :]
    there, where = (row < rows) & (column < size), row * size + column
    grad_ = tl.load(grad + where, mask=there, other=0.0).to(tl.float32)
    o_ = tl.load(o + where, mask=there, other=0.0).to(tl.float32)
    gate_ = tl.load(gate + where, mask=there, other=0.0).to(tl.float32)
    weight_ = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    root = (1.0 / tl.sqrt(tl.sum(o_ * o_, 1) / size + eps))[:, None]
    normed = o_ * root
    sigma = 1.0 / (1.0 + tl.exp(-gate_))
    silu = gate_ * sigma
    bar_gate = grad_ * normed * weight_ * (sigma + silu * (1.0 - sigma))
    tl.store(grad_gate + where, bar_gate.to(grad_gate.dtype.element_ty), mask=there)
    weighted = grad_ * silu
    sums = tl.sum(weighted * normed, 0)[None, :]
    tl.store(grad_weight + program * size + column, sums, mask=column < size)
    bar_n = weighted * weight_
    along = (tl.sum(bar_n * normed, 1) / size)[:, None]
    tl.store(grad_o + where, ((bar_n - normed * along) * root).to(grad_o.dtype.element_ty), mask=there)
