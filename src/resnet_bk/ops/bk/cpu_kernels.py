"""The numba kernels behind ``cpu``: each sweeps the rows and lanes of a range, complex numbers in pairs.

The formulas are in ``scan``. ``bonds`` are ``(1 or rows, 1 or N, lanes)``, found at (row x bond_row,
token x bond_token).

Threads that call a kernel with the same ``Share`` of the work take its pieces one by one, without Python's lock.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from resnet_bk.atomics import add, announce, nobody
from resnet_bk.ops.bk.cpu_vectors import (
    STREAM_ALIGNMENT,
    align_stack,
    at,
    fence,
    load,
    load_complex,
    load_complex_from_the_end,
    load_from_the_end,
    multiply_add,
    splat,
    store,
    store_complex,
    stream,
    stream_complex,
)

# Contraction to fused multiply-adds and free signs of zero; nothing that would reorder or assume finite numbers.
# numpy's error model: a division by zero is infinite and raises nothing, which lets loops vectorise.
_compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz"})

# What a register holds is swept at once, of as many lanes as there are; a last few by themselves.
LANES = 64, 16, 4, 1
TOKENS_PER_PARTIAL_SUM = 256
# What a processor's last cache may hold, and what a core's own: bytes.
STREAMED_FROM, KEPT_NEAR = 1 << 25, 1 << 20


@_compiled
def _streams(out, lane, lanes, moved):
    """Whether results are better written past the caches, where a sweep moves so many bytes."""
    odd = (np.int64(out.ctypes.data) | out.strides[0] | out.strides[1] | lane * out.itemsize) % STREAM_ALIGNMENT
    return odd == 0 and lanes * out.itemsize >= STREAM_ALIGNMENT and moved >= STREAMED_FROM


@_compiled
def _bytes(array):
    return array.size * array.itemsize


Piece = tuple[int, int, int, int]  # row begin, row end, lane begin, lane end


@dataclass(frozen=True)
class Share:
    """What there is to do: ``pieces`` for each number of ``LANES``, (row begin, row end, first lane), and how many of
    them have been ``taken``."""

    pieces: tuple[NDArray[np.int64], ...]
    taken: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(LANES), np.int64))

    @staticmethod
    def of(*pieces: Piece) -> "Share":
        """Pieces of any number of lanes."""
        return Share(_in_vectors(pieces))


@lru_cache(maxsize=256)
def _in_vectors(pieces: tuple[Piece, ...]) -> tuple[NDArray[np.int64], ...]:
    found: dict[int, list[tuple[int, int, int]]] = {lanes: [] for lanes in LANES}
    for row_begin, row_end, lane_begin, lane_end in pieces:
        lane = lane_begin
        for lanes in LANES:
            while lane_end - lane >= lanes:
                found[lanes].append((row_begin, row_end, lane))
                lane += lanes
    return tuple(np.array(found[lanes], np.int64).reshape(-1, 3) for lanes in LANES)


def _of_all_lanes(swept: Callable[[int], Any]) -> Callable[..., None]:
    """A kernel ``(*arguments, share, cells)`` of what ``swept`` compiles for so many lanes: sweeps with ``(*arguments,
    cells, pieces, taken, number)``, which announce to the cells that helpers may begin and take pieces until all are
    taken, which is counted under the number."""
    sweeps = [swept(lanes) for lanes in LANES]

    def kernel(*arguments: Any) -> None:
        *arrays, share, cells = arguments
        for number, (sweep, pieces) in enumerate(zip(sweeps, share.pieces, strict=True)):
            if len(pieces):
                sweep(*arrays, cells, pieces, share.taken, number)

    return kernel


@_compiled
def _next(pieces, taken, number):
    """Where the next piece is that nobody has taken, and whether there is one."""
    piece = add(taken, number, 1)
    if piece >= len(pieces):
        return 0, 0, 0, False
    return pieces[piece, 0], pieces[piece, 1], pieces[piece, 2], True


def _causal(lanes):
    """l_i, swept from the left, or from the right in ``reverse``; ``kept`` near where it is read next."""

    @_compiled
    def sweep(v, shift, bonds, bond_row, bond_token, state, out, reverse, kept, cells, pieces, taken, number):
        align_stack()
        length, ones = v.shape[1], splat(v.dtype.type(1), lanes)
        announce(cells)
        row_begin, row_end, lane, found = _next(pieces, taken, number)
        while found:
            streams = not kept and _streams(out, lane, lanes, _bytes(v) + _bytes(out))
            shift_re, shift_im = load_complex(at(shift, (lane,)), lanes)
            for row in range(row_begin, row_end):
                l_re, l_im = load_complex(at(state, (row, lane)), lanes)
                for step in range(length):
                    n = length - 1 - step if reverse else step
                    # Read from the right end, a site's earlier neighbour is n + 1, and their bond is stored there.
                    bond_index = min(n + 1, length - 1) if reverse else n
                    t, v_n = (
                        load(at(bonds, (row * bond_row, bond_index * bond_token, lane)), lanes),
                        at(v, (row, n, lane)),
                    )
                    site = load_from_the_end(v_n, lanes) if reverse else load(v_n, lanes)
                    re, im = multiply_add(-t, l_re, site + shift_re), multiply_add(-t, l_im, shift_im)
                    scale = ones / multiply_add(re, re, im * im)
                    l_re, l_im = re * scale, -im * scale
                    if streams:
                        stream_complex(at(out, (row, n, lane)), l_re, l_im)
                    else:
                        store_complex(at(out, (row, n, lane)), l_re, l_im)
            if streams:
                fence()
            row_begin, row_end, lane, found = _next(pieces, taken, number)

    return sweep


def _onto_diagonal(lanes):
    """Turns ``out`` from l_i into G_ii = 1 / (a_i - t_i r_{i+1} - t_{i-1} l_{i-1}), sweeping from the right."""

    @_compiled
    def sweep(v, shift, bonds, bond_row, bond_token, out, cells, pieces, taken, number):
        align_stack()
        ones, zeros = splat(v.dtype.type(1), lanes), splat(v.dtype.type(0), lanes)
        announce(cells)
        row_begin, row_end, lane, found = _next(pieces, taken, number)
        while found:
            shift_re, shift_im = load_complex(at(shift, (lane,)), lanes)
            for row in range(row_begin, row_end):
                # The sweep begins without a neighbour, and ends without one.
                r_re, r_im, right_t = zeros, zeros, zeros
                for n in range(v.shape[1] - 1, -1, -1):
                    # What the sweep from the right divides by.
                    re = multiply_add(-right_t, r_re, load_from_the_end(at(v, (row, n, lane)), lanes) + shift_re)
                    im = multiply_add(-right_t, r_im, shift_im)
                    scale = ones / multiply_add(re, re, im * im)
                    r_re, r_im = re * scale, -im * scale
                    right_t = load(at(bonds, (row * bond_row, n * bond_token, lane)), lanes)
                    if n > 0:
                        l_re, l_im = load_complex_from_the_end(at(out, (row, n - 1, lane)), lanes)
                        re, im = multiply_add(-right_t, l_re, re), multiply_add(-right_t, l_im, im)
                        scale = ones / multiply_add(re, re, im * im)
                    store_complex(at(out, (row, n, lane)), re * scale, -im * scale)
            row_begin, row_end, lane, found = _next(pieces, taken, number)

    return sweep


def _causal_adjoint(lanes, *, wants_bonds):
    """abar_i = -conj(l_i^2) (g_i - t_i abar_{i+1}).

    ``sums`` (rows, lanes, 3) in double precision, of abar's real and imaginary parts and of the bonds' gradients, are
    added to. ``bonds_bar`` is each token's, (rows, N, lanes), or empty.
    """

    @_compiled
    def sweep(
        grad,
        l,
        bonds,
        bond_row,
        bond_token,
        state,
        v_bar,
        sums,
        bonds_bar,
        state_bar,
        reverse,
        cells,
        pieces,
        taken,
        number,
    ):
        align_stack()
        length, zeros = l.shape[1], splat(v_bar.dtype.type(0), lanes)
        numbers = np.empty(lanes, v_bar.dtype)
        announce(cells)
        row_begin, row_end, lane, found = _next(pieces, taken, number)
        while found:
            streams = _streams(v_bar, lane, lanes, _bytes(grad) + _bytes(l) + _bytes(v_bar))
            for row in range(row_begin, row_end):
                abar_re, abar_im = zeros, zeros
                for begin in range(0, length, TOKENS_PER_PARTIAL_SUM):
                    part_re, part_im, part_bond = zeros, zeros, zeros
                    for step in range(begin, min(begin + TOKENS_PER_PARTIAL_SUM, length)):
                        n = step if reverse else length - 1 - step
                        # The bond to the site before it in this sweep, whose abar is at hand; the first one has none.
                        bond_index = n if reverse else min(n + 1, length - 1)
                        l_n, grad_n = at(l, (row, n, lane)), at(grad, (row, n, lane))
                        if reverse:
                            (re, im), (grad_re, grad_im) = load_complex(l_n, lanes), load_complex(grad_n, lanes)
                        else:
                            re, im = load_complex_from_the_end(l_n, lanes)
                            grad_re, grad_im = load_complex_from_the_end(grad_n, lanes)
                        t = load(at(bonds, (row * bond_row, bond_index * bond_token, lane)), lanes)
                        square_re, square_im = multiply_add(im, im, -(re * re)), re * im + re * im
                        lambda_re, lambda_im = multiply_add(-t, abar_re, grad_re), multiply_add(-t, abar_im, grad_im)
                        abar_re = multiply_add(square_re, lambda_re, -(square_im * lambda_im))
                        abar_im = multiply_add(square_re, lambda_im, square_im * lambda_re)
                        if streams:
                            stream(at(v_bar, (row, n, lane)), abar_re)
                        else:
                            store(at(v_bar, (row, n, lane)), abar_re)
                        part_re, part_im = part_re + abar_re, part_im + abar_im
                        if wants_bonds:
                            earlier = n + 1 if reverse else n - 1
                            inside = 0 <= earlier < length
                            before = at(l, (row, earlier, lane)) if inside else at(state, (row, lane))
                            if reverse:
                                before_re, before_im = load_complex(before, lanes)
                            else:
                                before_re, before_im = load_complex_from_the_end(before, lanes)
                            bond_bar = -multiply_add(before_re, abar_re, before_im * abar_im)
                            part_bond = part_bond + bond_bar
                            # The mirrored sweep has no bond before its first site.
                            if bonds_bar.size and (inside or not reverse):
                                store(at(bonds_bar, (row, n + 1 if reverse else n, lane)), bond_bar)
                    _add_to(sums, row, lane, 0, part_re, numbers)
                    _add_to(sums, row, lane, 1, part_im, numbers)
                    if wants_bonds:
                        _add_to(sums, row, lane, 2, part_bond, numbers)
                t = load(at(bonds, (row * bond_row, 0, lane)), lanes)
                store_complex(at(state_bar, (row, lane)), -t * abar_re, -t * abar_im)
            if streams:
                fence()
            row_begin, row_end, lane, found = _next(pieces, taken, number)

    return sweep


@_compiled
def _add_to(sums, row, lane, index, part, numbers):
    """Adds a vector's numbers to sums in double precision, by way of an array of as many."""
    store(at(numbers, (0,)), part)
    for h in range(numbers.size):
        sums[row, lane + h, index] += numbers[h]


