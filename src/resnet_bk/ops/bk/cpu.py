"""The sweeps compiled for the CPU (numba): vectorised over chains, rows and heads shared out among threads, of
which there are as many as torch has.

Many heads fill a vector register as they lie in memory, and their chains are swept in order. With few heads, rows are
cut into chunks which are swept side by side, each from a start that is proven or composed (``cpu_chunk_kernels``). How
they are cut depends on the shape alone, so that results do not depend on the number of threads. Where a proof needs
more tokens than a chunk has, as for a tiny eta, rows are swept in order after all, as many as there are side by side.

Complex numbers are pairs of reals in the last axis. The formulas are in ``scan``; those of the tunnelling regime, whose
memory is long, are carried in double precision whatever the data.

Kernels are compiled at their first call and kept in numba's cache beside this file (or in the user's cache folder).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnet_bk.crew import together
from resnet_bk.heap import prefer_large_pages
from resnet_bk.ops.bk import cpu_chunk_kernels as chunk_kernels
from resnet_bk.ops.bk.cpu_kernels import (
    Piece,
    Share,
    causal_adjoint_and_bonds_kernel,
    causal_adjoint_kernel,
    causal_kernel,
    diagonal_kernel,
    tunnel_adjoint_kernel,
    tunnel_kernel,
)
from resnet_bk.threads import ELEMENTS_WORTH_A_THREAD, even_pieces, in_threads

Array = NDArray[np.floating[Any]]

LANES_WORTH_A_VECTOR = 16
# A thread begins after as long as a sweep takes for so many; tunnelling, in double precision, takes longer for each.
SITES_WORTH_A_THREAD = 1 << 19
PIECES_OF_A_THREAD = 4
# Rows are cut until there are this many lanes (heads of chunks), or chunks would be shorter than this.
WANTED_LANES, SHORTEST_CHUNK = 1024, 256
# Composing maps costs as much as sweeping does: what fills a register in double precision stays whole.
TUNNEL_LANES_LEFT_WHOLE, WANTED_TUNNEL_LANES, TUNNEL_LANES_IN_BLOCK = 8, 128, 32
HUGE_PAGES_FROM = 1 << 25
# From here on m = 1 to the last digit.
LARGEST_GAP, LARGEST_GAP_FLOAT32 = 1e17, 1e8


def causal(v_BNH: Tensor, shift_H2: Tensor, bonds: Tensor, state_BH2: Tensor, *, reverse: bool = False) -> Tensor:
    """l_i for all i, ``(B, N, H, 2)``; ``reverse`` sweeps from the right end."""
    if not reverse and bonds.dim() == 1 and v_BNH.shape[2] < LANES_WORTH_A_VECTOR:
        out_BNH2 = _causal_in_chunks(v_BNH.to(shift_H2.dtype), shift_H2, bonds, state_BH2)
        if out_BNH2 is not None:
            return out_BNH2
    v_RNL, restore = _lanes(v_BNH.to(shift_H2.dtype))
    out_RNL2 = _new(*v_RNL.shape, 2, dtype=v_RNL.dtype)
    _share(
        causal_kernel,
        v_RNL.shape,
        _array(v_RNL),
        _complex_array(_per_lane(shift_H2, v_BNH, v_RNL)),
        *_bond_arrays(bonds, v_BNH, v_RNL),
        _complex_array(state_BH2.reshape(v_RNL.shape[0], v_RNL.shape[2], 2)),
        _complex_array(out_RNL2),
        reverse,
        False,  # not kept near: who reads it comes later
    )
    return restore(out_RNL2)


def causal_adjoint(
    grad_BNH2: Tensor, l_BNH2: Tensor, bonds: Tensor, state_BH2: Tensor, *, wants_bonds: bool, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of v ``(B, N, H)``, shift ``(H, 2)``, bonds (as given; empty if not wanted), state ``(B, H, 2)``."""
    if not reverse and not wants_bonds and bonds.dim() == 1 and l_BNH2.shape[2] < LANES_WORTH_A_VECTOR:
        gradients = _causal_adjoint_in_chunks(grad_BNH2, l_BNH2, bonds)
        if gradients is not None:
            return gradients
    like_BNH = l_BNH2[..., 0]
    l_RNL, restore = _lanes(l_BNH2)
    grad_RNL, _ = _lanes(grad_BNH2)
    rows, length, lanes = l_RNL.shape[:3]
    v_bar_RNL = _new(rows, length, lanes, dtype=l_RNL.dtype)
    sums_RL3 = np.zeros((rows, lanes, 3))
    state_bar_RL2 = torch.empty(rows, lanes, 2, dtype=l_RNL.dtype)
    per_token = wants_bonds and bonds.dim() == 3
    bonds_bar_RNL = torch.zeros((rows, length, lanes) if per_token else (0, 0, 0), dtype=l_RNL.dtype)
    _share(
        causal_adjoint_and_bonds_kernel if wants_bonds else causal_adjoint_kernel,
        (rows, length, lanes),
        _complex_array(grad_RNL),
        _complex_array(l_RNL),
        *_bond_arrays(bonds, like_BNH, l_RNL),
        _complex_array(state_BH2.reshape(rows, lanes, 2)),
        _array(v_bar_RNL),
        sums_RL3,
        _array(bonds_bar_RNL),
        _complex_array(state_bar_RL2),
        reverse,
    )
    sums_H3 = sums_RL3.reshape(-1, like_BNH.shape[2], 3).sum(0)
    if not wants_bonds:
        bonds_bar = bonds.new_empty(0, *bonds.shape[1:])
    elif per_token:
        bonds_bar = restore(bonds_bar_RNL)
    else:
        bonds_bar = _tensor(sums_H3[:, 2], l_BNH2.dtype)
    return restore(v_bar_RNL), _tensor(sums_H3[:, :2], l_BNH2.dtype), bonds_bar, state_bar_RL2.view(state_BH2.shape)


