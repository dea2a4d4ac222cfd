"""The numba kernels behind ``cpu``: each sweeps the rows and lanes of a range, complex numbers in pairs.

The formulas are in ``scan``. ``bonds`` are ``(1 or rows, 1 or N, lanes)``, found at (row x bond_row,
token x bond_token).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from resnet_bk.ops.bk.cpu_vectors import (
    STREAM_ALIGNMENT,
    fence,
    load,
    load_complex,
    multiply_add,
    splat,
    store,
    store_complex,
    stream,
)

# Contraction to fused multiply-adds and free signs of zero; nothing that would reorder or assume finite numbers.
# numpy's error model: a division by zero is infinite and raises nothing, which lets loops vectorise.
_compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz"})

TOKENS_PER_PARTIAL_SUM = 256
TOKENS_FETCHED_AHEAD = 16
CACHE_LINE = 64
STREAMED_FROM = 1 << 23  # bytes; beside them are four times as many that are read


@intrinsic
def _prefetch(typing_context, address):  # noqa: ARG001
    """Asks for a cache line without waiting for it."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        pointer, integer = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, integer, integer, integer])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        # to be read, kept in all caches, data
        builder.call(fetch, [builder.inttoptr(arguments[0], pointer), integer(0), integer(3), integer(1)])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@_compiled
def _place(array, row, lane):
    """Where a lane of a row's first token lies."""
    return np.int64(array.ctypes.data) + row * array.strides[0] + lane * array.strides[2]


@_compiled
def fetch(begin, size):
    """Asks for the cache lines of so many bytes.

    Processors fetch ahead of sweeps that go forwards by themselves; one that goes backwards takes half as long with
    this. Where a sweep asks for tokens before the first nothing happens: this does not fault.
    """
    for offset in range(0, size, CACHE_LINE):
        _prefetch(begin + offset)


@_compiled
def _streams(out, lane):
    """Whether results are better written past the caches: they and what they are made of fill them anyway."""
    odd = (np.int64(out.ctypes.data) | out.strides[0] | out.strides[1] | lane * out.itemsize) % STREAM_ALIGNMENT
    return odd == 0 and out.size * out.itemsize >= STREAMED_FROM


def _of_all_lanes(in_vectors: Callable[[int], Any]) -> Callable[..., None]:
    """A kernel of the rows and lanes in a range, ``(*arguments, row_begin, row_end, lane_begin, lane_end)``.

    ``in_vectors(lanes)`` makes the compiled function ``(*arguments, row_begin, row_end, lane)`` of so many lanes from
    one on: what is carried is in registers, of as many lanes as they hold, and a last few are swept by themselves.
    """
    sweeps = [(lanes, in_vectors(lanes)) for lanes in (64, 16, 4, 1)]

    def kernel(*arguments: Any) -> None:
        *arrays, row_begin, row_end, lane, lane_end = arguments
        for lanes, sweep in sweeps:
            while lane_end - lane >= lanes:
                sweep(*arrays, row_begin, row_end, lane)
                lane += lanes

    return kernel


def _causal(lanes):
    """l_i, swept from the left, or from the right in ``reverse``."""

    @_compiled
    def sweep(v, shift, bonds, bond_row, bond_token, state, out, reverse, row_begin, row_end, lane):
        length = v.shape[1]
        ones = splat(v.dtype.type(1), lanes)
        shift_re, shift_im = load_complex(shift, lane, lanes)
        for row in range(row_begin, row_end):
            l_re, l_im = load_complex(state[row], lane, lanes)
            for step in range(length):
                n = length - 1 - step if reverse else step
                # Read from the right end, a site's earlier neighbour is n + 1, and their bond is stored there.
                bond_index = min(n + 1, length - 1) if reverse else n
                t = load(bonds[row * bond_row, bond_index * bond_token], lane, lanes)
                re = multiply_add(-t, l_re, load(v[row, n], lane, lanes) + shift_re)
                im = multiply_add(-t, l_im, shift_im)
                scale = ones / multiply_add(re, re, im * im)
                l_re, l_im = re * scale, -im * scale
                store_complex(out[row, n], lane, l_re, l_im)

    return sweep


