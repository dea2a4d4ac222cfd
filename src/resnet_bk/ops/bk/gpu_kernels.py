"""The Triton kernels behind ``gpu``, which explains them.

``base`` is the offset of a lane's row and head, ``n`` the first of ``WIDTH`` sites in sweep order, from the row's left
end or with ``REVERSE`` from its right one. Bonds are stored with the right one of the two sites they join.

What is read and written are tiles ``(LANES, WIDTH)`` that lie as memory does, whichever way they are swept. Arithmetic
is on their columns: tuples in sweep order, one site of every lane each. The number of heads is compiled in, so that the
compiler sees which lanes lie side by side.
"""

import triton
import triton.language as tl

from resnet_bk.ops.kernels import kernel


@triton.jit
def _columns(x, REVERSE: tl.constexpr):
    """The columns of a tile in sweep order: rounds of halving."""
    lanes: tl.constexpr = x.shape[0]
    if x.shape[1] == 1:
        columns = (tl.reshape(x, [lanes]),)
    else:
        half: tl.constexpr = x.shape[1] // 2
        first, last = tl.split(tl.permute(tl.reshape(x, [lanes, 2, half]), (0, 2, 1)))
        if REVERSE:
            first, last = last, first
        columns = _columns(first, REVERSE) + _columns(last, REVERSE)
    return columns


@triton.jit
def _tile(x, REVERSE: tl.constexpr):
    """The inverse of ``_columns``."""
    if len(x) == 1:
        tile = tl.reshape(x[0], [x[0].shape[0], 1])
    else:
        half: tl.constexpr = len(x) // 2
        first, last = _tile(x[:half], REVERSE), _tile(x[half:], REVERSE)
        if REVERSE:
            first, last = last, first
        tile = tl.reshape(tl.permute(tl.join(first, last), (0, 2, 1)), [first.shape[0], len(x)])
    return tile


