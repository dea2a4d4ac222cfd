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
    tiles,
    GOES_ON: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """Gradients of what was normed, and this program's part of weight's and bias's.

    With n the normed x, r one over its standard deviation and g = grad weight,

        x' = r (g - mean(g) - n mean(g n)),   weight' = sum grad n,   bias' = sum grad

    grad_total is x's gradient from elsewhere, if x GOES_ON; if it is a sum, both that were added have its gradient.
    """
    program = tl.program_id(0)
    column = tl.arange(0, D)[None, :]
    weight_ = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    # Row by row of a tile: adding up its rows inside the loop would have threads wait for each other.
    weight_sums = tl.zeros((ROWS, D), tl.float32)
    bias_sums = tl.zeros((ROWS, D), tl.float32)
    for tile in range(program, tiles, tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        there, where = (row < rows) & (column < size), row * size + column
        grad_ = tl.load(grad + where, mask=there, other=0.0).to(tl.float32)
        normed, root = _normed(tl.load(x + where, mask=there, other=0.0).to(tl.float32), there, size, eps)
        weight_sums += grad_ * normed
        bias_sums += grad_
        g = grad_ * weight_
        level = (tl.sum(g, 1) / size)[:, None]
        along = (tl.sum(g * normed, 1) / size)[:, None]
        bar_x = root * (g - level - normed * along)
        if GOES_ON:
            bar_x += tl.load(grad_total + where, mask=there, other=0.0).to(tl.float32)
        if ADDS:
            tl.store(grad_added + where, bar_x.to(grad_added.dtype.element_ty), mask=there)
        tl.store(grad_x + where, bar_x.to(grad_x.dtype.element_ty), mask=there)
    part = program * size + column
    tl.store(grad_weight + part, tl.sum(weight_sums, 0)[None, :], mask=column < size)
    tl.store(grad_bias + part, tl.sum(bias_sums, 0)[None, :], mask=column < size)