causal_kernel = _of_all_lanes(_causal)
_onto_diagonal_kernel = _of_all_lanes(_onto_diagonal)
causal_adjoint_kernel = _of_all_lanes(partial(_causal_adjoint, wants_bonds=False))
causal_adjoint_and_bonds_kernel = _of_all_lanes(partial(_causal_adjoint, wants_bonds=True))


def diagonal_kernel(*arguments: Any) -> None:
    """G_ii, ``(v, shift, bonds, bond_row, bond_token, nothing, out, ...)``: both sweeps, while l is near.

    Out and back over all rows, l would come from memory again.
    """
    *chain, nothing, out, row_begin, row_end, lane_begin, lane_end = arguments
    cells = nobody()  # whoever else sweeps has pieces of its own
    rows = max(1, KEPT_NEAR // max(1, out.shape[1] * out.shape[2] * out.itemsize))
    for begin in range(row_begin, row_end, rows):
        piece = begin, min(begin + rows, row_end), lane_begin, lane_end
        causal_kernel(*chain, nothing, out, False, True, Share.of(piece), cells)
        _onto_diagonal_kernel(*chain, out, Share.of(piece), cells)


@_compiled
def tunnel_kernel(w, state, out, row_begin, row_end, lane_begin, lane_end):
    """s_i = w_i + m_{i-1}, with m_i = s_i / (1 + s_i) in double precision."""
    for row in range(row_begin, row_end):
        m = state[row, lane_begin:lane_end].astype(np.float64)
        for n in range(w.shape[1]):
            w_n, out_n = w[row, n, lane_begin:lane_end], out[row, n, lane_begin:lane_end]
            for h in range(m.size):
                s = w_n[h] + m[h]
                out_n[h] = s
                m[h] = s / (1 + s)


@_compiled
def tunnel_adjoint_kernel(grad, change, out, row_begin, row_end, lane_begin, lane_end):
    """s-bar_i = l_i^2 s-bar_{i+1} - l_i g_i with l = 1 + ``change``, in double precision."""
    carry = np.empty(lane_end - lane_begin, np.float64)
    for row in range(row_begin, row_end):
        carry[:] = 0
        for n in range(grad.shape[1] - 1, -1, -1):
            grad_n, change_n = grad[row, n, lane_begin:lane_end], change[row, n, lane_begin:lane_end]
            out_n = out[row, n, lane_begin:lane_end]
            for h in range(carry.size):
                decay = 1 + np.float64(change_n[h])
                carry[h] = decay * (decay * carry[h] - grad_n[h])
                out_n[h] = carry[h]