def _onto_diagonal(lanes):
    """Turns ``out`` from l_i into G_ii = 1 / (a_i - t_i r_{i+1} - t_{i-1} l_{i-1}), sweeping from the right."""

    @_compiled
    def sweep(v, shift, bonds, bond_row, bond_token, out, row_begin, row_end, lane):
        length, end = v.shape[1], lane + lanes
        ones, zeros = splat(v.dtype.type(1), lanes), splat(v.dtype.type(0), lanes)
        shift_re, shift_im = load_complex(shift, lane, lanes)
        # The sweep begins without a neighbour, and ends without one.
        nothing = np.zeros(lanes, out.dtype)
        for row in range(row_begin, row_end):
            r_re, r_im = zeros, zeros
            v_place, out_place = _place(v, row, lane), _place(out, row, lane)
            for n in range(length - 1, -1, -1):
                ahead = n - TOKENS_FETCHED_AHEAD
                fetch(v_place + ahead * v.strides[1], lanes * v.itemsize)
                fetch(out_place + ahead * out.strides[1], lanes * out.itemsize)
                t = load(bonds[row * bond_row, min(n + 1, length - 1) * bond_token], lane, lanes)
                # What the sweep from the right divides by.
                re = multiply_add(-t, r_re, load(v[row, n], lane, lanes) + shift_re)
                im = multiply_add(-t, r_im, shift_im)
                scale = ones / multiply_add(re, re, im * im)
                r_re, r_im = re * scale, -im * scale
                t = load(bonds[row * bond_row, n * bond_token], lane, lanes)
                l_re, l_im = load_complex(out[row, n - 1, lane:end] if n > 0 else nothing, 0, lanes)
                re, im = multiply_add(-t, l_re, re), multiply_add(-t, l_im, im)
                scale = ones / multiply_add(re, re, im * im)
                store_complex(out[row, n], lane, re * scale, -im * scale)

    return sweep


def _causal_adjoint(lanes):
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
        wants_bonds,
        row_begin,
        row_end,
        lane,
    ):
        length = l.shape[1]
        zeros = splat(v_bar.dtype.type(0), lanes)
        numbers = np.empty(lanes, v_bar.dtype)
        streams = lanes * v_bar.itemsize >= STREAM_ALIGNMENT and _streams(v_bar, lane)
        away = TOKENS_FETCHED_AHEAD if reverse else -TOKENS_FETCHED_AHEAD
        for row in range(row_begin, row_end):
            abar_re, abar_im = zeros, zeros
            part_re, part_im, part_bond = zeros, zeros, zeros
            l_place, grad_place, v_bar_place = _place(l, row, lane), _place(grad, row, lane), _place(v_bar, row, lane)
            for step in range(length):
                n = step if reverse else length - 1 - step
                # The bond to the site that comes later in the sweep, whose abar is at hand; at the end there is none.
                bond_index = n if reverse else min(n + 1, length - 1)
                ahead = n + away
                fetch(l_place + ahead * l.strides[1], lanes * l.itemsize)
                fetch(grad_place + ahead * grad.strides[1], lanes * grad.itemsize)
                if not streams:
                    fetch(v_bar_place + ahead * v_bar.strides[1], lanes * v_bar.itemsize)
                re, im = load_complex(l[row, n], lane, lanes)
                grad_re, grad_im = load_complex(grad[row, n], lane, lanes)
                t = load(bonds[row * bond_row, bond_index * bond_token], lane, lanes)
                square_re, square_im = multiply_add(im, im, -(re * re)), re * im + re * im
                lambda_re, lambda_im = multiply_add(-t, abar_re, grad_re), multiply_add(-t, abar_im, grad_im)
                abar_re = multiply_add(square_re, lambda_re, -(square_im * lambda_im))
                abar_im = multiply_add(square_re, lambda_im, square_im * lambda_re)
                if streams:
                    stream(v_bar[row, n], lane, abar_re)
                else:
                    store(v_bar[row, n], lane, abar_re)
                part_re, part_im = part_re + abar_re, part_im + abar_im
                if wants_bonds:
                    earlier = n + 1 if reverse else n - 1
                    inside = 0 <= earlier < length
                    before_re, before_im = load_complex(l[row, earlier] if inside else state[row], lane, lanes)
                    bond_bar = -multiply_add(before_re, abar_re, before_im * abar_im)
                    part_bond = part_bond + bond_bar
                    # The mirrored sweep has no bond before its first site.
                    if bonds_bar.size and (inside or not reverse):
                        store(bonds_bar[row, n + 1 if reverse else n], lane, bond_bar)
                if step % TOKENS_PER_PARTIAL_SUM == TOKENS_PER_PARTIAL_SUM - 1 or step == length - 1:
                    for index, part in enumerate((part_re, part_im, part_bond)):
                        store(numbers, 0, part)
                        for h in range(lanes):
                            sums[row, lane + h, index] += numbers[h]
                    part_re, part_im, part_bond = zeros, zeros, zeros
            t = load(bonds[row * bond_row, 0], lane, lanes)
            store_complex(state_bar[row], lane, -t * abar_re, -t * abar_im)
        if streams:
            fence()

    return sweep


causal_kernel = _of_all_lanes(_causal)
onto_diagonal_kernel = _of_all_lanes(_onto_diagonal)
causal_adjoint_kernel = _of_all_lanes(_causal_adjoint)


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
