"""The Triton kernels of queries, keys and values: a program has a tile of tokens of one head's q, k or v.

A tile is two: the first half of the coordinates and the second, which turn with each other. The formulas are in
``projections_torch``.
"""

import triton
import triton.language as tl

from resnet_bk.ops.kernels import kernel

EPSILON = tl.constexpr(1.1920928955078125e-07)  # float32's


@triton.jit
def _convolved(
    x,
    weight,
    window,
    document,
    row,
    token,
    channel,
    inside,
    length,
    channels,
    SIZE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
):
    """z_i = sum_s weight_s x_{i-s} of a tile, as in ``convolution_kernels``; x itself without a weight."""
    there = (token < length) & inside
    result = tl.zeros([TOKENS, HALF], tl.float32)
    if HAS_DOCUMENTS:
        own = tl.load(document + row * length + token, mask=token < length, other=0)
    for s in tl.static_range(SIZE):
        then = token - s
        read = there & (then >= 0)
        before = there & (then < 0)
        if HAS_DOCUMENTS:
            theirs = tl.load(document + row * length + then, mask=(then >= 0) & (then < length), other=0)
            read = read & (theirs == own)
            before = before & (own == 0)
        value = tl.load(x + (row * length + then) * channels + channel, mask=read, other=0.0).to(tl.float32)
        if HAS_WINDOW:
            place = (row * (SIZE - 1) + then + SIZE - 1) * channels + channel
            value += tl.load(window + place, mask=before, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            value *= tl.load(weight + s * channels + channel, mask=inside, other=0.0).to(tl.float32)
        result += value
    return result


@kernel
def forward_kernel(
    x,
    weight,
    window,
    document,
    cos,
    sin,
    out,
    length,
    channels,
    rotary_stride,
    heads: tl.constexpr,
    head_size: tl.constexpr,
    offset: tl.constexpr,
    size: tl.constexpr,
    half: tl.constexpr,
    SIZE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    NORMED: tl.constexpr,
    TURNED: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
):
    """q, k or v of a tile."""
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    tiles = tl.cdiv(length, TOKENS)
    row = (tile // tiles).to(tl.int64)
    token = (tile % tiles) * TOKENS + tl.arange(0, TOKENS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    in1, in2 = column < half, column < size - half
    channel = head * head_size + offset + column
    a = _convolved(
        x, weight, window, document, row, token, channel, in1, length, channels,
        SIZE, HAS_WEIGHT, HAS_WINDOW, HAS_DOCUMENTS, TOKENS, HALF,
    )  # fmt: skip
    b = _convolved(
        x, weight, window, document, row, token, channel + half, in2, length, channels,
        SIZE, HAS_WEIGHT, HAS_WINDOW, HAS_DOCUMENTS, TOKENS, HALF,
    )  # fmt: skip
    a, b = a / (1.0 + tl.exp(-a)), b / (1.0 + tl.exp(-b))
    if NORMED:
        root = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / size + EPSILON)
        a, b = a * root[:, None], b * root[:, None]
    if TURNED:
        turn = row * rotary_stride + token * half + column
        c = tl.load(cos + turn, mask=(token < length) & in1, other=0.0).to(tl.float32)
        s = tl.load(sin + turn, mask=(token < length) & in1, other=0.0).to(tl.float32)
        a, b = a * c - b * s, b * c + a * s
    where = ((row * length + token) * heads + head) * size + column
    tl.store(out + where, a.to(out.dtype.element_ty), mask=(token < length) & in1)
    tl.store(out + where + half, b.to(out.dtype.element_ty), mask=(token < length) & in2)


@kernel
def backward_kernel(
    grad,
    x,
    weight,
    window,
    document,
    cos,
    sin,
    grad_z,
    length,
    channels,
    rotary_stride,
    heads: tl.constexpr,
    head_size: tl.constexpr,
    offset: tl.constexpr,
    size: tl.constexpr,
    half: tl.constexpr,
    SIZE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    NORMED: tl.constexpr,
    TURNED: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
):
    """The gradient of the convolution's output, at q, k or v of a tile."""
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    tiles = tl.cdiv(length, TOKENS)
    row = (tile // tiles).to(tl.int64)
    token = (tile % tiles) * TOKENS + tl.arange(0, TOKENS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    in1, in2 = column < half, column < size - half
    channel = head * head_size + offset + column
    where = ((row * length + token) * heads + head) * size + column
    u = tl.load(grad + where, mask=(token < length) & in1, other=0.0).to(tl.float32)
    v = tl.load(grad + where + half, mask=(token < length) & in2, other=0.0).to(tl.float32)
    a = _convolved(
        x, weight, window, document, row, token, channel, in1, length, channels,
        SIZE, HAS_WEIGHT, HAS_WINDOW, HAS_DOCUMENTS, TOKENS, HALF,
    )  # fmt: skip
    b = _convolved(
        x, weight, window, document, row, token, channel + half, in2, length, channels,
        SIZE, HAS_WEIGHT, HAS_WINDOW, HAS_DOCUMENTS, TOKENS, HALF,
    )  # fmt: skip
    sigma_a, sigma_b = 1.0 / (1.0 + tl.exp(-a)), 1.0 / (1.0 + tl.exp(-b))
    a, b = a * sigma_a, b * sigma_b
    slope_a, slope_b = sigma_a + a * (1.0 - sigma_a), sigma_b + b * (1.0 - sigma_b)
    if TURNED:
        turn = row * rotary_stride + token * half + column
        c = tl.load(cos + turn, mask=(token < length) & in1, other=0.0).to(tl.float32)
        s = tl.load(sin + turn, mask=(token < length) & in1, other=0.0).to(tl.float32)
        u, v = u * c + v * s, v * c - u * s
    if NORMED:
        root = (1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / size + EPSILON))[:, None]
        a, b = a * root, b * root
        along = ((tl.sum(u * a, 1) + tl.sum(v * b, 1)) / size)[:, None]
        u, v = (u - a * along) * root, (v - b * along) * root
    place = (row * length + token) * channels + channel
    tl.store(grad_z + place, (u * slope_a).to(grad_z.dtype.element_ty), mask=(token < length) & in1)
    tl.store(grad_z + place + half, (v * slope_b).to(grad_z.dtype.element_ty), mask=(token < length) & in2)
