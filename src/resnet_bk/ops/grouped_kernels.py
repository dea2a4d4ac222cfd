"""The Triton kernels behind ``grouped_gpu``, which explains them.

They are written in Triton's language, which only looks like Python to a type checker.
"""

import triton.language as tl

from resnet_bk.ops.kernels import kernel


@kernel
def mm_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    ends_ptr,
    groups,
    width_in,
    width_out,
    x_row,
    x_column,
    w_group,
    w_row,
    w_column,
    y_row,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Which group's tile this is: the first whose tiles, with those of all before it, are more than this one's number.
    tile = tl.program_id(0)
    index = tl.arange(0, GROUPS)
    ends = tl.load(ends_ptr + index, mask=index < groups, other=0)
    starts = tl.load(ends_ptr + index - 1, mask=(index > 0) & (index < groups), other=0)
    tiles = tl.where(index < groups, tl.cdiv(ends - starts, ROWS), 0)
    tiles_so_far = tl.cumsum(tiles, 0)
    group = tl.sum((tiles_so_far <= tile).to(tl.int32))
    if group >= groups:
        return
    mine = index == group
    first_tile = tl.sum(tl.where(mine, tiles_so_far - tiles, 0))
    start = tl.sum(tl.where(mine, starts, 0)) + (tile - first_tile) * ROWS
    end = tl.sum(tl.where(mine, ends, 0))

    rows = (start + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    x_at = x_ptr + rows[:, None] * x_row + inner[None, :] * x_column
    w_at = w_ptr + group.to(tl.int64) * w_group + inner[:, None] * w_row + columns[None, :] * w_column
    in_rows, in_columns = rows[:, None] < end, columns[None, :] < width_out
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, width_in, INNER):
        x = tl.load(x_at, mask=in_rows & (inner[None, :] < width_in - first), other=0.0)
        w = tl.load(w_at, mask=in_columns & (inner[:, None] < width_in - first), other=0.0)
        total = tl.dot(x, w, total, input_precision=PRECISION)
        x_at += INNER * x_column
        w_at += INNER * w_row
    y_at = y_ptr + rows[:, None] * y_row + columns[None, :]
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=in_rows & in_columns)


@kernel
def outer_kernel(
    x_ptr,
    g_ptr,
    sums_ptr,
    ends_ptr,
    width_in,
    width_out,
    x_row,
    x_column,
    g_row,
    g_column,
    splits,
    TILE_IN: tl.constexpr,
    TILE_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_out = tl.cdiv(width_out, TILE_OUT)
    group, split = tl.program_id(1), tl.program_id(2)
    ins = (tl.program_id(0) // tiles_out) * TILE_IN + tl.arange(0, TILE_IN)
    outs = (tl.program_id(0) % tiles_out) * TILE_OUT + tl.arange(0, TILE_OUT)
    group_start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
    group_end = tl.load(ends_ptr + group)
    share = tl.cdiv(tl.cdiv(group_end - group_start, splits), ROWS) * ROWS
    start = group_start + split * share
    end = tl.minimum(start + share, group_end)

    total = tl.zeros((TILE_IN, TILE_OUT), dtype=tl.float32)
    for first in range(start, end, ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        x = tl.load(
            x_ptr + rows[None, :] * x_row + ins[:, None] * x_column,
            mask=(rows[None, :] < end) & (ins[:, None] < width_in),
            other=0.0,
        )
        g = tl.load(
            g_ptr + rows[:, None] * g_row + outs[None, :] * g_column,
            mask=(rows[:, None] < end) & (outs[None, :] < width_out),
            other=0.0,
        )
        total = tl.dot(x, g, total, input_precision=PRECISION)
    # Matrix number split x E + group of all that are written, one after the other.
    matrix = (split * tl.num_programs(1) + group).to(tl.int64)
    sums_at = sums_ptr + (matrix * width_in + ins[:, None]) * width_out + outs[None, :]
    tl.store(sums_at, total.to(sums_ptr.dtype.element_ty), mask=(ins[:, None] < width_in) & (outs[None, :] < width_out))