def bidirectional(v_BNH: Tensor, shift_H2: Tensor, bonds: Tensor) -> Tensor:
    """G_ii of the whole chain, ``(B, N, H, 2)``."""
    v_RNL, restore = _lanes(v_BNH.to(shift_H2.dtype))
    rows, length, lanes = v_RNL.shape
    out_RNL2 = _new(rows, length, lanes, 2, dtype=v_RNL.dtype)
    out = _complex_array(out_RNL2)
    _run(
        diagonal_kernel,
        v_RNL.shape,
        _array(v_RNL),
        _complex_array(_per_lane(shift_H2, v_BNH, v_RNL)),
        *_bond_arrays(bonds, v_BNH, v_RNL),
        np.zeros((rows, lanes), dtype=out.dtype),
        out,
    )
    return restore(out_RNL2)


def tunnel(w_BNH: Tensor, state_BH: Tensor) -> Tensor:
    """log l_i = -log1p(s_i), ``(B, N, H)`` in the state's type."""
    w_BNH = w_BNH.to(state_BH.dtype).contiguous()
    s_BNH = _new(*w_BNH.shape, dtype=w_BNH.dtype)
    if _lanes_lie_apart(w_BNH):
        cut = _tunnel_cut(w_BNH)
        largest_gap = LARGEST_GAP if state_BH.dtype == torch.float64 else LARGEST_GAP_FLOAT32
        w, entering = _array(w_BNH), _array(state_BH).astype(np.float64)
        if cut.chunks > 1:
            maps = np.empty((cut.groups, w.shape[2], 4))
            cut.run(chunk_kernels.tunnel_maps_kernel, w, maps)
            entering = chunk_kernels.apply_maps_kernel(maps, entering, cut.chunks)
        cut.run(chunk_kernels.tunnel_chunk_kernel, w, entering, _array(s_BNH), w.dtype.type(largest_gap))
    else:
        arrays = _array(w_BNH), _array(state_BH), _array(s_BNH)
        _run(tunnel_kernel, w_BNH.shape, *arrays, worth_a_thread=ELEMENTS_WORTH_A_THREAD)
    return s_BNH.log1p_().neg_()


def tunnel_adjoint(grad_BNH: Tensor, log_l_BNH: Tensor) -> Tensor:
    """Gradient of w ``(B, N, H)``; its first site is also that of the initial m."""
    change_BNH = torch.expm1(log_l_BNH, out=_new(*log_l_BNH.shape, dtype=log_l_BNH.dtype))  # l - 1
    grad, change = _array(grad_BNH), _array(change_BNH)
    out_BNH = _new(*change_BNH.shape, dtype=change_BNH.dtype)
    if _lanes_lie_apart(log_l_BNH):
        cut = _tunnel_cut(change_BNH)
        entering = np.zeros((cut.groups, grad.shape[2]))
        if cut.chunks > 1:
            maps = np.empty((cut.groups, grad.shape[2], 2))
            cut.run(chunk_kernels.tunnel_adjoint_maps_kernel, grad, change, maps)
            entering = chunk_kernels.apply_adjoint_maps_kernel(maps, grad.shape[0], cut.chunks)
        cut.run(chunk_kernels.tunnel_adjoint_chunk_kernel, grad, change, entering, _array(out_BNH))
    else:
        arrays = grad, change, _array(out_BNH)
        _run(tunnel_adjoint_kernel, grad.shape, *arrays, worth_a_thread=ELEMENTS_WORTH_A_THREAD)
    return out_BNH


