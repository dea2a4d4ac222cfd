"""The Triton kernels behind ``gpu``, which explains them.

``base`` is the offset of a lane's row and head, ``n`` the first of its ``WIDTH`` sites in sweep order, from the row's
left end or with ``REVERSE`` from its right one. Bonds are stored with the right one of the two sites they join.

Tiles ``(LANES, WIDTH)`` lie as memory does, whichever way they are swept: what is read and written is then side by
side. Arithmetic takes eight of their columns at a time into registers, in sweep order.
"""

import triton
import triton.language as tl

from resnet_bk.ops.kernels import kernel


@triton.jit
def _columns(x, REVERSE: tl.constexpr):
    """The 8 columns of ``(LANES, 8)`` in sweep order: three rounds of splitting on the lowest bit of the index."""
    lanes: tl.constexpr = x.shape[0]
    even, odd = tl.split(tl.reshape(x, [lanes, 2, 2, 2]))
    x00, x10 = tl.split(even)
    x01, x11 = tl.split(odd)
    x0, x4 = tl.split(x00)
    x2, x6 = tl.split(x10)
    x1, x5 = tl.split(x01)
    x3, x7 = tl.split(x11)
    if REVERSE:
        x0, x1, x2, x3, x4, x5, x6, x7 = x7, x6, x5, x4, x3, x2, x1, x0
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _tile(x0, x1, x2, x3, x4, x5, x6, x7, REVERSE: tl.constexpr):
    """The inverse of ``_columns``."""
    lanes: tl.constexpr = x0.shape[0]
    if REVERSE:
        x0, x1, x2, x3, x4, x5, x6, x7 = x7, x6, x5, x4, x3, x2, x1, x0
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    return tl.reshape(tl.join(even, odd), [lanes, 8])


@triton.jit
def _halves(x, REVERSE: tl.constexpr):
    """The columns that are swept first, and the others."""
    lanes: tl.constexpr = x.shape[0]
    half: tl.constexpr = x.shape[1] // 2
    first, last = tl.split(tl.permute(tl.reshape(x, [lanes, 2, half]), (0, 2, 1)))
    if REVERSE:
        first, last = last, first
    return first, last


@triton.jit
def _rejoined(first, last, REVERSE: tl.constexpr):
    """The inverse of ``_halves``."""
    lanes: tl.constexpr = first.shape[0]
    width: tl.constexpr = 2 * first.shape[1]
    if REVERSE:
        first, last = last, first
    return tl.reshape(tl.permute(tl.join(first, last), (0, 2, 1)), [lanes, width])


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
def _ratio(v, shift_re, shift_im, t, l_re, l_im):
    """1 / (v + shift - t l)."""
    re = v + shift_re - t * l_re
    im = shift_im - t * l_im
    scale = _reciprocal(re * re + im * im)
    return re * scale, -im * scale


@triton.jit
def _walk(v, t, shift_re, shift_im, r_re, r_im, p, x):
    """One site further back; ``t`` is the bond to the site before it on the walk (0 at the walk's first)."""
    weight = t * (r_re * r_re + r_im * r_im)
    first = x == 0
    p = tl.where(first, p, p * weight)
    x = tl.where(first, -shift_im, -shift_im + weight * x)
    r_re, r_im = _ratio(v, shift_re, shift_im, t, r_re, r_im)
    return r_re, r_im, p, x


