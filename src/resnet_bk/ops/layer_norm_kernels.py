"""The Triton kernels of the layer norm: a program has some rows at a time, whole."""

import triton
import triton.language as tl

from resnet_bk.ops.kernels import kernel


@triton.jit
def _normed(x, there, size: tl.constexpr, eps):
    """Rows less their mean, by their standard deviation; and one over that."""
    centred = tl.where(there, x - (tl.sum(x, 1) / size)[:, None], 0.0)
    root = (1.0 / tl.sqrt(tl.sum(centred * centred, 1) / size + eps))[:, None]
    return centred * root, root


@kernel
def forward_kernel(
    x,
    added,
    weight,
    bias,
    total,
    out,
    rows,
    eps,
    size: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """The norm of x, or of x + added, which is then written too."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, D)[None, :]
    there, where = (row < rows) & (column < size), row * size + column
    x_ = tl.load(x + where, mask=there, other=0.0).to(tl.float32)
    if ADDS:
        x_ += tl.load(added + where, mask=there, other=0.0).to(tl.float32)
        tl.store(total + where, x_.to(total.dtype.element_ty), mask=there)
    weight_ = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    bias_ = tl.load(bias + column, mask=column < size, other=0.0).to(tl.float32)
    normed, _ = _normed(x_, there, size, eps)
    tl.store(out + where, (normed * weight_ + bias_).to(out.dtype.element_ty), mask=there)


@kernel
def backward_kernel(
    grad,
    grad_total,
    x,
    weight,
    grad_x,
    grad_added,
    grad_weight,
    grad_bias,
    rows,
    eps,
    size: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """Gradients of what was normed, and this program's part of weight's and bias's.

    With n the normed x, r one over its standard deviation and g = grad weight,

        x' = r (g - mean(g) - n mean(g n)),   weight' = sum grad n,   bias' = sum grad

    Where x is a sum, grad_total is its gradient from elsewhere, and x' + grad_total that of both that were added.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, D)[None, :]
    weight_ = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((1, D), tl.float32)
    bias_sum = tl.zeros((1, D), tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0).to(tl.int64) * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        there, where = (row < rows) & (column < size), row * size + column
        grad_ = tl.load(grad + where, mask=there, other=0.0).to(tl.float32)
        normed, root = _normed(tl.load(x + where, mask=there, other=0.0).to(tl.float32), there, size, eps)
        weight_sum += tl.sum(grad_ * normed, 0)[None, :]
        bias_sum += tl.sum(grad_, 0)[None, :]
        g = grad_ * weight_
        level = (tl.sum(g, 1) / size)[:, None]
        along = (tl.sum(g * normed, 1) / size)[:, None]
        bar_x = root * (g - level - normed * along)
        if ADDS:
            bar_x += tl.load(grad_total + where, mask=there, other=0.0).to(tl.float32)
            tl.store(grad_added + where, bar_x.to(grad_added.dtype.element_ty), mask=there)
        tl.store(grad_x + where, bar_x.to(grad_x.dtype.element_ty), mask=there)
    tl.store(grad_weight + program * size + column, weight_sum, mask=column < size)
    tl.store(grad_bias + program * size + column, bias_sum, mask=column < size)