def _causal_in_chunks(v_BNH: Tensor, shift_H2: Tensor, bonds_H: Tensor, state_BH2: Tensor) -> Tensor | None:
    """``causal``, or None where chunks are too short."""
    cut = _Cut.of(v_BNH, WANTED_LANES)
    out_BNH2 = _new(*v_BNH.shape, 2, dtype=shift_H2.dtype)
    proven = cut.run(
        chunk_kernels.causal_chunk_kernel,
        _array(v_BNH),
        _array(shift_H2),
        _array(bonds_H),
        _array(state_BH2),
        _complex_array(out_BNH2),
        _half_a_unit(shift_H2),
    )
    return out_BNH2 if all(proven) else None


def _causal_adjoint_in_chunks(
    grad_BNH2: Tensor, l_BNH2: Tensor, bonds_H: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """``causal_adjoint`` without the bonds' gradient, or None where chunks are too short."""
    v_bar_BNH = _new(*l_BNH2.shape[:3], dtype=l_BNH2.dtype)
    cut = _Cut.of(v_bar_BNH, WANTED_LANES)
    shift_bar = torch.zeros(cut.groups, *l_BNH2.shape[2:], dtype=torch.float64)
    state_bar_BH2 = torch.empty_like(l_BNH2[:, 0], memory_format=torch.contiguous_format)
    proven = cut.run(
        chunk_kernels.causal_adjoint_chunk_kernel,
        _complex_array(grad_BNH2),
        _complex_array(l_BNH2),
        _array(bonds_H),
        _array(v_bar_BNH),
        _array(shift_bar),
        _array(state_bar_BH2),
        _half_a_unit(l_BNH2),
    )
    if not all(proven):
        return None
    return v_bar_BNH, shift_bar.sum(0).to(l_BNH2.dtype), bonds_H.new_empty(0), state_bar_BH2


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """How the rows of few heads are cut: chunks of a row, their tokens, and groups and blocks of ``chunk_kernels``."""

    chunks: int
    chunk: int
    groups: int
    groups_in_block: int
    lanes_in_block: int

    @staticmethod
    def of(x_BNH: Tensor, wanted_lanes: int, lanes_in_block: int = chunk_kernels.LANES) -> "_Cut":
        rows, length, heads = x_BNH.shape
        chunks = max(1, min(wanted_lanes // max(1, rows * heads), length // SHORTEST_CHUNK))
        chunk = length
        if chunks > 1:
            unit = chunk_kernels.TOKENS
            chunk = -(-length // (chunks * unit)) * unit
            chunks = -(-length // chunk)
        groups_in_block = max(1, lanes_in_block // heads)
        return _Cut(
            chunks=chunks,
            chunk=chunk,
            groups=rows * chunks,
            groups_in_block=groups_in_block,
            lanes_in_block=groups_in_block * heads,
        )

    def run(self, kernel: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Calls a kernel for all blocks; what it returned for each piece."""
        blocks = -(-self.groups // self.groups_in_block)
        return _run(
            kernel,
            (blocks, self.chunk, self.lanes_in_block),
            *arguments,
            self.chunks,
            self.chunk,
            self.groups_in_block,
            whole_rows=True,
            worth_a_thread=ELEMENTS_WORTH_A_THREAD,
        )


def _lanes_lie_apart(x_BNH: Tensor) -> bool:
    """Whether tokens of several rows or chunks are worth bringing together for a vector in double precision."""
    rows, _, heads = x_BNH.shape
    return heads < (TUNNEL_LANES_LEFT_WHOLE if rows == 1 else LANES_WORTH_A_VECTOR)


def _tunnel_cut(x_BNH: Tensor) -> _Cut:
    whole = x_BNH.shape[0] * x_BNH.shape[2] >= TUNNEL_LANES_LEFT_WHOLE
    return _Cut.of(x_BNH, 1 if whole else WANTED_TUNNEL_LANES, TUNNEL_LANES_IN_BLOCK)


def _lanes(x_BN: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Rows and lanes to sweep over, contiguous, and the way back.

    With few heads, rows become lanes of one row, ``(1, N, B x H, ...)``: a vector register then holds many rows.
    """
    batch_size, length, heads = x_BN.shape[:3]
    if heads >= LANES_WORTH_A_VECTOR or batch_size == 1:
        return x_BN.contiguous(), lambda y: y
    rest = x_BN.shape[3:]
    lanes = x_BN.transpose(0, 1).reshape(1, length, batch_size * heads, *rest)

    def restore(y: Tensor) -> Tensor:
        return y.view(length, batch_size, heads, *y.shape[3:]).transpose(0, 1).contiguous()

    return lanes.contiguous(), restore


def _per_lane(per_head: Tensor, like_BNH: Tensor, lanes_RNL: Tensor) -> Tensor:
    repeats = lanes_RNL.shape[2] // like_BNH.shape[2]
    if repeats == 1:
        return per_head
    return per_head.repeat(repeats, *[1] * (per_head.dim() - 1))


def _bond_arrays(bonds: Tensor, like_BNH: Tensor, lanes_RNL: Tensor) -> tuple[Array, int, int]:
    """Bonds as (1 or rows, 1 or N, lanes), and by what row and token are multiplied to find theirs."""
    if bonds.dim() == 1:
        return _array(_per_lane(bonds, like_BNH, lanes_RNL).view(1, 1, -1)), 0, 0
    return _array(_lanes(bonds)[0]), 1, 1


def _new(*shape: int, dtype: torch.dtype) -> Tensor:
    """An empty tensor, of large pages where it is large: those take a fraction of the time to get.

    Below ``HUGE_PAGES_FROM`` the C library reuses memory, which is there already.
    """
    x = torch.empty(shape, dtype=dtype)
    if x.nbytes >= HUGE_PAGES_FROM:
        prefer_large_pages(x.data_ptr(), x.nbytes)
    return x


def _array(x: Tensor) -> Array:
    array: Array = x.detach().contiguous().numpy()
    return array


def _tensor(array: Array, dtype: torch.dtype) -> Tensor:
    """A tensor of its own, made of a small array: torch's operations take longer than what they would do."""
    return torch.from_numpy(array.astype(np.float64 if dtype == torch.float64 else np.float32))


def _complex_array(x_2: Tensor) -> Array:
    """Pairs as complex numbers."""
    return _array(torch.view_as_complex(x_2.contiguous()))


def _half_a_unit(like: Tensor) -> float:
    """Half of the spacing of numbers at 1, halved again for safety: 2^-25 in float32."""
    eps: Any = torch.finfo(like.dtype).eps
    return float(eps) / 4


def _run(
    kernel: Callable[..., Any],
    shape: tuple[int, ...] | torch.Size,
    *arguments: Any,
    whole_rows: bool = False,
    worth_a_thread: int = SITES_WORTH_A_THREAD,
) -> list[Any]:
    """Calls a kernel for all rows and lanes, in the pieces that its threads and the work are worth."""
    return in_threads(partial(kernel, *arguments), _pieces(shape, whole_rows, worth_a_thread))


def _share(kernel: Callable[..., Any], shape: tuple[int, ...] | torch.Size, *arguments: Any) -> None:
    """Calls a kernel that takes a ``Share``, in the threads that the work is worth."""
    pieces = _pieces(shape)
    share = Share.of(*pieces)
    together(lambda cells: kernel(*arguments, share, cells), len(pieces))


def _pieces(
    shape: tuple[int, ...] | torch.Size, whole_rows: bool = False, worth_a_thread: int = SITES_WORTH_A_THREAD
) -> list[Piece]:
    """(row begin, row end, lane begin, lane end) of each piece: whole rows where there are enough, else lanes.

    Rows are some more pieces than threads, so that all end together although one began late or was interrupted.
    """
    rows, length, lanes = shape[:3]
    worth = max(1, rows * length * lanes // worth_a_thread)
    threads = min(torch.get_num_threads(), worth)
    if threads == 1 or whole_rows or rows >= threads:
        pieces = 1 if threads == 1 else min(PIECES_OF_A_THREAD * threads, worth, rows)
        return [(begin, end, 0, lanes) for begin, end in even_pieces(rows, pieces)]
    vectors = max(1, lanes // LANES_WORTH_A_VECTOR)
    pieces = min(threads, vectors)
    cuts = [vectors * piece // pieces * LANES_WORTH_A_VECTOR for piece in range(pieces)] + [lanes]
    return [(0, rows, begin, end) for begin, end in pairwise(cuts)]
