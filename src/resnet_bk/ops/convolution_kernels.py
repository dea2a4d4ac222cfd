"""The Triton kernels of the short convolution: a program has a tile of tokens and channels."""

import triton.language as tl

from resnet_bk.ops.kernels import kernel


@kernel
def forward_kernel(
    x,
    weight,
    window,
    document,
    y,
    length,
    channels,
    SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """y_i = sum_s weight_s x_{i-s}, with the window before the first token, over tokens of one document."""
    tiles = tl.cdiv(length, TOKENS)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    token = (tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    there = (token < length) & (channel < channels)
    result = tl.zeros([TOKENS, CHANNELS], tl.float32)
    if HAS_DOCUMENTS:
        own = tl.load(document + row * length + token, mask=token < length, other=0)
    for s in tl.static_range(SIZE):
        tap = tl.load(weight + s * channels + channel, mask=channel < channels, other=0.0).to(tl.float32)
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
        result += tap * value
    tl.store(y + (row * length + token) * channels + channel, result.to(y.dtype.element_ty), mask=there)


@kernel
def backward_kernel(
    grad,
    x,
    weight,
    window,
    document,
    grad_x,
    grad_weight,
    length,
    channels,
    SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """x'_i = sum_s weight_s y'_{i+s}, and this tile's part of weight'_s = sum_i y'_i x_{i-s}."""
    tiles = tl.cdiv(length, TOKENS)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    token = (tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    there = (token < length) & (channel < channels)
    here = tl.load(grad + (row * length + token) * channels + channel, mask=there, other=0.0).to(tl.float32)
    result = tl.zeros([TOKENS, CHANNELS], tl.float32)
    part = tl.program_id(0).to(tl.int64) * SIZE
    if HAS_DOCUMENTS:
        own = tl.load(document + row * length + token, mask=token < length, other=0)
    for s in tl.static_range(SIZE):
        tap = tl.load(weight + s * channels + channel, mask=channel < channels, other=0.0).to(tl.float32)
        then, later = token - s, token + s
        read, written = there & (then >= 0), there & (later < length)
        before = there & (then < 0)
        if HAS_DOCUMENTS:
            theirs = tl.load(document + row * length + then, mask=(then >= 0) & (then < length), other=0)
            read = read & (theirs == own)
            written = written & (tl.load(document + row * length + later, mask=later < length, other=0) == own)
            before = before & (own == 0)
        result += tap * tl.load(grad + (row * length + later) * channels + channel, mask=written, other=0.0).to(
            tl.float32
        )
        value = tl.load(x + (row * length + then) * channels + channel, mask=read, other=0.0).to(tl.float32)
        if HAS_WINDOW:
            place = (row * (SIZE - 1) + then + SIZE - 1) * channels + channel
            value += tl.load(window + place, mask=before, other=0.0).to(tl.float32)
        sums = tl.sum(here * value, 0)[None, :]
        tl.store(grad_weight + (part + s) * channels + channel, sums, mask=channel < channels)
    tl.store(grad_x + (row * length + token) * channels + channel, result.to(grad_x.dtype.element_ty), mask=there)