@triton.jit
def _first_token(n, length, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """Of sites n .. n + WIDTH - 1, as they lie in memory."""
    return length - WIDTH - n if REVERSE else n


@triton.jit
def _places(base, n, length, heads, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """Where sites n .. n + WIDTH - 1 lie, ``(LANES, WIDTH)``, and which of them are in the row."""
    tokens = _first_token(n, length, WIDTH, REVERSE)[:, None] + tl.arange(0, WIDTH)[None, :]
    return base[:, None] + tokens.to(tl.int64) * heads, (tokens >= 0) & (tokens < length)


@triton.jit
def _bond_places(base, n, length, heads, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """Where the bonds of sites n .. n + WIDTH - 1 to their earlier neighbours lie, and which are in the row."""
    tokens = _first_token(n, length, WIDTH, REVERSE)[:, None] + tl.arange(0, WIDTH)[None, :]
    if REVERSE:
        tokens += 1
    return base[:, None] + tokens.to(tl.int64) * heads, (tokens >= 0) & (tokens < length)


@triton.jit
def _pairs_in_a_row(base, n, length, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """Where the pairs of sites n .. n + WIDTH - 1 of the only head lie, ``(LANES, 2 WIDTH)``, and which are in the row.

    They lie side by side, said so that the compiler sees it: it would move 8 bytes at a time otherwise.
    """
    places = 2 * _first_token(n, length, WIDTH, REVERSE).to(tl.int64)[:, None] + tl.arange(0, 2 * WIDTH)[None, :]
    return 2 * base[:, None] + places, (places >= 0) & (places < 2 * length)


@triton.jit
def _pairs_apart(base, n, length, heads, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """Where the pairs of sites n .. n + WIDTH - 1 lie, ``(LANES, WIDTH, 2)``, and which of them are in the row."""
    at, inside = _places(base, n, length, heads, WIDTH, REVERSE)
    parts = tl.arange(0, 2)[None, None, :]
    return 2 * at[:, :, None] + parts, inside[:, :, None] & (parts < 2)


@triton.jit
def _load_tile(ptr, base, n, length, heads, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """Sites n .. n + WIDTH - 1; 0 outside of the row."""
    at, inside = _places(base, n, length, heads, WIDTH, REVERSE)
    return tl.load(ptr + at, mask=inside, other=0.0)


@triton.jit
def _load_pairs(
    ptr, base, n, length, heads, WIDTH: tl.constexpr, REVERSE: tl.constexpr, ONE_HEAD: tl.constexpr
):  # fmt: skip
    """Real and imaginary parts of sites n .. n + WIDTH - 1; 0 outside of the row."""
    if ONE_HEAD:
        at, inside = _pairs_in_a_row(base, n, length, WIDTH, REVERSE)
        pairs = tl.reshape(tl.load(ptr + at, mask=inside, other=0.0), [base.shape[0], WIDTH, 2])
    else:
        at, inside = _pairs_apart(base, n, length, heads, WIDTH, REVERSE)
        pairs = tl.load(ptr + at, mask=inside, other=0.0)
    return tl.split(pairs)


@triton.jit
def _store_pairs(ptr, base, n, length, heads, re, im, inside_lanes, REVERSE: tl.constexpr, ONE_HEAD: tl.constexpr):
    width: tl.constexpr = re.shape[1]
    if ONE_HEAD:
        at, inside = _pairs_in_a_row(base, n, length, width, REVERSE)
        pairs = tl.reshape(tl.join(re, im), [base.shape[0], 2 * width])
        tl.store(ptr + at, pairs, mask=inside & inside_lanes[:, None])
    else:
        at, inside = _pairs_apart(base, n, length, heads, width, REVERSE)
        tl.store(ptr + at, tl.join(re, im), mask=inside & inside_lanes[:, None, None])


@triton.jit
def _bonds_of(
    bonds_ptr, bond, base, n, length, heads, WIDTH: tl.constexpr, PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """The bonds to the earlier neighbour of sites n .. n + WIDTH - 1, 0 where there is none inside the row.

    ``(LANES, WIDTH)`` if each token has its own, else ``(LANES, 8)``, the same for every eight of them.
    """
    if PER_TOKEN:
        at, inside = _bond_places(base, n, length, heads, WIDTH, REVERSE)
        t = tl.load(bonds_ptr + at, mask=inside, other=0.0)
    else:
        t = tl.broadcast_to(bond[:, None], [bond.shape[0], 8])
    return t


@triton.jit
def _halves_of_bonds(t, PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr):
    if PER_TOKEN:
        first, last = _halves(t, REVERSE)
    else:
        first, last = t, t
    return first, last


@triton.jit
def _sweep_8(v, t, shift_re, shift_im, l_re, l_im, REVERSE: tl.constexpr):
    """Eight ratios: the tiles of their parts, and the last."""
    v0, v1, v2, v3, v4, v5, v6, v7 = _columns(v, REVERSE)
    t0, t1, t2, t3, t4, t5, t6, t7 = _columns(t, REVERSE)
    a0, b0 = _ratio(v0, shift_re, shift_im, t0, l_re, l_im)
    a1, b1 = _ratio(v1, shift_re, shift_im, t1, a0, b0)
    a2, b2 = _ratio(v2, shift_re, shift_im, t2, a1, b1)
    a3, b3 = _ratio(v3, shift_re, shift_im, t3, a2, b2)
    a4, b4 = _ratio(v4, shift_re, shift_im, t4, a3, b3)
    a5, b5 = _ratio(v5, shift_re, shift_im, t5, a4, b4)
    a6, b6 = _ratio(v6, shift_re, shift_im, t6, a5, b5)
    a7, b7 = _ratio(v7, shift_re, shift_im, t7, a6, b6)
    return (
        _tile(a0, a1, a2, a3, a4, a5, a6, a7, REVERSE), _tile(b0, b1, b2, b3, b4, b5, b6, b7, REVERSE), a7, b7,
    )  # fmt: skip


@triton.jit
def _sweep_16(v, t, shift_re, shift_im, l_re, l_im, PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr):
    v0, v1 = _halves(v, REVERSE)
    t0, t1 = _halves_of_bonds(t, PER_TOKEN, REVERSE)
    a0, b0, l_re, l_im = _sweep_8(v0, t0, shift_re, shift_im, l_re, l_im, REVERSE)
    a1, b1, l_re, l_im = _sweep_8(v1, t1, shift_re, shift_im, l_re, l_im, REVERSE)
    return _rejoined(a0, a1, REVERSE), _rejoined(b0, b1, REVERSE), l_re, l_im


@triton.jit
def _sweep_32(v, t, shift_re, shift_im, l_re, l_im, PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr):
    v0, v1 = _halves(v, REVERSE)
    t0, t1 = _halves_of_bonds(t, PER_TOKEN, REVERSE)
    a0, b0, l_re, l_im = _sweep_16(v0, t0, shift_re, shift_im, l_re, l_im, PER_TOKEN, REVERSE)
    a1, b1, l_re, l_im = _sweep_16(v1, t1, shift_re, shift_im, l_re, l_im, PER_TOKEN, REVERSE)
    return _rejoined(a0, a1, REVERSE), _rejoined(b0, b1, REVERSE), l_re, l_im


@triton.jit
def _masked_ratio(v, shift_re, shift_im, t, l_re, l_im, n):
    re, im = _ratio(v, shift_re, shift_im, t, l_re, l_im)
    return tl.where(n >= 0, re, l_re), tl.where(n >= 0, im, l_im)


@triton.jit
def _walk_8(v, t, begins, shift_re, shift_im, r_re, r_im, p, x, REVERSE: tl.constexpr):
    """Eight sites back. Site j is joined to the walk's last one, j + 1, by the bond stored with j + 1."""
    v0, v1, v2, v3, v4, v5, v6, v7 = _columns(v, REVERSE)
    t0, t1, t2, t3, t4, t5, t6, t7 = _columns(t, REVERSE)
    last_bond = t7
    if begins:
        t7 = tl.zeros_like(t7)
    r_re, r_im, p, x = _walk(v7, t7, shift_re, shift_im, r_re, r_im, p, x)
    r_re, r_im, p, x = _walk(v6, t6, shift_re, shift_im, r_re, r_im, p, x)
    r_re, r_im, p, x = _walk(v5, t5, shift_re, shift_im, r_re, r_im, p, x)
    r_re, r_im, p, x = _walk(v4, t4, shift_re, shift_im, r_re, r_im, p, x)
    r_re, r_im, p, x = _walk(v3, t3, shift_re, shift_im, r_re, r_im, p, x)
    r_re, r_im, p, x = _walk(v2, t2, shift_re, shift_im, r_re, r_im, p, x)
    r_re, r_im, p, x = _walk(v1, t1, shift_re, shift_im, r_re, r_im, p, x)
    r_re, r_im, p, x = _walk(v0, t0, shift_re, shift_im, r_re, r_im, p, x)
    if begins:
        # From here on p counts the bond that leads into the chunk.
        p = p * last_bond
    return r_re, r_im, p, x


@triton.jit
def _masked_8(v, t, shift_re, shift_im, l_re, l_im, n, REVERSE: tl.constexpr):
    """Eight ratios of which those before the row's first site are left out: the last."""
    v0, v1, v2, v3, v4, v5, v6, v7 = _columns(v, REVERSE)
    t0, t1, t2, t3, t4, t5, t6, t7 = _columns(t, REVERSE)
    l_re, l_im = _masked_ratio(v0, shift_re, shift_im, t0, l_re, l_im, n)
    l_re, l_im = _masked_ratio(v1, shift_re, shift_im, t1, l_re, l_im, n + 1)
    l_re, l_im = _masked_ratio(v2, shift_re, shift_im, t2, l_re, l_im, n + 2)
    l_re, l_im = _masked_ratio(v3, shift_re, shift_im, t3, l_re, l_im, n + 3)
    l_re, l_im = _masked_ratio(v4, shift_re, shift_im, t4, l_re, l_im, n + 4)
    l_re, l_im = _masked_ratio(v5, shift_re, shift_im, t5, l_re, l_im, n + 5)
    l_re, l_im = _masked_ratio(v6, shift_re, shift_im, t6, l_re, l_im, n + 6)
    l_re, l_im = _masked_ratio(v7, shift_re, shift_im, t7, l_re, l_im, n + 7)
    return l_re, l_im


@triton.jit
def _entering(
    v_ptr, bonds_ptr, bond, shift_re, shift_im, state_re, state_im, base, start, length, heads, tolerance,
    HALO: tl.constexpr, PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The ratio before ``start`` in sweep order: of a halo that is long enough, or of the row from its beginning.

    ``HALO`` sites, 8 or 16, are read at a time.
    """
    dtype: tl.constexpr = shift_re.dtype
    r_re = tl.zeros_like(shift_re)
    r_im = tl.zeros_like(shift_re)
    p = tl.zeros_like(shift_re) + 1.0
    x = tl.zeros_like(shift_re)
    halo = 0
    pending = tl.max((start > 0).to(tl.int32), axis=0)
    while pending > 0:
        halo += HALO
        n = start - halo
        v = _load_tile(v_ptr, base, n, length, heads, HALO, REVERSE).to(dtype)
        t = _bonds_of(bonds_ptr, bond, base, n + 1, length, heads, HALO, PER_TOKEN, REVERSE)
        if HALO == 16:
            v0, v1 = _halves(v, REVERSE)
            t0, t1 = _halves_of_bonds(t, PER_TOKEN, REVERSE)
            r_re, r_im, p, x = _walk_8(v1, t1, halo == HALO, shift_re, shift_im, r_re, r_im, p, x, REVERSE)
            r_re, r_im, p, x = _walk_8(v0, t0, False, shift_re, shift_im, r_re, r_im, p, x, REVERSE)
        else:
            r_re, r_im, p, x = _walk_8(v, t, halo == HALO, shift_re, shift_im, r_re, r_im, p, x, REVERSE)
        far_enough = (p <= tolerance * x * -shift_im) | (start <= halo)
        pending = tl.max((~far_enough).to(tl.int32), axis=0)
    from_the_beginning = start <= halo
    l_re = tl.where(from_the_beginning, state_re, 0.0)
    l_im = tl.where(from_the_beginning, state_im, 0.0)
    for back in range(0, halo, HALO):
        n = start - halo + back
        v = _load_tile(v_ptr, base, n, length, heads, HALO, REVERSE).to(dtype)
        t = _bonds_of(bonds_ptr, bond, base, n, length, heads, HALO, PER_TOKEN, REVERSE)
        if HALO == 16:
            v0, v1 = _halves(v, REVERSE)
            t0, t1 = _halves_of_bonds(t, PER_TOKEN, REVERSE)
            l_re, l_im = _masked_8(v0, t0, shift_re, shift_im, l_re, l_im, n, REVERSE)
            l_re, l_im = _masked_8(v1, t1, shift_re, shift_im, l_re, l_im, n + 8, REVERSE)
        else:
            l_re, l_im = _masked_8(v, t, shift_re, shift_im, l_re, l_im, n, REVERSE)
    return l_re, l_im


@kernel
def causal_kernel(
    v_ptr, shift_ptr, bonds_ptr, state_ptr, out_ptr, length, heads, chunk, num_lanes, tolerance,
    PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr, ONE_HEAD: tl.constexpr, WIDTH: tl.constexpr, HALO: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """l_i of one chunk a lane, 8 or 32 sites at a time."""
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
        v = _load_tile(v_ptr, base, n, length, heads, WIDTH, REVERSE).to(shift_re.dtype)
        t = _bonds_of(bonds_ptr, bond, base, n, length, heads, WIDTH, PER_TOKEN, REVERSE)
        if WIDTH == 32:
            re, im, l_re, l_im = _sweep_32(v, t, shift_re, shift_im, l_re, l_im, PER_TOKEN, REVERSE)
        else:
            re, im, l_re, l_im = _sweep_8(v, t, shift_re, shift_im, l_re, l_im, REVERSE)
        _store_pairs(out_ptr, base, n, length, heads, re, im, inside, REVERSE, ONE_HEAD)


@triton.jit
def _sweep_back(v, t, shift_re, shift_im, l_re, l_im, r_re, r_im):
    """Eight times, from the last site to the first: G = 1 / (1 / l - t r) into l's place, then r = 1 / (a - t r).

    1 / l is a less what is on the left, at hand in fewer registers. Where a potential near 1e19 and more makes l vanish
    in float32, G does too.
    """
    v0, v1, v2, v3, v4, v5, v6, v7 = _columns(v, False)
    t0, t1, t2, t3, t4, t5, t6, t7 = _columns(t, False)
    b7, d7 = r_re, r_im
    b6, d6 = _ratio(v7, shift_re, shift_im, t7, b7, d7)
    b5, d5 = _ratio(v6, shift_re, shift_im, t6, b6, d6)
    b4, d4 = _ratio(v5, shift_re, shift_im, t5, b5, d5)
    b3, d3 = _ratio(v4, shift_re, shift_im, t4, b4, d4)
    b2, d2 = _ratio(v3, shift_re, shift_im, t3, b3, d3)
    b1, d1 = _ratio(v2, shift_re, shift_im, t2, b2, d2)
    b0, d0 = _ratio(v1, shift_re, shift_im, t1, b1, d1)
    r_re, r_im = _ratio(v0, shift_re, shift_im, t0, b0, d0)
    square = l_re * l_re + l_im * l_im
    vanished = square == 0.0
    inverse = _reciprocal(tl.where(vanished, 1.0, square))
    g_re = l_re * inverse - t * _tile(b0, b1, b2, b3, b4, b5, b6, b7, False)
    g_im = -l_im * inverse - t * _tile(d0, d1, d2, d3, d4, d5, d6, d7, False)
    scale = tl.where(vanished, 0.0, _reciprocal(g_re * g_re + g_im * g_im))
    return g_re * scale, -g_im * scale, r_re, r_im


@triton.jit
def _next_bonds(bonds_ptr, bond, base, n, length, heads, PER_TOKEN: tl.constexpr):
    """The bonds to the later neighbour of sites n .. n+7; 0 where the row ends."""
    t = _bonds_of(bonds_ptr, bond, base, n + 1, length, heads, 8, PER_TOKEN, False)
    columns = n[:, None] + 1 + tl.arange(0, 8)[None, :]
    return tl.where(columns < length, t, 0.0)


@kernel
def bidirectional_kernel(
    v_ptr, shift_ptr, bonds_ptr, out_ptr, length, heads, num_lanes, tolerance,
    PER_TOKEN: tl.constexpr, ONE_HEAD: tl.constexpr, HALO: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """G_ii of one chunk of 32 tokens a lane: the sweep from the left stays in registers for the one from the right."""
    row = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < num_lanes
    head = lane % heads
    start = tl.where(inside, lane // heads * 32, 0)
    base = row * length * heads + head
    shift_re, shift_im = tl.load(shift_ptr + 2 * head), tl.load(shift_ptr + 2 * head + 1)
    dtype: tl.constexpr = shift_re.dtype
    bond = shift_re if PER_TOKEN else tl.load(bonds_ptr + head)
    zero = tl.zeros_like(shift_re)
    l_re, l_im = _entering(
        v_ptr, bonds_ptr, bond, shift_re, shift_im, zero, zero, base, start, length, heads, tolerance,
        HALO, PER_TOKEN, False,
    )  # fmt: skip
    n0, n1, n2, n3 = start, start + 8, start + 16, start + 24
    v0 = _load_tile(v_ptr, base, n0, length, heads, 8, False).to(dtype)
    v1 = _load_tile(v_ptr, base, n1, length, heads, 8, False).to(dtype)
    v2 = _load_tile(v_ptr, base, n2, length, heads, 8, False).to(dtype)
    v3 = _load_tile(v_ptr, base, n3, length, heads, 8, False).to(dtype)
    t0 = _bonds_of(bonds_ptr, bond, base, n0, length, heads, 8, PER_TOKEN, False)
    t1 = _bonds_of(bonds_ptr, bond, base, n1, length, heads, 8, PER_TOKEN, False)
    t2 = _bonds_of(bonds_ptr, bond, base, n2, length, heads, 8, PER_TOKEN, False)
    t3 = _bonds_of(bonds_ptr, bond, base, n3, length, heads, 8, PER_TOKEN, False)
    a0, b0, l_re, l_im = _sweep_8(v0, t0, shift_re, shift_im, l_re, l_im, False)
    a1, b1, l_re, l_im = _sweep_8(v1, t1, shift_re, shift_im, l_re, l_im, False)
    a2, b2, l_re, l_im = _sweep_8(v2, t2, shift_re, shift_im, l_re, l_im, False)
    a3, b3, l_re, l_im = _sweep_8(v3, t3, shift_re, shift_im, l_re, l_im, False)
    # Read from the right, the chunk begins where it ends; one that reaches over the row's end begins there.
    r_re, r_im = _entering(
        v_ptr, bonds_ptr, bond, shift_re, shift_im, zero, zero, base, tl.maximum(length - start - 32, 0),
        length, heads, tolerance, HALO, PER_TOKEN, True,
    )  # fmt: skip
    t3 = _next_bonds(bonds_ptr, bond, base, n3, length, heads, PER_TOKEN)
    t2 = _next_bonds(bonds_ptr, bond, base, n2, length, heads, PER_TOKEN)
    t1 = _next_bonds(bonds_ptr, bond, base, n1, length, heads, PER_TOKEN)
    t0 = _next_bonds(bonds_ptr, bond, base, n0, length, heads, PER_TOKEN)
    re, im, r_re, r_im = _sweep_back(v3, t3, shift_re, shift_im, a3, b3, r_re, r_im)
    _store_pairs(out_ptr, base, n3, length, heads, re, im, inside, False, ONE_HEAD)
    re, im, r_re, r_im = _sweep_back(v2, t2, shift_re, shift_im, a2, b2, r_re, r_im)
    _store_pairs(out_ptr, base, n2, length, heads, re, im, inside, False, ONE_HEAD)
    re, im, r_re, r_im = _sweep_back(v1, t1, shift_re, shift_im, a1, b1, r_re, r_im)
    _store_pairs(out_ptr, base, n1, length, heads, re, im, inside, False, ONE_HEAD)
    re, im, r_re, r_im = _sweep_back(v0, t0, shift_re, shift_im, a0, b0, r_re, r_im)
    _store_pairs(out_ptr, base, n0, length, heads, re, im, inside, False, ONE_HEAD)


@triton.jit
def _shifted(re, im, before_re, before_im, REVERSE: tl.constexpr):
    """Each column's predecessor in sweep order; the first one's is given."""
    a0, a1, a2, a3, a4, a5, a6, _a7 = _columns(re, REVERSE)
    b0, b1, b2, b3, b4, b5, b6, _b7 = _columns(im, REVERSE)
    return (
        _tile(before_re, a0, a1, a2, a3, a4, a5, a6, REVERSE), _tile(before_im, b0, b1, b2, b3, b4, b5, b6, REVERSE),
    )  # fmt: skip


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
def _adjoint_8(g_re, g_im, l_re, l_im, t, carry_re, carry_im, REVERSE: tl.constexpr):
    """Eight sites back: the tiles of abar's parts, their sums, and the carry."""
    g_re, g_im, l_re, l_im = (
        _columns(g_re, REVERSE), _columns(g_im, REVERSE), _columns(l_re, REVERSE), _columns(l_im, REVERSE),
    )  # fmt: skip
    t = _columns(t, REVERSE)
    a7, b7, carry_re, carry_im = _adjoint_step(g_re[7], g_im[7], l_re[7], l_im[7], t[7], carry_re, carry_im)
    a6, b6, carry_re, carry_im = _adjoint_step(g_re[6], g_im[6], l_re[6], l_im[6], t[6], carry_re, carry_im)
    a5, b5, carry_re, carry_im = _adjoint_step(g_re[5], g_im[5], l_re[5], l_im[5], t[5], carry_re, carry_im)
    a4, b4, carry_re, carry_im = _adjoint_step(g_re[4], g_im[4], l_re[4], l_im[4], t[4], carry_re, carry_im)
    a3, b3, carry_re, carry_im = _adjoint_step(g_re[3], g_im[3], l_re[3], l_im[3], t[3], carry_re, carry_im)
    a2, b2, carry_re, carry_im = _adjoint_step(g_re[2], g_im[2], l_re[2], l_im[2], t[2], carry_re, carry_im)
    a1, b1, carry_re, carry_im = _adjoint_step(g_re[1], g_im[1], l_re[1], l_im[1], t[1], carry_re, carry_im)
    a0, b0, carry_re, carry_im = _adjoint_step(g_re[0], g_im[0], l_re[0], l_im[0], t[0], carry_re, carry_im)
    total_re = ((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7))
    total_im = ((b0 + b1) + (b2 + b3)) + ((b4 + b5) + (b6 + b7))
    a = _tile(a0, a1, a2, a3, a4, a5, a6, a7, REVERSE)
    b = _tile(b0, b1, b2, b3, b4, b5, b6, b7, REVERSE)
    return a, b, total_re, total_im, carry_re, carry_im


@triton.jit
def _bonds_bar_8(
    l_ptr, state_ptr, bonds_bar_ptr, row, head, base, n, length, heads, l_re, l_im, a, b, inside,
    PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The gradients of eight sites' bonds, written if each token has its own: their sum."""
    at_start = n == 0
    token = tl.where(at_start, 0, n - 1)
    token = length - 1 - token if REVERSE else token
    known = (n > 0) & (n <= length)
    before_ptr = l_ptr + 2 * (base + token.to(tl.int64) * heads)
    before_re = tl.load(before_ptr, mask=known, other=0.0)
    before_im = tl.load(before_ptr + 1, mask=known, other=0.0)
    before_re = tl.where(at_start, tl.load(state_ptr + 2 * (row * heads + head)), before_re)
    before_im = tl.where(at_start, tl.load(state_ptr + 2 * (row * heads + head) + 1), before_im)
    previous_re, previous_im = _shifted(l_re, l_im, before_re, before_im, REVERSE)
    bonds_bar = -(previous_re * a + previous_im * b)
    if PER_TOKEN:
        at, in_row = _bond_places(base, n, length, heads, 8, REVERSE)
        _at, is_site = _places(base, n, length, heads, 8, REVERSE)
        tl.store(bonds_bar_ptr + at, bonds_bar, mask=in_row & is_site & inside[:, None])
    return tl.sum(bonds_bar, axis=1)


@kernel
def causal_adjoint_kernel(
    grad_ptr, l_ptr, bonds_ptr, state_ptr, v_bar_ptr, shift_part_ptr, bonds_bar_ptr, state_bar_ptr,
    length, heads, chunk, num_lanes, tolerance,
    PER_TOKEN: tl.constexpr, WANTS_BONDS: tl.constexpr, REVERSE: tl.constexpr, ONE_HEAD: tl.constexpr,
    WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """abar of one chunk a lane, from its last site to its first in sweep order, 8 or 16 at a time; the shift's sums."""
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
    p_im = zero
    carry_re = zero
    carry_im = zero
    ahead = 0
    pending = tl.max(((end < length) & inside).to(tl.int32), axis=0)
    while pending > 0:
        n = end + ahead
        g_re, g_im = _load_pairs(grad_ptr, base, n, length, heads, 8, REVERSE, ONE_HEAD)
        l_re, l_im = _load_pairs(l_ptr, base, n, length, heads, 8, REVERSE, ONE_HEAD)
        g_re, g_im, l_re, l_im = (
            _columns(g_re, REVERSE), _columns(g_im, REVERSE), _columns(l_re, REVERSE), _columns(l_im, REVERSE),
        )  # fmt: skip
        t = _columns(_bonds_of(bonds_ptr, bond, base, n, length, heads, 8, PER_TOKEN, REVERSE), REVERSE)
        for u in tl.static_range(8):
            p_re, p_im, carry_re, carry_im = _series_step(
                g_re[u], g_im[u], l_re[u], l_im[u], t[u], p_re, p_im, carry_re, carry_im
            )
        ahead += 8
        done = (p_re * p_re + p_im * p_im <= tolerance * tolerance) | (end + ahead >= length) | ~inside
        pending = tl.max((~done).to(tl.int32), axis=0)
    total_re = zero
    total_im = zero
    bond_total = zero
    for step in range(0, chunk, WIDTH):
        n = end - WIDTH - step
        g_re, g_im = _load_pairs(grad_ptr, base, n, length, heads, WIDTH, REVERSE, ONE_HEAD)
        l_re, l_im = _load_pairs(l_ptr, base, n, length, heads, WIDTH, REVERSE, ONE_HEAD)
        t = _bonds_of(bonds_ptr, bond, base, n, length, heads, WIDTH, PER_TOKEN, REVERSE)
        if WIDTH == 16:
            g0_re, g1_re = _halves(g_re, REVERSE)
            g0_im, g1_im = _halves(g_im, REVERSE)
            l0_re, l1_re = _halves(l_re, REVERSE)
            l0_im, l1_im = _halves(l_im, REVERSE)
            t0, t1 = _halves_of_bonds(t, PER_TOKEN, REVERSE)
            a1, b1, sum1_re, sum1_im, carry_re, carry_im = _adjoint_8(
                g1_re, g1_im, l1_re, l1_im, t1, carry_re, carry_im, REVERSE
            )
            a0, b0, sum0_re, sum0_im, carry_re, carry_im = _adjoint_8(
                g0_re, g0_im, l0_re, l0_im, t0, carry_re, carry_im, REVERSE
            )
            a = _rejoined(a0, a1, REVERSE)
            total_re += sum1_re + sum0_re
            total_im += sum1_im + sum0_im
            if WANTS_BONDS:
                bond_total += _bonds_bar_8(
                    l_ptr, state_ptr, bonds_bar_ptr, row, head, base, n + 8, length, heads, l1_re, l1_im, a1, b1,
                    inside, PER_TOKEN, REVERSE,
                )  # fmt: skip
                bond_total += _bonds_bar_8(
                    l_ptr, state_ptr, bonds_bar_ptr, row, head, base, n, length, heads, l0_re, l0_im, a0, b0,
                    inside, PER_TOKEN, REVERSE,
                )  # fmt: skip
        else:
            a, b, sum_re, sum_im, carry_re, carry_im = _adjoint_8(
                g_re, g_im, l_re, l_im, t, carry_re, carry_im, REVERSE
            )
            total_re += sum_re
            total_im += sum_im
            if WANTS_BONDS:
                bond_total += _bonds_bar_8(
                    l_ptr, state_ptr, bonds_bar_ptr, row, head, base, n, length, heads, l_re, l_im, a, b,
                    inside, PER_TOKEN, REVERSE,
                )  # fmt: skip
        at, in_row = _places(base, n, length, heads, WIDTH, REVERSE)
        tl.store(v_bar_ptr + at, a, mask=in_row & inside[:, None])
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
