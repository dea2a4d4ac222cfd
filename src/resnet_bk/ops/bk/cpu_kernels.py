"""The numba kernels behind ``cpu``: each sweeps the rows and lanes of a range, complex numbers in pairs.

The formulas are in ``scan``. ``bonds`` are ``(1 or rows, 1 or N, lanes)``, found at (row x bond_row,
token x bond_token).
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# Contraction to fused multiply-adds and free signs of zero; nothing that would reorder or assume finite numbers.
# numpy's error model: a division by zero is infinite and raises nothing, which lets loops vectorise.
_compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz"})

TOKENS_PER_PARTIAL_SUM = 256
TOKENS_FETCHED_AHEAD = 16
CACHE_LINE = 64


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
def _fetch_ahead(token, tokens_away, token_bytes):
    """Fetches a token's cache lines from some tokens away.

    Processors fetch ahead of sweeps that go forwards by themselves; one that goes backwards takes half as long with
    this. Where the other token is outside of the array nothing happens: prefetching does not fault.
    """
    begin = token.ctypes.data + tokens_away * token_bytes
    for offset in range(0, token.size * token.itemsize, CACHE_LINE):
        _prefetch(begin + offset)


@_compiled
def causal_kernel(v, shift, bonds, bond_row, bond_token, state, out, reverse, row_begin, row_end, lane_begin, lane_end):
    """l_i of the rows and lanes in a range."""
    length = v.shape[1]
    width = lane_end - lane_begin
    one = v.dtype.type(1)
    l_re, l_im = np.empty(width, v.dtype), np.empty(width, v.dtype)
    shift_re = shift[lane_begin:lane_end, 0].copy()
    shift_im = shift[lane_begin:lane_end, 1].copy()
    for row in range(row_begin, row_end):
        for h in range(width):
            l_re[h] = state[row, lane_begin + h, 0]
            l_im[h] = state[row, lane_begin + h, 1]
        for step in range(length):
            n = length - 1 - step if reverse else step
            # Read from the right end, a site's earlier neighbour is n + 1, and their bond is stored there.
            bond_index = min(n + 1, length - 1) if reverse else n
            v_n = v[row, n, lane_begin:lane_end]
            t_n = bonds[row * bond_row, bond_index * bond_token, lane_begin:lane_end]
            out_n = out[row, n, 2 * lane_begin : 2 * lane_end]
            for h in range(width):
                re = v_n[h] + shift_re[h] - t_n[h] * l_re[h]
                im = shift_im[h] - t_n[h] * l_im[h]
                scale = one / (re * re + im * im)
                l_re[h] = re * scale
                l_im[h] = -im * scale
                out_n[2 * h] = l_re[h]
                out_n[2 * h + 1] = l_im[h]


@_compiled
def onto_diagonal_kernel(v, shift, bonds, bond_row, bond_token, out, row_begin, row_end, lane_begin, lane_end):
    """Turns ``out`` from l_i into G_ii = 1 / (a_i - t_i r_{i+1} - t_{i-1} l_{i-1}), sweeping from the right."""
    length = v.shape[1]
    width = lane_end - lane_begin
    one = v.dtype.type(1)
    # What the sweep from the right divides by; the sweep begins without a neighbour.
    d_re, d_im = np.empty(width, v.dtype), np.empty(width, v.dtype)
    r_re, r_im = np.empty(width, v.dtype), np.empty(width, v.dtype)
    no_neighbour = np.zeros(2 * width, v.dtype)
    shift_re = shift[lane_begin:lane_end, 0].copy()
    shift_im = shift[lane_begin:lane_end, 1].copy()
    for row in range(row_begin, row_end):
        r_re[:] = 0
        r_im[:] = 0
        for n in range(length - 1, -1, -1):
            v_n = v[row, n, lane_begin:lane_end]
            left_n = bonds[row * bond_row, n * bond_token, lane_begin:lane_end]
            right_n = bonds[row * bond_row, min(n + 1, length - 1) * bond_token, lane_begin:lane_end]
            before_n = out[row, n - 1, 2 * lane_begin : 2 * lane_end] if n > 0 else no_neighbour
            out_n = out[row, n, 2 * lane_begin : 2 * lane_end]
            _fetch_ahead(v_n, -TOKENS_FETCHED_AHEAD, v.strides[1])
            _fetch_ahead(out_n, -TOKENS_FETCHED_AHEAD, out.strides[1])
            for h in range(width):
                d_re[h] = v_n[h] + shift_re[h] - right_n[h] * r_re[h]
                d_im[h] = shift_im[h] - right_n[h] * r_im[h]
            for h in range(width):
                scale = one / (d_re[h] * d_re[h] + d_im[h] * d_im[h])
                r_re[h] = d_re[h] * scale
                r_im[h] = -d_im[h] * scale
            for h in range(width):
                re = d_re[h] - left_n[h] * before_n[2 * h]
                im = d_im[h] - left_n[h] * before_n[2 * h + 1]
                scale = one / (re * re + im * im)
                out_n[2 * h] = re * scale
                out_n[2 * h + 1] = -im * scale


@_compiled
def causal_adjoint_kernel(
    grad, l, bonds, bond_row, bond_token, state, v_bar, shift_bar, bonds_bar, state_bar, reverse, row_begin, row_end,
    lane_begin, lane_end,
):  # fmt: skip
    """Adjoint of ``causal_kernel``: abar_i = -conj(l_i^2) (g_i - t_i abar_{i+1}).

    ``grad``, ``l`` and ``state`` are complex; ``bonds_bar`` is (0, 0, 0) if not wanted, (rows, 1, lanes) for sums, or
    (rows, N, lanes).
    """
    length = l.shape[1]
    width = lane_end - lane_begin
    abar_re, abar_im = np.empty(width, v_bar.dtype), np.empty(width, v_bar.dtype)
    part_re, part_im = np.zeros(width, v_bar.dtype), np.zeros(width, v_bar.dtype)
    bond_part = np.zeros(width, v_bar.dtype)
    wants_bonds = bonds_bar.size > 0
    per_token = bonds_bar.shape[1] > 1 or (wants_bonds and length == 1)
    away = TOKENS_FETCHED_AHEAD if reverse else -TOKENS_FETCHED_AHEAD
    for row in range(row_begin, row_end):
        abar_re[:] = 0
        abar_im[:] = 0
        for step in range(length):
            n = step if reverse else length - 1 - step
            # The bond to the site that comes later in the sweep, whose abar is at hand; at the end there is none.
            bond_index = n if reverse else min(n + 1, length - 1)
            l_n = l[row, n, lane_begin:lane_end]
            grad_n = grad[row, n, lane_begin:lane_end]
            t_n = bonds[row * bond_row, bond_index * bond_token, lane_begin:lane_end]
            v_bar_n = v_bar[row, n, lane_begin:lane_end]
            _fetch_ahead(l_n, away, l.strides[1])
            _fetch_ahead(grad_n, away, grad.strides[1])
            _fetch_ahead(v_bar_n, away, v_bar.strides[1])
            for h in range(width):
                re, im = l_n[h].real, l_n[h].imag
                square_re = im * im - re * re
                square_im = re * im + re * im
                lambda_re = grad_n[h].real - t_n[h] * abar_re[h]
                lambda_im = grad_n[h].imag - t_n[h] * abar_im[h]
                abar_re[h] = square_re * lambda_re - square_im * lambda_im
                abar_im[h] = square_re * lambda_im + square_im * lambda_re
            for h in range(width):
                v_bar_n[h] = abar_re[h]
            for h in range(width):
                part_re[h] += abar_re[h]
            for h in range(width):
                part_im[h] += abar_im[h]
            if wants_bonds:
                earlier = n + 1 if reverse else n - 1
                inside = 0 <= earlier < length
                before = l[row, earlier, lane_begin:lane_end] if inside else state[row, lane_begin:lane_end]
                if not per_token:
                    for h in range(width):
                        bond_part[h] -= before[h].real * abar_re[h] + before[h].imag * abar_im[h]
                elif inside or not reverse:
                    # The mirrored sweep has no bond before its first site.
                    place = bonds_bar[row, n + 1 if reverse else n, lane_begin:lane_end]
                    for h in range(width):
                        place[h] = -(before[h].real * abar_re[h] + before[h].imag * abar_im[h])
            if step % TOKENS_PER_PARTIAL_SUM == TOKENS_PER_PARTIAL_SUM - 1 or step == length - 1:
                for h in range(width):
                    shift_bar[row, 2 * (lane_begin + h)] += part_re[h]
                    shift_bar[row, 2 * (lane_begin + h) + 1] += part_im[h]
                part_re[:] = 0
                part_im[:] = 0
                if wants_bonds and not per_token:
                    for h in range(width):
                        bonds_bar[row, 0, lane_begin + h] += bond_part[h]
                    bond_part[:] = 0
        first_bond = bonds[row * bond_row, 0, lane_begin:lane_end]
        for h in range(width):
            state_bar[row, 2 * (lane_begin + h)] = -first_bond[h] * abar_re[h]
            state_bar[row, 2 * (lane_begin + h) + 1] = -first_bond[h] * abar_im[h]


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
