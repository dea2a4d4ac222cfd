# mypy: ignore-errors
"""The numba kernels for few heads, behind ``cpu``: rows are cut into chunks, which fill a vector register together.

A **group** is the ``(tokens, heads)`` of one chunk of one row, in the order (row, chunk); its heads are lanes. A
**block** is ``groups_in_block`` groups, about ``LANES`` lanes, swept side by side. Their tokens lie far apart, so
``TOKENS`` of each are brought together in a scratch array that stays in the nearest cache, swept, and put back.

Where a chunk starts: see docs/mathematics.md, section 8. The complex sweeps start from a halo that is proven on the
data; where a proof takes more tokens than a chunk has, kernels return False and what they wrote is of no use. The
tunnelling regime remembers too long for that: there each chunk's map is composed first.
"""

import numpy as np
from numba import njit

from resnet_bk.ops.bk.cpu_vectors import CACHE_LINE, at, fetch

_compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz"})


@_compiled
def _fetch(x, row, token, tokens):
    """Asks for the cache lines of so many tokens, from one on."""
    for element in range(0, tokens * x.shape[2], CACHE_LINE // x.itemsize):
        fetch(at(x, (row, token, element)), 1)


LANES = 64
TOKENS = 32
TOKENS_BETWEEN_SCALINGS = 4
# A gap from which on m = 1 in double precision; larger ones would overflow in products of maps.
LARGEST_GAP = 1e17
NEGLIGIBLE = 1e-100


@_compiled
def _load(x, scratch, group_begin, groups, chunks, chunk, offset, tokens, ahead):
    """Brings tokens together, from ``offset`` on in each chunk; zeros where the row has none.

    ``ahead`` is how many tokens further the next ones are, which are fetched meanwhile.
    """
    length, heads = x.shape[1], x.shape[2]
    for group in range(groups):
        row, index = divmod(group_begin + group, chunks)
        first = index * chunk + offset
        begin = min(max(0, -first), tokens)
        end = max(begin, min(tokens, length - first))
        lane = group * heads
        if begin > 0 or end < tokens:
            scratch[:begin, lane : lane + heads] = 0
            scratch[end:tokens, lane : lane + heads] = 0
        far, near = x[row, first + begin : first + end], scratch[begin:end, lane : lane + heads]
        _fetch(x, row, first + begin + ahead, end - begin)
        for head in range(heads):
            for token in range(end - begin):
                near[token, head] = far[token, head]


@_compiled
def _store(x, scratch, group_begin, groups, chunks, chunk, offset, tokens, ahead):
    """Puts tokens back, those that the row has."""
    length, heads = x.shape[1], x.shape[2]
    for group in range(groups):
        row, index = divmod(group_begin + group, chunks)
        first = index * chunk + offset
        end = min(tokens, length - first)
        lane = group * heads
        far, near = x[row, first : first + end], scratch[:end, lane : lane + heads]
        _fetch(x, row, first + ahead, end)
        for head in range(heads):
            for token in range(end):
                far[token, head] = near[token, head]


@_compiled
def _to_lanes(per_head, groups):
    """A number for each head, as one for each lane."""
    heads = per_head.size
    lanes = np.empty(groups * heads, per_head.dtype)
    for lane in range(lanes.size):
        lanes[lane] = per_head[lane % heads]
    return lanes


@_compiled
def _ratios(v, tokens, shift_re, shift_im, bonds, l_re, l_im, out):
    """l_i of some tokens."""
    one = v.dtype.type(1)
    for token in range(tokens):
        v_n, out_n = v[token], out[token]
        for h in range(l_re.size):
            re = v_n[h] + shift_re[h] - bonds[h] * l_re[h]
            im = shift_im[h] - bonds[h] * l_im[h]
            scale = one / (re * re + im * im)
            l_re[h] = re * scale
            l_im[h] = -im * scale
            out_n[h] = complex(l_re[h], l_im[h])


@_compiled
def _walk(v, tokens, shift_re, shift_im, bonds, r_re, r_im, uncertainty, inverse):
    """Some sites further back: r_j = 1 / (a_j - t r_{j+1}), the ``uncertainty`` p / x and 1 / x.

    With w = t |r|^2 they become p w / (eta + w x) and 1 / (eta + w x); as quotients they cannot overflow.
    """
    one = v.dtype.type(1)
    for token in range(tokens - 1, -1, -1):
        v_n = v[token]
        for h in range(r_re.size):
            weight = bonds[h] * (r_re[h] * r_re[h] + r_im[h] * r_im[h])
            scale = one / (weight - shift_im[h] * inverse[h])
            uncertainty[h] *= weight * scale
            inverse[h] *= scale
        for h in range(r_re.size):
            re = v_n[h] + shift_re[h] - bonds[h] * r_re[h]
            im = shift_im[h] - bonds[h] * r_im[h]
            scale = one / (re * re + im * im)
            r_re[h] = re * scale
            r_im[h] = -im * scale


@_compiled
def causal_chunk_kernel(
    v, shift, bonds, state, out, limit, chunks, chunk, groups_in_block, block_begin, block_end, _lane_begin, _lane_end
):  # fmt: skip
    """l_i of the chunks in some blocks, complex; False where chunks are too short for a proof."""
    heads = v.shape[2]
    one = v.dtype.type(1)
    for block in range(block_begin, block_end):
        first = block * groups_in_block
        groups = min(groups_in_block, v.shape[0] * chunks - first)
        width = groups * heads
        v_near, out_near = np.empty((TOKENS, width), v.dtype), np.empty((TOKENS, width), out.dtype)
        shift_re, shift_im = _to_lanes(shift[:, 0], groups), _to_lanes(shift[:, 1], groups)
        bonds_near = _to_lanes(bonds, groups)
        l_re, l_im = np.zeros(width, v.dtype), np.zeros(width, v.dtype)
        if chunks > 1:
            halo = 0
            r_re, r_im = np.zeros(width, v.dtype), np.zeros(width, v.dtype)
            uncertainty, inverse = np.empty(width, v.dtype), np.empty(width, v.dtype)
            proven = False
            while not proven:
                halo += TOKENS
                if halo > chunk:
                    return False
                _load(v, v_near, first, groups, chunks, chunk, -halo, TOKENS, -TOKENS)
                tokens = TOKENS
                if halo == TOKENS:
                    # The first site of the walk: p = 1, x = eta.
                    tokens -= 1
                    for h in range(width):
                        re, im = v_near[tokens, h] + shift_re[h], shift_im[h]
                        scale = one / (re * re + im * im)
                        r_re[h] = re * scale
                        r_im[h] = -im * scale
                        inverse[h] = -one / shift_im[h]
                        uncertainty[h] = inverse[h]
                _walk(v_near, tokens, shift_re, shift_im, bonds_near, r_re, r_im, uncertainty, inverse)
                proven = True
                for h in range(width):
                    starts_row = (first + h // heads) % chunks == 0
                    proven &= starts_row or bonds_near[h] * uncertainty[h] <= -limit * shift_im[h]
            for offset in range(-halo, 0, TOKENS):
                _load(v, v_near, first, groups, chunks, chunk, offset, TOKENS, TOKENS)
                _ratios(v_near, TOKENS, shift_re, shift_im, bonds_near, l_re, l_im, out_near)
        for group in range(groups):
            row, index = divmod(first + group, chunks)
            if index == 0:
                for head in range(heads):
                    l_re[group * heads + head] = state[row, head, 0]
                    l_im[group * heads + head] = state[row, head, 1]
        for offset in range(0, chunk, TOKENS):
            tokens = min(TOKENS, chunk - offset)
            _load(v, v_near, first, groups, chunks, chunk, offset, tokens, TOKENS)
            _ratios(v_near, tokens, shift_re, shift_im, bonds_near, l_re, l_im, out_near)
            _store(out, out_near, first, groups, chunks, chunk, offset, tokens, TOKENS)
    return True


@_compiled
def _adjoint(grad, l, tokens, bonds, carried, v_bar):
    """abar_i = -conj(l_i^2) (g_i - t_i abar_{i+1}) of some tokens, from the last.

    ``carried`` holds Re abar, Im abar and the sums of both, ``LANES`` each: one array, since more of them would take
    more checks for overlap than a compiler makes before it gives up on vectors.
    """
    carried[2 * LANES :] = 0
    for token in range(tokens - 1, -1, -1):
        l_n, grad_n, v_bar_n = l[token], grad[token], v_bar[token]
        for h in range(l.shape[1]):
            re, im = l_n[h].real, l_n[h].imag
            square_re = im * im - re * re
            square_im = re * im + re * im
            lambda_re = grad_n[h].real - bonds[h] * carried[h]
            lambda_im = grad_n[h].imag - bonds[h] * carried[LANES + h]
            abar_re = square_re * lambda_re - square_im * lambda_im
            abar_im = square_re * lambda_im + square_im * lambda_re
            carried[h] = abar_re
            carried[LANES + h] = abar_im
            carried[2 * LANES + h] += abar_re
            carried[3 * LANES + h] += abar_im
            v_bar_n[h] = abar_re


@_compiled
def causal_adjoint_chunk_kernel(
    grad, l, bonds, v_bar, shift_bar, state_bar, limit, chunks, chunk, groups_in_block, block_begin, block_end,
    _lane_begin, _lane_end,
):  # fmt: skip
    """Adjoint of ``causal_chunk_kernel``; ``shift_bar`` is (rows x chunks, heads, 2), to be summed."""
    heads = l.shape[2]
    for block in range(block_begin, block_end):
        first = block * groups_in_block
        groups = min(groups_in_block, l.shape[0] * chunks - first)
        width = groups * heads
        l_near, grad_near = np.empty((TOKENS, width), l.dtype), np.empty((TOKENS, width), l.dtype)
        v_bar_near = np.empty((TOKENS, width), v_bar.dtype)
        bonds_near = _to_lanes(bonds, groups)
        carried = np.zeros(4 * LANES, v_bar.dtype)
        if chunks > 1:
            # What comes from beyond the halo is weighed by the product of t |l|^2 over the halo.
            halo = 0
            product = np.ones(width, v_bar.dtype)
            proven = False
            while not proven:
                if halo + TOKENS > chunk:
                    return False
                _load(l, l_near, first, groups, chunks, chunk, chunk + halo, TOKENS, TOKENS)
                for token in range(TOKENS):
                    l_n = l_near[token]
                    for h in range(width):
                        product[h] *= bonds_near[h] * (l_n[h].real * l_n[h].real + l_n[h].imag * l_n[h].imag)
                halo += TOKENS
                proven = True
                for group in range(groups):
                    # The next row's tokens are no continuation of a row's last chunk.
                    if (first + group) % chunks < chunks - 1:
                        for h in range(group * heads, (group + 1) * heads):
                            proven &= product[h] <= limit
            for offset in range(chunk + halo - TOKENS, chunk - 1, -TOKENS):
                _load(l, l_near, first, groups, chunks, chunk, offset, TOKENS, -TOKENS)
                _load(grad, grad_near, first, groups, chunks, chunk, offset, TOKENS, -TOKENS)
                _adjoint(grad_near, l_near, TOKENS, bonds_near, carried, v_bar_near)
        for offset in range((chunk - 1) // TOKENS * TOKENS, -1, -TOKENS):
            tokens = min(TOKENS, chunk - offset)
            _load(l, l_near, first, groups, chunks, chunk, offset, tokens, -TOKENS)
            _load(grad, grad_near, first, groups, chunks, chunk, offset, tokens, -TOKENS)
            _adjoint(grad_near, l_near, tokens, bonds_near, carried, v_bar_near)
            _store(v_bar, v_bar_near, first, groups, chunks, chunk, offset, tokens, -TOKENS)
            for h in range(width):
                shift_bar[first + h // heads, h % heads, 0] += carried[2 * LANES + h]
                shift_bar[first + h // heads, h % heads, 1] += carried[3 * LANES + h]
        for group in range(groups):
            row, index = divmod(first + group, chunks)
            if index == 0:
                for head in range(heads):
                    lane = group * heads + head
                    state_bar[row, head, 0] = -bonds[head] * carried[lane]
                    state_bar[row, head, 1] = -bonds[head] * carried[LANES + lane]
    return True


@_compiled
def tunnel_maps_kernel(w, maps, chunks, chunk, groups_in_block, block_begin, block_end, _lane_begin, _lane_end):
    """Each chunk's map m -> (p m + q) / (r m + s), ``maps`` (rows x chunks, heads, 4) in double precision.

    The product of [[1, w], [1, 1 + w]]: no negative entry, so that no digit is lost; only the ratios of entries matter.
    """
    heads = w.shape[2]
    for block in range(block_begin, block_end):
        first = block * groups_in_block
        groups = min(groups_in_block, w.shape[0] * chunks - first)
        width = groups * heads
        w_near = np.empty((TOKENS, width), w.dtype)
        p, q, r, s = np.ones(width), np.zeros(width), np.zeros(width), np.ones(width)
        for offset in range(0, chunk, TOKENS):
            _load(w, w_near, first, groups, chunks, chunk, offset, TOKENS, TOKENS)
            for token in range(TOKENS):
                w_n = w_near[token]
                for h in range(width):
                    gap = min(np.float64(w_n[h]), LARGEST_GAP)
                    p[h] += gap * r[h]
                    r[h] += p[h]
                for h in range(width):
                    gap = min(np.float64(w_n[h]), LARGEST_GAP)
                    q[h] += gap * s[h]
                    s[h] += q[h]
                if token % TOKENS_BETWEEN_SCALINGS == TOKENS_BETWEEN_SCALINGS - 1:
                    for h in range(width):
                        scale = 1 / s[h]
                        p[h] *= scale
                        q[h] *= scale
                        r[h] *= scale
                        s[h] = 1
        for h in range(width):
            entries = maps[first + h // heads, h % heads]
            entries[0], entries[1], entries[2], entries[3] = p[h], q[h], r[h], s[h]


@_compiled
def apply_maps_kernel(maps, state, chunks):
    """What enters each chunk, (rows x chunks, heads): the maps of a row's earlier chunks in order."""
    entering = np.empty(maps.shape[:2])
    for row in range(state.shape[0]):
        for head in range(state.shape[1]):
            m = np.float64(state[row, head])
            for group in range(row * chunks, (row + 1) * chunks):
                entering[group, head] = m
                p, q, r, s = maps[group, head]
                m = (p * m + q) / (r * m + s)
    return entering


@_compiled
def tunnel_chunk_kernel(
    w, entering, out, largest_gap, chunks, chunk, groups_in_block, block_begin, block_end, _lane_begin, _lane_end
):  # fmt: skip
    """s_i = w_i + m_{i-1} by determinants: d_i = d_{i-1} + w_i theta_{i-1}, theta_i = theta_{i-1} + d_i, s = d / theta.

    A quotient in double precision takes longer than all else. So only the determinants are in double precision, scaled
    to theta = 1 every few tokens, and what is put out is a quotient in the type of the data. Beyond ``largest_gap`` a
    gap is its own s, and determinants would leave that type.
    """
    heads = w.shape[2]
    for block in range(block_begin, block_end):
        first = block * groups_in_block
        groups = min(groups_in_block, w.shape[0] * chunks - first)
        width = groups * heads
        w_near, out_near = np.empty((TOKENS, width), w.dtype), np.empty((TOKENS, width), w.dtype)
        d, theta = entering[first : first + groups].copy().reshape(-1), np.ones(width)
        for offset in range(0, chunk, TOKENS):
            tokens = min(TOKENS, chunk - offset)
            _load(w, w_near, first, groups, chunks, chunk, offset, tokens, TOKENS)
            for token in range(tokens):
                w_n, out_n = w_near[token], out_near[token]
                for h in range(width):
                    gap = w_n[h]
                    before = theta[h]
                    after = d[h] + np.float64(min(gap, largest_gap)) * before
                    s = w.dtype.type(after) / w.dtype.type(before)
                    out_n[h] = gap if gap > largest_gap else s
                    d[h] = after
                    theta[h] = before + after
                if token % TOKENS_BETWEEN_SCALINGS == TOKENS_BETWEEN_SCALINGS - 1 or token == tokens - 1:
                    for h in range(width):
                        d[h] /= theta[h]
                        theta[h] = 1
            _store(out, out_near, first, groups, chunks, chunk, offset, tokens, TOKENS)


@_compiled
def tunnel_adjoint_maps_kernel(
    grad, change, maps, chunks, chunk, groups_in_block, block_begin, block_end, _lane_begin, _lane_end
):  # fmt: skip
    """What each chunk hands on to its left, own + product x what enters: ``maps`` (rows x chunks, heads, 2)."""
    heads = grad.shape[2]
    for block in range(block_begin, block_end):
        first = block * groups_in_block
        groups = min(groups_in_block, grad.shape[0] * chunks - first)
        width = groups * heads
        grad_near, change_near = np.empty((TOKENS, width), grad.dtype), np.empty((TOKENS, width), grad.dtype)
        own, product = np.zeros(width), np.ones(width)
        for offset in range((chunk - 1) // TOKENS * TOKENS, -1, -TOKENS):
            tokens = min(TOKENS, chunk - offset)
            _load(grad, grad_near, first, groups, chunks, chunk, offset, tokens, -TOKENS)
            _load(change, change_near, first, groups, chunks, chunk, offset, tokens, -TOKENS)
            for token in range(tokens - 1, -1, -1):
                grad_n, change_n = grad_near[token], change_near[token]
                for h in range(width):
                    decay = 1 + np.float64(change_n[h])
                    own[h] = decay * (decay * own[h] - grad_n[h])
                    product[h] *= decay * decay
            for h in range(width):
                # Smaller ones matter to nothing, and numbers near the smallest there are take long to multiply.
                if product[h] < NEGLIGIBLE:
                    product[h] = 0
        for h in range(width):
            maps[first + h // heads, h % heads, 0] = own[h]
            maps[first + h // heads, h % heads, 1] = product[h]


@_compiled
def apply_adjoint_maps_kernel(maps, rows, chunks):
    """What enters each chunk from its right, (rows x chunks, heads)."""
    entering = np.empty(maps.shape[:2])
    for row in range(rows):
        for head in range(maps.shape[1]):
            carry = 0.0
            for group in range((row + 1) * chunks - 1, row * chunks - 1, -1):
                entering[group, head] = carry
                carry = maps[group, head, 0] + maps[group, head, 1] * carry
    return entering


@_compiled
def tunnel_adjoint_chunk_kernel(
    grad, change, entering, out, chunks, chunk, groups_in_block, block_begin, block_end, _lane_begin, _lane_end
):  # fmt: skip
    """s-bar_i = l_i^2 s-bar_{i+1} - l_i g_i with l = 1 + ``change``, in double precision."""
    heads = grad.shape[2]
    for block in range(block_begin, block_end):
        first = block * groups_in_block
        groups = min(groups_in_block, grad.shape[0] * chunks - first)
        width = groups * heads
        grad_near, change_near = np.empty((TOKENS, width), grad.dtype), np.empty((TOKENS, width), grad.dtype)
        out_near = np.empty((TOKENS, width), grad.dtype)
        carry = entering[first : first + groups].copy().reshape(-1)
        for offset in range((chunk - 1) // TOKENS * TOKENS, -1, -TOKENS):
            tokens = min(TOKENS, chunk - offset)
            _load(grad, grad_near, first, groups, chunks, chunk, offset, tokens, -TOKENS)
            _load(change, change_near, first, groups, chunks, chunk, offset, tokens, -TOKENS)
            for token in range(tokens - 1, -1, -1):
                grad_n, change_n, out_n = grad_near[token], change_near[token], out_near[token]
                for h in range(width):
                    decay = 1 + np.float64(change_n[h])
                    carry[h] = decay * (decay * carry[h] - grad_n[h])
                    out_n[h] = carry[h]
            _store(out, out_near, first, groups, chunks, chunk, offset, tokens, -TOKENS)
