"""The Triton kernels behind ``gpu``, which explains them; the formulas are in ``chunked``.

A program has one chunk of C tokens of one chain (row and head), but for the scan, which goes over a chain's chunks.
Tokens lie ``stride_n`` apart, heads ``stride_h`` and rows ``stride_b``. Products of float32 tiles take three tf32 ones.
"""

import triton
import triton.language as tl

from resnet_bk.ops.kernels import kernel


@triton.jit
def _decays(log_l, starts, row, head, first, length, heads: tl.constexpr, HAS_STARTS: tl.constexpr, C: tl.constexpr):
    """log l, L as a float32 and what that leaves out, and the starts up to each token; behind the last, no decay."""
    token = first + tl.arange(0, C)
    there = token < length
    log = tl.load(log_l + (row * length + token) * heads + head, mask=there, other=0.0)
    wide = tl.cumsum(log.to(tl.float64), 0)
    high = wide.to(tl.float32)
    low = (wide - high.to(tl.float64)).to(tl.float32)
    if HAS_STARTS:
        cuts = tl.cumsum(tl.load(starts + row * length + token, mask=there, other=0).to(tl.int32), 0)
    else:
        cuts = tl.zeros([C], tl.int32)
    return log, high, low, cuts


@triton.jit
def _last(x, C: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, x, 0), 0)


@triton.jit
def _to_exit(log, high, low, cuts, C: tl.constexpr):
    """exp(L_C - L_j + log l_j), 0 across a start."""
    decay = tl.exp((_last(high, C) - high) + ((_last(low, C) - low) + log))
    return tl.where(cuts == _last(cuts, C), decay, 0.0)


@triton.jit
def _from_entry(high, low, cuts):
    """exp(L_i), 0 behind a start."""
    return tl.where(cuts == 0, tl.exp(high + low), 0.0)


