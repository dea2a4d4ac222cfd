"""The numba kernels behind ``cpu``: each sweeps the rows and lanes of a range, complex numbers in pairs.

The formulas are in ``scan``. ``bonds`` are ``(1 or rows, 1 or N, lanes)``, found at (row x bond_row,
token x bond_token).
"""

import numpy as np
from numba import njit

# Contraction to fused multiply-adds and free signs of zero; nothing that would reorder or assume finite numbers.
# numpy's error model: a division by zero is infinite and raises nothing, which lets loops vectorise.
_compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz"})

TOKENS_PER_PARTIAL_SUM = 256


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
def _conjugate_step(grad_n, l_n, t_n, abar, first, last):
    """abar_i = -conj(l_i^2) (g_i - t_{i+1} abar_{i+1}) for lanes in a range, in place."""
    for h in range(first, last):
        re, im = l_n[2 * h], l_n[2 * h + 1]
        square_re = im * im - re * re
        square_im = re * im + re * im
        lambda_re = grad_n[2 * h] - t_n[h] * abar[2 * h]
        lambda_im = grad_n[2 * h + 1] - t_n[h] * abar[2 * h + 1]
        abar[2 * h] = square_re * lambda_re - square_im * lambda_im
        abar[2 * h + 1] = square_re * lambda_im + square_im * lambda_re


@_compiled
def causal_adjoint_kernel(
    grad, l, bonds, bond_row, bond_token, state, v_bar, shift_bar, bonds_bar, state_bar, reverse, row_begin, row_end,
    lane_begin, lane_end,
):  # fmt: skip
    """Adjoint of ``causal_kernel``; ``bonds_bar`` (0, 0, 0) if not wanted, (B, 1, H) for sums, or (B, N, H)."""
    length = l.shape[1]
    width = lane_end - lane_begin
    abar = np.empty(2 * width, l.dtype)
    part = np.zeros(2 * width, l.dtype)
    bond_part = np.zeros(width, l.dtype)
    wants_bonds = bonds_bar.size > 0
    per_token = bonds_bar.shape[1] > 1 or (wants_bonds and length == 1)
    blocks = (width + 15) // 16
    for row in range(row_begin, row_end):
        abar[:] = 0
        for step in range(length):
            n = step if reverse else length - 1 - step
            # The bond to the site that comes later in the sweep, whose abar is at hand; at the end there is none.
            bond_index = n if reverse else min(n + 1, length - 1)
            l_n = l[row, n, 2 * lane_begin : 2 * lane_end]
            grad_n = grad[row, n, 2 * lane_begin : 2 * lane_end]
            t_n = bonds[row * bond_row, bond_index * bond_token, lane_begin:lane_end]
            # Blocks in the direction of the tokens: memory is then read in one direction, which prefetching wants.
            for block in range(blocks):
                first = 16 * (block if reverse else blocks - 1 - block)
                _conjugate_step(grad_n, l_n, t_n, abar, first, min(first + 16, width))
            v_bar_n = v_bar[row, n, lane_begin:lane_end]
            for h in range(width):
                v_bar_n[h] = abar[2 * h]
            for h in range(2 * width):
                part[h] += abar[h]
            if wants_bonds:
                earlier = n + 1 if reverse else n - 1
                inside = 0 <= earlier < length
                l_before = (
                    l[row, earlier, 2 * lane_begin : 2 * lane_end]
                    if inside
                    else state[row, 2 * lane_begin : 2 * lane_end]
                )
                if per_token:
                    # The mirrored sweep has no bond before its first site.
                    if inside or not reverse:
                        place = bonds_bar[row, n + 1 if reverse else n, lane_begin:lane_end]
                        for h in range(width):
                            place[h] = -(l_before[2 * h] * abar[2 * h] + l_before[2 * h + 1] * abar[2 * h + 1])
                else:
                    for h in range(width):
                        bond_part[h] -= l_before[2 * h] * abar[2 * h] + l_before[2 * h + 1] * abar[2 * h + 1]
            if step % TOKENS_PER_PARTIAL_SUM == TOKENS_PER_PARTIAL_SUM - 1 or step == length - 1:
                for h in range(2 * width):
                    shift_bar[row, 2 * lane_begin + h] += part[h]
                part[:] = 0
                if wants_bonds and not per_token:
                    for h in range(width):
                        bonds_bar[row, 0, lane_begin + h] += bond_part[h]
                    bond_part[:] = 0
        first_bond = bonds[row * bond_row, 0, lane_begin:lane_end]
        for h in range(width):
            state_bar[row, 2 * (lane_begin + h)] = -first_bond[h] * abar[2 * h]
            state_bar[row, 2 * (lane_begin + h) + 1] = -first_bond[h] * abar[2 * h + 1]


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
def tunnel_adjoint_kernel(grad, m, out, row_begin, row_end, lane_begin, lane_end):
    """s-bar_i = l_i^2 s-bar_{i+1} - l_i g_i with l = 1 - m, in double precision."""
    carry = np.empty(lane_end - lane_begin, np.float64)
    for row in range(row_begin, row_end):
        carry[:] = 0
        for n in range(grad.shape[1] - 1, -1, -1):
            grad_n, m_n = grad[row, n, lane_begin:lane_end], m[row, n, lane_begin:lane_end]
            out_n = out[row, n, lane_begin:lane_end]
            for h in range(carry.size):
                decay = 1 - np.float64(m_n[h])
                carry[h] = decay * (decay * carry[h] - grad_n[h])
                out_n[h] = carry[h]