@triton.jit
def _places(base, n, length, heads, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """Where sites n .. n + WIDTH - 1 lie, ``(LANES, WIDTH)``, and which of them are in the row."""
    first = length - WIDTH - n if REVERSE else n
    tokens = first[:, None] + tl.arange(0, WIDTH)[None, :]
    return base[:, None] + tokens.to(tl.int64) * heads, (tokens >= 0) & (tokens < length)


@triton.jit
def _load(ptr, base, n, length, heads, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """Columns of sites n .. n + WIDTH - 1; 0 outside of the row."""
    at, inside = _places(base, n, length, heads, WIDTH, REVERSE)
    return _columns(tl.load(ptr + at, mask=inside, other=0.0), REVERSE)


@triton.jit
def _store(ptr, base, n, length, heads, columns, inside_lanes, REVERSE: tl.constexpr):
    at, inside = _places(base, n, length, heads, len(columns), REVERSE)
    tl.store(ptr + at, _tile(columns, REVERSE), mask=inside & inside_lanes[:, None])


@triton.jit
def _pairs_in_a_row(base, n, length, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """Where the pairs of sites n .. n + WIDTH - 1 of the only head lie, ``(LANES, 2 WIDTH)``, and which are in the row.

    They lie side by side, said so that the compiler sees it: it would move 8 bytes at a time otherwise.
    """
    first = length - WIDTH - n if REVERSE else n
    places = 2 * first.to(tl.int64)[:, None] + tl.arange(0, 2 * WIDTH)[None, :]
    return 2 * base[:, None] + places, (places >= 0) & (places < 2 * length)


@triton.jit
def _pairs_apart(base, n, length, heads, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """Where the pairs of sites n .. n + WIDTH - 1 lie, ``(LANES, WIDTH, 2)``, and which of them are in the row."""
    at, inside = _places(base, n, length, heads, WIDTH, REVERSE)
    parts = tl.arange(0, 2)[None, None, :]
    return 2 * at[:, :, None] + parts, inside[:, :, None] & (parts < 2)


@triton.jit
def _load_pairs(ptr, base, n, length, heads, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """Columns of real and of imaginary parts of sites n .. n + WIDTH - 1; 0 outside of the row."""
    if heads == 1:
        at, inside = _pairs_in_a_row(base, n, length, WIDTH, REVERSE)
        pairs = tl.reshape(tl.load(ptr + at, mask=inside, other=0.0), [base.shape[0], WIDTH, 2])
    else:
        at, inside = _pairs_apart(base, n, length, heads, WIDTH, REVERSE)
        pairs = tl.load(ptr + at, mask=inside, other=0.0)
    re, im = tl.split(pairs)
    return _columns(re, REVERSE), _columns(im, REVERSE)


@triton.jit
def _store_pairs(ptr, base, n, length, heads, re, im, inside_lanes, REVERSE: tl.constexpr):
    width: tl.constexpr = len(re)
    pairs = tl.join(_tile(re, REVERSE), _tile(im, REVERSE))
    if heads == 1:
        at, inside = _pairs_in_a_row(base, n, length, width, REVERSE)
        tl.store(ptr + at, tl.reshape(pairs, [base.shape[0], 2 * width]), mask=inside & inside_lanes[:, None])
    else:
        at, inside = _pairs_apart(base, n, length, heads, width, REVERSE)
        tl.store(ptr + at, pairs, mask=inside & inside_lanes[:, None, None])


@triton.jit
def _bonds(
    ptr, bond, base, n, length, heads, WIDTH: tl.constexpr, PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """Columns of the bonds to the earlier neighbour of sites n .. n + WIDTH - 1.

    Where each token has its own, those that are not in the row are 0. Read from the right, a bond lies where the
    earlier one of its sites does.
    """
    if PER_TOKEN:
        columns = _load(ptr, base, n - 1 if REVERSE else n, length, heads, WIDTH, REVERSE)
    else:
        columns = (bond,)
        for _ in tl.static_range(WIDTH - 1):
            columns = columns + (bond,)
    return columns


@triton.jit
def _reciprocal(x):
    """1 / x for x > 0, in two instructions where the type has them."""
    if x.dtype == tl.float32:
        root = tl.rsqrt(x)
        inverse = root * root
    else:
        inverse = 1.0 / x
    return inverse


@triton.jit
def _inverse(re, im):
    """1 / (re + i im), and the square of its modulus."""
    square = _reciprocal(re * re + im * im)
    return re * square, -im * square, square


@triton.jit
def _ratio(v, shift_re, shift_im, t, l_re, l_im):
    """1 / (v + shift - t l)."""
    re, im, _square = _inverse(v + shift_re - t * l_re, shift_im - t * l_im)
    return re, im


@triton.jit
def _sweep(v, t, shift_re, shift_im, l_re, l_im):
    """The ratios of consecutive sites from the one before them: columns of their parts, the last ones at the end."""
    re, im = (), ()
    for u in tl.static_range(len(v)):
        l_re, l_im = _ratio(v[u].to(shift_re.dtype), shift_re, shift_im, t[u], l_re, l_im)
        re, im = re + (l_re,), im + (l_im,)
    return re, im


@triton.jit
def _walk(v, t, shift_re, shift_im, r_re, r_im, square, p, x, q_re, q_im, l_re, l_im):
    """One site further back: its ratio from the right, the bound, and what it adds to the ratio l at the walk's start.

    ``t`` is the bond to the site before it on the walk; it counts as 1 at the walk's first, where r is 0.
    """
    weight = t * square
    p = p * weight
    x = -shift_im + weight * x
    r_re, r_im, square = _inverse(v + shift_re - t * r_re, shift_im - t * r_im)
    q_re = q_re * t
    q_im = q_im * t
    add_re = q_re * r_re - q_im * r_im
    add_im = q_re * r_im + q_im * r_re
    q_re = add_re * r_re - add_im * r_im
    q_im = add_re * r_im + add_im * r_re
    return r_re, r_im, square, p, x, q_re, q_im, l_re + add_re, l_im + add_im


@triton.jit
def _entering(
    v_ptr, bonds_ptr, bond, shift_re, shift_im, state_re, state_im, base, start, length, heads, tolerance,
    HALO: tl.constexpr, PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The ratio before ``start`` in sweep order: of a halo that is long enough, or of the row from its beginning.

    ``HALO`` sites are read at a time. Rows that begin in the middle of them have no state.
    """
    dtype: tl.constexpr = shift_re.dtype
    r_re = tl.zeros_like(shift_re)
    r_im, x, l_re, l_im, q_im = r_re, r_re, r_re, r_re, r_re
    square, p, q_re = r_re + 1.0, r_re + 1.0, r_re + 1.0
    least = tolerance * -shift_im
    into = _bonds(bonds_ptr, bond, base, start, length, heads, 1, PER_TOKEN, REVERSE)[0]
    halo = 0
    pending = tl.max((start > 0).to(tl.int32), axis=0)
    while pending > 0:
        halo += HALO
        n = start - halo
        v = _load(v_ptr, base, n, length, heads, HALO, REVERSE)
        t = _bonds(bonds_ptr, bond, base, n + 1, length, heads, HALO, PER_TOKEN, REVERSE)
        before_re, before_im, last_re, last_im = r_re, r_im, q_re, q_im
        for u in tl.static_range(HALO - 1, -1, -1):
            joined = tl.where(n + u >= 0, t[u], 0.0)
            if u == HALO - 1:
                joined = tl.where(n + u == start - 1, 1.0, joined)
            r_re, r_im, square, p, x, q_re, q_im, l_re, l_im = _walk(
                v[u].to(dtype), joined, shift_re, shift_im, r_re, r_im, square, p, x, q_re, q_im, l_re, l_im
            )
        # What the row's first site leaves is kept for the state.
        outside = n < 0
        r_re, r_im = tl.where(outside, before_re, r_re), tl.where(outside, before_im, r_im)
        q_re, q_im = tl.where(outside, last_re, q_re), tl.where(outside, last_im, q_im)
        far_enough = (p * into <= least * x) | (start <= halo)
        pending = tl.max((~far_enough).to(tl.int32), axis=0)
    # The state is one site more: its ratio beside the row's is h / (1 - t h r).
    first = _bonds(bonds_ptr, bond, base, tl.zeros_like(start), length, heads, 1, PER_TOKEN, REVERSE)[0]
    h_re, h_im = first * state_re, first * state_im
    re, im, _square = _inverse(1.0 - (h_re * r_re - h_im * r_im), -(h_re * r_im + h_im * r_re))
    h_re, h_im = h_re * re - h_im * im, h_re * im + h_im * re
    from_the_beginning = start <= halo
    l_re += tl.where(from_the_beginning, q_re * h_re - q_im * h_im, 0.0)
    l_im += tl.where(from_the_beginning, q_re * h_im + q_im * h_re, 0.0)
    return tl.where(start == 0, state_re, l_re), tl.where(start == 0, state_im, l_im)


@kernel
def causal_kernel(
    v_ptr, shift_ptr, bonds_ptr, state_ptr, out_ptr, length, heads: tl.constexpr, chunk, num_lanes, tolerance,
    PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr, WIDTH: tl.constexpr, HALO: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """l_i of one chunk a lane, ``WIDTH`` sites at a time."""
    row = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < num_lanes
    head = lane % heads
    start = tl.where(inside, lane // heads * chunk, 0)
    base = row * length * heads + head
    shift_re, shift_im = tl.load(shift_ptr + 2 * head), tl.load(shift_ptr + 2 * head + 1)
    bond = shift_re if PER_TOKEN else tl.load(bonds_ptr + head)
    state_re = tl.load(state_ptr + 2 * (row * heads + head))
    state_im = tl.load(state_ptr + 2 * (row * heads + head) + 1)
    l_re, l_im = _entering(
        v_ptr, bonds_ptr, bond, shift_re, shift_im, state_re, state_im, base, start, length, heads, tolerance,
        HALO, PER_TOKEN, REVERSE,
    )  # fmt: skip
    for step in range(0, chunk, WIDTH):
        n = start + step
        v = _load(v_ptr, base, n, length, heads, WIDTH, REVERSE)
        t = _bonds(bonds_ptr, bond, base, n, length, heads, WIDTH, PER_TOKEN, REVERSE)
        re, im = _sweep(v, t, shift_re, shift_im, l_re, l_im)
        l_re, l_im = re[WIDTH - 1], im[WIDTH - 1]
        _store_pairs(out_ptr, base, n, length, heads, re, im, inside, REVERSE)


@triton.jit
def _onto_diagonal(l_re, l_im, t, r_re, r_im):
    """G = 1 / (1 / l - t r) from what is on the left and, through the bond t, on the right.

    1 / l is a less what is on the left, at hand in fewer registers. Where a potential near 1e19 and more makes l vanish
    in float32, G does too.
    """
    square = l_re * l_re + l_im * l_im
    vanished = square == 0.0
    inverse = _reciprocal(tl.where(vanished, 1.0, square))
    g_re = l_re * inverse - t * r_re
    g_im = -l_im * inverse - t * r_im
    scale = tl.where(vanished, 0.0, _reciprocal(g_re * g_re + g_im * g_im))
    return g_re * scale, -g_im * scale


@kernel
def bidirectional_kernel(
    v_ptr, shift_ptr, bonds_ptr, out_ptr, length, heads: tl.constexpr, num_lanes, tolerance,
    PER_TOKEN: tl.constexpr, CHUNK: tl.constexpr, HALO: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """G_ii of one short chunk a lane: the sweep from the left stays in registers for the one from the right."""
    row = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < num_lanes
    head = lane % heads
    start = tl.where(inside, lane // heads * CHUNK, 0)
    base = row * length * heads + head
    shift_re, shift_im = tl.load(shift_ptr + 2 * head), tl.load(shift_ptr + 2 * head + 1)
    dtype: tl.constexpr = shift_re.dtype
    bond = shift_re if PER_TOKEN else tl.load(bonds_ptr + head)
    zero = tl.zeros_like(shift_re)
    l_re, l_im = _entering(
        v_ptr, bonds_ptr, bond, shift_re, shift_im, zero, zero, base, start, length, heads, tolerance,
        HALO, PER_TOKEN, False,
    )  # fmt: skip
    # Read from the right, the chunk begins where it ends; one that reaches over the row's end begins there.
    r_re, r_im = _entering(
        v_ptr, bonds_ptr, bond, shift_re, shift_im, zero, zero, base, tl.maximum(length - start - CHUNK, 0),
        length, heads, tolerance, HALO, PER_TOKEN, True,
    )  # fmt: skip
    v = _load(v_ptr, base, start, length, heads, CHUNK, False)
    t = _bonds(bonds_ptr, bond, base, start, length, heads, CHUNK, PER_TOKEN, False)
    t += _bonds(bonds_ptr, bond, base, start + CHUNK, length, heads, 1, PER_TOKEN, False)
    left_re, left_im = _sweep(v, t, shift_re, shift_im, l_re, l_im)
    re, im = (), ()
    for u in tl.static_range(CHUNK - 1, -1, -1):
        after = tl.where(start + u + 1 < length, t[u + 1], 0.0)
        g_re, g_im = _onto_diagonal(left_re[u], left_im[u], after, r_re, r_im)
        r_re, r_im = _ratio(v[u].to(dtype), shift_re, shift_im, after, r_re, r_im)
        re, im = (g_re,) + re, (g_im,) + im
    _store_pairs(out_ptr, base, start, length, heads, re, im, inside, False)


@triton.jit
def _adjoint_step(g_re, g_im, l_re, l_im, t, carry_re, carry_im):
    """abar = -conj(l^2) (g + carry), and the carry -t abar for the site before."""
    square_re = l_im * l_im - l_re * l_re
    square_im = 2.0 * l_re * l_im
    lambda_re = g_re + carry_re
    lambda_im = g_im + carry_im
    abar_re = square_re * lambda_re - square_im * lambda_im
    abar_im = square_re * lambda_im + square_im * lambda_re
    return abar_re, abar_im, -t * abar_re, -t * abar_im


@triton.jit
def _series_step(g_re, g_im, l_re, l_im, t, p_re, p_im, sum_re, sum_im):
    """p <- p t conj(l^2), sum <- sum + p g."""
    f_re = t * (l_re * l_re - l_im * l_im)
    f_im = -2.0 * t * l_re * l_im
    q_re = p_re * f_re - p_im * f_im
    q_im = p_re * f_im + p_im * f_re
    return q_re, q_im, sum_re + q_re * g_re - q_im * g_im, sum_im + q_re * g_im + q_im * g_re


@triton.jit
def _ratio_before(l_ptr, state_ptr, row, head, base, n, length, heads, REVERSE: tl.constexpr):
    """The ratio of site n - 1, or the state."""
    re, im = _load_pairs(l_ptr, base, n - 1, length, heads, 1, REVERSE)
    state = state_ptr + 2 * (row * heads + head)
    return tl.where(n == 0, tl.load(state), re[0]), tl.where(n == 0, tl.load(state + 1), im[0])


@kernel
def causal_adjoint_kernel(
    grad_ptr, l_ptr, bonds_ptr, state_ptr, v_bar_ptr, shift_part_ptr, bonds_bar_ptr, state_bar_ptr,
    length, heads: tl.constexpr, chunk, num_lanes, tolerance,
    PER_TOKEN: tl.constexpr, WANTS_BONDS: tl.constexpr, REVERSE: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """abar of one chunk a lane, from its last site to its first in sweep order, ``WIDTH`` at a time; the sums."""
    row = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < num_lanes
    head = lane % heads
    start = tl.where(inside, lane // heads * chunk, 0)
    base = row * length * heads + head
    zero = tl.load(state_ptr + 2 * (row * heads + head)) * 0.0
    bond = zero if PER_TOKEN else tl.load(bonds_ptr + head)
    end = start + chunk
    p_re = zero + 1.0
    p_im, carry_re, carry_im = zero, zero, zero
    ahead = 0
    pending = tl.max(((end < length) & inside).to(tl.int32), axis=0)
    while pending > 0:
        n = end + ahead
        g_re, g_im = _load_pairs(grad_ptr, base, n, length, heads, 8, REVERSE)
        l_re, l_im = _load_pairs(l_ptr, base, n, length, heads, 8, REVERSE)
        t = _bonds(bonds_ptr, bond, base, n, length, heads, 8, PER_TOKEN, REVERSE)
        for u in tl.static_range(8):
            p_re, p_im, carry_re, carry_im = _series_step(
                g_re[u], g_im[u], l_re[u], l_im[u], t[u], p_re, p_im, carry_re, carry_im
            )
        ahead += 8
        done = (p_re * p_re + p_im * p_im <= tolerance * tolerance) | (end + ahead >= length) | ~inside
        pending = tl.max((~done).to(tl.int32), axis=0)
    total_re, total_im, bond_total = zero, zero, zero
    for step in range(0, chunk, WIDTH):
        n = end - WIDTH - step
        g_re, g_im = _load_pairs(grad_ptr, base, n, length, heads, WIDTH, REVERSE)
        l_re, l_im = _load_pairs(l_ptr, base, n, length, heads, WIDTH, REVERSE)
        t = _bonds(bonds_ptr, bond, base, n, length, heads, WIDTH, PER_TOKEN, REVERSE)
        if WANTS_BONDS:
            before_re, before_im = _ratio_before(l_ptr, state_ptr, row, head, base, n, length, heads, REVERSE)
            l_re, l_im = (before_re,) + l_re, (before_im,) + l_im
        else:
            l_re, l_im = (zero,) + l_re, (zero,) + l_im
        v_bar, bonds_bar = (), ()
        sum_re, sum_im, bond_sum = zero, zero, zero
        for u in tl.static_range(WIDTH - 1, -1, -1):
            a_re, a_im, carry_re, carry_im = _adjoint_step(
                g_re[u], g_im[u], l_re[u + 1], l_im[u + 1], t[u], carry_re, carry_im
            )
            v_bar = (a_re,) + v_bar
            sum_re += a_re
            sum_im += a_im
            if WANTS_BONDS:
                bond_bar = -(l_re[u] * a_re + l_im[u] * a_im)
                bonds_bar = (bond_bar,) + bonds_bar
                bond_sum += bond_bar
        total_re += sum_re
        total_im += sum_im
        bond_total += bond_sum
        _store(v_bar_ptr, base, n, length, heads, v_bar, inside, REVERSE)
        if WANTS_BONDS and PER_TOKEN:
            _store(bonds_bar_ptr, base, n - 1 if REVERSE else n, length, heads, bonds_bar, inside, REVERSE)
    part = row * num_lanes + lane
    tl.store(shift_part_ptr + 2 * part, total_re, mask=inside)
    tl.store(shift_part_ptr + 2 * part + 1, total_im, mask=inside)
    if WANTS_BONDS and not PER_TOKEN:
        tl.store(bonds_bar_ptr + part, bond_total, mask=inside)
    first = inside & (start == 0)
    tl.store(state_bar_ptr + 2 * (row * heads + head), carry_re, mask=first)
    tl.store(state_bar_ptr + 2 * (row * heads + head) + 1, carry_im, mask=first)


@kernel
def tunnel_maps_kernel(w_ptr, maps_ptr, length, heads, chunk, num_lanes, LANES: tl.constexpr):
    """What each chunk does to m, as the entries of (m p + q) / (m r + s): products of [[1, w], [1, 1 + w]]."""
    row = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < num_lanes
    start = lane // heads * chunk
    base = row * length * heads + lane % heads
    p = tl.zeros([LANES], tl.float64) + 1.0
    q, r, s = p * 0.0, p * 0.0, p
    for step in range(0, chunk):
        n = start + step
        w = tl.load(w_ptr + base + n.to(tl.int64) * heads, mask=inside & (n < length), other=0.0).to(tl.float64)
        p, q = p + w * r, q + w * s
        r, s = p + r, q + s
        scale = 1.0 / (p + s)
        p, q, r, s = p * scale, q * scale, r * scale, s * scale
    at = maps_ptr + 4 * (row * num_lanes + lane)
    tl.store(at, p, mask=inside)
    tl.store(at + 1, q, mask=inside)
    tl.store(at + 2, r, mask=inside)
    tl.store(at + 3, s, mask=inside)


@kernel
def tunnel_adjoint_maps_kernel(grad_ptr, log_l_ptr, maps_ptr, length, heads, chunk, num_lanes, LANES: tl.constexpr):
    """What each chunk, from its last site to its first, does to s-bar: p s-bar + q."""
    row = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < num_lanes
    # Chunks and their maps are counted from the end of the row, in the order in which they are applied.
    end = length - lane // heads * chunk
    base = row * length * heads + lane % heads
    p = tl.zeros([LANES], tl.float64) + 1.0
    q = p * 0.0
    for step in range(0, chunk):
        n = end - 1 - step
        at = base + n.to(tl.int64) * heads
        here = inside & (n >= 0)
        decay = tl.exp(tl.load(log_l_ptr + at, mask=here, other=0.0).to(tl.float64))
        grad = tl.load(grad_ptr + at, mask=here, other=0.0).to(tl.float64)
        p = decay * decay * p
        q = decay * (decay * q - grad)
    at = maps_ptr + 4 * (row * num_lanes + lane)
    tl.store(at, p, mask=inside)
    tl.store(at + 1, q, mask=inside)
    tl.store(at + 2, q * 0.0, mask=inside)
    tl.store(at + 3, q * 0.0 + 1.0, mask=inside)


@kernel
def apply_maps_kernel(maps_ptr, state_ptr, entering_ptr, heads, num_chunks, num_chains, LANES: tl.constexpr):
    """The state that enters each chunk: one map after the other, chains side by side."""
    chain = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = chain < num_chains
    row, head = (chain // heads).to(tl.int64), chain % heads
    state = tl.load(state_ptr + chain, mask=inside, other=0.0).to(tl.float64)
    for index in range(0, num_chunks):
        at = (row * num_chunks + index) * heads + head
        tl.store(entering_ptr + at, state, mask=inside)
        p = tl.load(maps_ptr + 4 * at, mask=inside, other=0.0)
        q = tl.load(maps_ptr + 4 * at + 1, mask=inside, other=0.0)
        r = tl.load(maps_ptr + 4 * at + 2, mask=inside, other=0.0)
        s = tl.load(maps_ptr + 4 * at + 3, mask=inside, other=1.0)
        state = (p * state + q) / (r * state + s)


@kernel
def tunnel_kernel(w_ptr, entering_ptr, out_ptr, length, heads, chunk, num_lanes, LANES: tl.constexpr):
    """s_i = w_i + m_{i-1} of one chunk a lane, m in double precision; log1p is taken by the caller."""
    row = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < num_lanes
    start = lane // heads * chunk
    base = row * length * heads + lane % heads
    m = tl.load(entering_ptr + row * num_lanes + lane, mask=inside, other=0.0)
    for step in range(0, chunk):
        n = start + step
        at = base + n.to(tl.int64) * heads
        here = inside & (n < length)
        s = tl.load(w_ptr + at, mask=here, other=0.0).to(tl.float64) + m
        tl.store(out_ptr + at, s, mask=here)
        m = s / (1.0 + s)


@kernel
def tunnel_adjoint_kernel(
    grad_ptr, log_l_ptr, entering_ptr, out_ptr, length, heads, chunk, num_lanes, LANES: tl.constexpr
):
    """s-bar_i = l_i (l_i s-bar_{i+1} - g_i) of one chunk a lane, in double precision."""
    row = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < num_lanes
    end = length - lane // heads * chunk
    base = row * length * heads + lane % heads
    s_bar = tl.load(entering_ptr + row * num_lanes + lane, mask=inside, other=0.0)
    for step in range(0, chunk):
        n = end - 1 - step
        at = base + n.to(tl.int64) * heads
        here = inside & (n >= 0)
        decay = tl.exp(tl.load(log_l_ptr + at, mask=here, other=0.0).to(tl.float64))
        grad = tl.load(grad_ptr + at, mask=here, other=0.0).to(tl.float64)
        s_bar = decay * (decay * s_bar - grad)
        tl.store(out_ptr + at, s_bar, mask=here)