@triton.jit
def _between(log, high, low, cuts, C: tl.constexpr):
    """exp(L_i - L_j + log l_j) for j <= i, 0 across a start."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    related = (j <= i) & (cuts[:, None] == cuts[None, :])
    difference = (high[:, None] - high[None, :]) + ((low[:, None] - low[None, :]) + log[None, :])
    return tl.where(related, tl.exp(tl.where(related, difference, 0.0)), 0.0)


@triton.jit
def _load(x, stride_b, stride_n, stride_h, row, head, first, length, size, C: tl.constexpr, SIZE: tl.constexpr):
    token, column = first + tl.arange(0, C), tl.arange(0, SIZE)
    where = row * stride_b + token[:, None].to(tl.int64) * stride_n + head * stride_h + column[None, :]
    return tl.load(x + where, mask=(token[:, None] < length) & (column[None, :] < size), other=0.0)


@triton.jit
def _store(x, value, row, head, first, length, heads, size, C: tl.constexpr, SIZE: tl.constexpr):
    """Into a contiguous ``(B, N, H, size)``."""
    token, column = first + tl.arange(0, C), tl.arange(0, SIZE)
    where = ((row * length + token[:, None]).to(tl.int64) * heads + head) * size + column[None, :]
    mask = (token[:, None] < length) & (column[None, :] < size)
    tl.store(x + where, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _load_state(x, index, key_size, value_size, K: tl.constexpr, V: tl.constexpr):
    key, value = tl.arange(0, K)[:, None], tl.arange(0, V)[None, :]
    where = index.to(tl.int64) * key_size * value_size + key * value_size + value
    return tl.load(x + where, mask=(key < key_size) & (value < value_size), other=0.0)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@kernel
def written_kernel(
    x,
    xb,
    xn,
    xh,
    y,
    yb,
    yn,
    yh,
    log_l,
    starts,
    written,
    through,
    length,
    num_chunks,
    heads: tl.constexpr,
    x_size: tl.constexpr,
    y_size: tl.constexpr,
    ENTRY: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    X: tl.constexpr,
    Y: tl.constexpr,
):
    """sum_j w_j x_j y_j^T of a chunk, w from each token to the exit (k, v) or with ENTRY from the entry (q, o')."""
    program = tl.program_id(0)
    chain, chunk = program // num_chunks, program % num_chunks
    row, head = (chain // heads).to(tl.int64), chain % heads
    log, high, low, cuts = _decays(log_l, starts, row, head, chunk * C, length, heads, HAS_STARTS, C)
    weight = _from_entry(high, low, cuts) if ENTRY else _to_exit(log, high, low, cuts, C)
    left = _load(x, xb, xn, xh, row, head, chunk * C, length, x_size, C, X)
    right = _load(y, yb, yn, yh, row, head, chunk * C, length, y_size, C, Y)
    weighted = (left.to(tl.float32) * weight[:, None]).to(left.dtype)
    product = _dot(tl.trans(weighted), right.to(left.dtype), PRECISION)
    key, value = tl.arange(0, X)[:, None], tl.arange(0, Y)[None, :]
    where = program.to(tl.int64) * x_size * y_size + key * y_size + value
    tl.store(written + where, product, mask=(key < x_size) & (value < y_size))
    tl.store(through + program, _last(_from_entry(high, low, cuts), C))


@kernel
def scan_kernel(
    written,
    through,
    state,
    before,
    last,
    num_chunks,
    size,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The state before each chunk and behind the last, a block of its entries: S <- through S + written.

    Four chunks are read ahead of the four that are added up, or the sum would wait for memory at each.
    """
    chain = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = entry < size
    step = -1 if REVERSE else 1
    chunk = chain * num_chunks + (num_chunks - 1 if REVERSE else 0)
    now = tl.load(state + chain * size + entry, mask=there, other=0.0)
    for begin in range(0, num_chunks, 4):
        c0, c1, c2, c3 = chunk, chunk + step, chunk + 2 * step, chunk + 3 * step
        in1, in2, in3 = begin + 1 < num_chunks, begin + 2 < num_chunks, begin + 3 < num_chunks
        w0 = tl.load(written + c0 * size + entry, mask=there, other=0.0)
        w1 = tl.load(written + c1 * size + entry, mask=there & in1, other=0.0)
        w2 = tl.load(written + c2 * size + entry, mask=there & in2, other=0.0)
        w3 = tl.load(written + c3 * size + entry, mask=there & in3, other=0.0)
        t0 = tl.load(through + c0)
        t1 = tl.load(through + c1, mask=in1, other=1.0)
        t2 = tl.load(through + c2, mask=in2, other=1.0)
        t3 = tl.load(through + c3, mask=in3, other=1.0)
        tl.store(before + c0 * size + entry, now.to(before.dtype.element_ty), mask=there)
        now = t0 * now + w0
        tl.store(before + c1 * size + entry, now.to(before.dtype.element_ty), mask=there & in1)
        now = t1 * now + w1
        tl.store(before + c2 * size + entry, now.to(before.dtype.element_ty), mask=there & in2)
        now = t2 * now + w2
        tl.store(before + c3 * size + entry, now.to(before.dtype.element_ty), mask=there & in3)
        now = t3 * now + w3
        chunk += 4 * step
    tl.store(last + chain * size + entry, now, mask=there)


@kernel
def output_kernel(
    q,
    qb,
    qn,
    qh,
    k,
    kb,
    kn,
    kh,
    v,
    vb,
    vn,
    vh,
    log_l,
    starts,
    entry,
    skip,
    o,
    length,
    num_chunks,
    heads: tl.constexpr,
    key_size: tl.constexpr,
    value_size: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
):
    """o of a chunk: pairs inside it, what the state that enters it gives, and each token's own v."""
    program = tl.program_id(0)
    chain, chunk = program // num_chunks, program % num_chunks
    row, head = (chain // heads).to(tl.int64), chain % heads
    first = chunk * C
    log, high, low, cuts = _decays(log_l, starts, row, head, first, length, heads, HAS_STARTS, C)
    q_ = _load(q, qb, qn, qh, row, head, first, length, key_size, C, K)
    k_ = _load(k, kb, kn, kh, row, head, first, length, key_size, C, K)
    v_ = _load(v, vb, vn, vh, row, head, first, length, value_size, C, V)
    state = _load_state(entry, program, key_size, value_size, K, V)
    pairs = _dot(q_, tl.trans(k_), PRECISION) * _between(log, high, low, cuts, C)
    result = _dot(q_, state.to(q_.dtype), PRECISION) * _from_entry(high, low, cuts)[:, None]
    result += _dot(pairs.to(v_.dtype), v_, PRECISION)
    if HAS_SKIP:
        result += tl.load(skip + head) * v_.to(tl.float32)
    _store(o, result, row, head, first, length, heads, value_size, C, V)


@kernel
def adjoint_kernel(
    grad,
    gb,
    gn,
    gh,
    q,
    qb,
    qn,
    qh,
    k,
    kb,
    kn,
    kh,
    v,
    vb,
    vn,
    vh,
    log_l,
    starts,
    entry,
    leaving,
    through,
    skip,
    grad_q,
    grad_k,
    grad_v,
    grad_log,
    grad_skip,
    length,
    num_chunks,
    heads: tl.constexpr,
    key_size: tl.constexpr,
    value_size: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
):
    """All gradients of a chunk, from the state that enters it and the gradient of the one that leaves it."""
    program = tl.program_id(0)
    chain, chunk = program // num_chunks, program % num_chunks
    row, head = (chain // heads).to(tl.int64), chain % heads
    first = chunk * C
    log, high, low, cuts = _decays(log_l, starts, row, head, first, length, heads, HAS_STARTS, C)
    between, to_exit = _between(log, high, low, cuts, C), _to_exit(log, high, low, cuts, C)[:, None]
    q_ = _load(q, qb, qn, qh, row, head, first, length, key_size, C, K)
    k_ = _load(k, kb, kn, kh, row, head, first, length, key_size, C, K)
    v_ = _load(v, vb, vn, vh, row, head, first, length, value_size, C, V)
    grad_ = _load(grad, gb, gn, gh, row, head, first, length, value_size, C, V).to(v_.dtype)
    entry_ = _load_state(entry, program, key_size, value_size, K, V).to(v_.dtype)
    leaving_ = _load_state(leaving, program, key_size, value_size, K, V).to(v_.dtype)

    pairs = _dot(q_, tl.trans(k_), PRECISION) * between
    products = _dot(grad_, tl.trans(v_), PRECISION)
    bar_v = _dot(k_, leaving_, PRECISION) * to_exit + _dot(tl.trans(pairs.to(v_.dtype)), grad_, PRECISION)
    if HAS_SKIP:
        bar_v += tl.load(skip + head) * grad_.to(tl.float32)
    _store(grad_v, bar_v, row, head, first, length, heads, value_size, C, V)

    grad_pairs = (products * between).to(q_.dtype)
    from_state = _dot(grad_, tl.trans(entry_), PRECISION) * _from_entry(high, low, cuts)[:, None]
    bar_q = from_state + _dot(grad_pairs, k_, PRECISION)
    _store(grad_q, bar_q, row, head, first, length, heads, key_size, C, K)
    to_state = _dot(v_, tl.trans(leaving_), PRECISION) * to_exit
    bar_k = to_state + _dot(tl.trans(grad_pairs), q_, PRECISION)
    _store(grad_k, bar_k, row, head, first, length, heads, key_size, C, K)

    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if HAS_SKIP:
        tl.store(grad_skip + program, tl.sum(tl.sum(tl.where(i == j, products, 0.0), 1), 0))
    crossing = tl.where(i == j, 0.0, products * pairs)
    read = tl.sum(from_state * q_.to(tl.float32), 1)
    kept = tl.sum(to_state * k_.to(tl.float32), 1)
    there = tl.sum(bar_k * k_.to(tl.float32), 1)  # l_t of what is written at t
    # Pairs j < t <= i: all that are read at or after t, less those that were also written there.
    later = tl.sum(crossing, 1) + read
    at_or_after = tl.sum(tl.where(i >= j, later[:, None], 0.0), 0)
    written_there = tl.sum(tl.where(i <= j, tl.sum(crossing, 0)[None, :], 0.0), 1)
    before = tl.sum(tl.where(j < i, kept[None, :], 0.0), 1)
    whole = tl.sum(tl.sum(entry_.to(tl.float32) * leaving_.to(tl.float32), 1), 0) * tl.load(through + program)
    token = first + tl.arange(0, C)
    tl.store(
        grad_log + (row * length + token) * heads + head,
        at_or_after - written_there + before + there + whole,
        mask=token < length,
    )
