"""Grouped products as Triton kernels, for the GPUs and dtypes that torch's own kernel does not take.

Each group's rows are cut into tiles of ``ROWS``, the last one short; a program finds its tile from the groups' ends
where they are, on the device. There are at most T / ROWS + E tiles, whatever the groups, so that the grid is known
without reading anything back. A row's result does not depend on its place in a tile nor on the rows beside it.

Sums are float32. float32 rows are multiplied as torch multiplies matrices, in TF32 only where
``torch.set_float32_matmul_precision`` allows it.
"""

import torch
import triton
from torch import Tensor

from resnet_bk.ops.grouped_kernels import mm_kernel, outer_kernel

ROWS = 64
# Programs that keep a large GPU busy: sums over rows are split until there are about so many.
ENOUGH_PROGRAMS = 512
# Rows of a group below which splitting its sum gains nothing.
ROWS_PER_SPLIT = 256


def grouped_mm(x_TK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> Tensor:
    """y_t = x_t w_e for the group e of row t, ``(T, M)``."""
    (rows, width_in), (groups, _, width_out) = x_TK.shape, w_EKM.shape
    y_TM = x_TK.new_empty(rows, width_out)
    if y_TM.numel() == 0:
        return y_TM
    if x_TK.dtype == torch.float32 and w_EKM.stride(2) != 1:
        # Without tensor cores the kernel is as fast as it reads w, and a copy costs less than reading it across rows.
        w_EKM = w_EKM.contiguous()
    columns = _tile(width_out, 128 if x_TK.dtype.itemsize < 4 else 64)
    grid = (triton.cdiv(rows, ROWS) + groups, triton.cdiv(width_out, columns))
    mm_kernel[grid](
        x_TK,
        w_EKM,
        y_TM,
        ends_E,
        groups,
        width_in,
        width_out,
        *x_TK.stride(),
        *w_EKM.stride(),
        y_TM.stride(0),
        GROUPS=triton.next_power_of_2(groups),
        ROWS=ROWS,
        COLUMNS=columns,
        INNER=_tile(width_in, 64 if x_TK.dtype.itemsize < 4 else 32),
        PRECISION=_precision(),
        num_warps=4,
        num_stages=3,
    )
    return y_TM


def grouped_outer(x_TK: Tensor, g_TM: Tensor, ends_E: Tensor) -> Tensor:
    """For each group the sum of x_t g_t^T over its rows, ``(E, K, M)``."""
    (rows, width_in), width_out, groups = x_TK.shape, g_TM.shape[1], ends_E.shape[0]
    tile_in, tile_out = _tile(width_in, 64), _tile(width_out, 64)
    tiles = triton.cdiv(width_in, tile_in) * triton.cdiv(width_out, tile_out)
    # Few and small matrices: pieces of each sum run side by side and are added afterwards, in an order that is fixed.
    splits = max(1, min(ENOUGH_PROGRAMS // (groups * tiles), rows // (groups * ROWS_PER_SPLIT)))
    sums_SEKM = torch.empty(
        splits, groups, width_in, width_out, dtype=torch.float32 if splits > 1 else x_TK.dtype, device=x_TK.device
    )
    outer_kernel[(tiles, groups, splits)](
        x_TK,
        g_TM,
        sums_SEKM,
        ends_E,
        width_in,
        width_out,
        *x_TK.stride(),
        *g_TM.stride(),
        splits,
        TILE_IN=tile_in,
        TILE_OUT=tile_out,
        ROWS=32,
        PRECISION=_precision(),
        num_warps=4,
        num_stages=3,
    )
    return sums_SEKM.sum(0).to(x_TK.dtype) if splits > 1 else sums_SEKM[0]


def _tile(width: int, largest: int) -> int:
    """A tile no wider than it has to be; 16 is the least that the GPU multiplies."""
    return int(min(largest, max(16, triton.next_power_of_2(width))))


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
