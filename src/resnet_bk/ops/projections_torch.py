"""Queries, keys and values in plain torch, on every device, as many tokens at a time as a cache holds.

Of a piece of tokens everything between the arguments and the results stays in the cache. Backward goes over the same
pieces from the last token to the first, as the convolution's gradient reads z' of the tokens behind a piece. With z the
convolution's output, s = silu(z) and n = s / rms(s), and u the gradient of n, which is that of q or k turned back,

    s' = (u - n mean(u n)) / rms(s),      z' = s' silu'(z)
    x'_j = sum_s weight_s z'_{j+s},       weight'_s = sum_j z'_j x_{j-s}
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = torch.finfo(torch.float32).eps
PIECE = 2**18  # numbers of x

Gradients = tuple[Tensor, Tensor, Tensor]


def forward(
    x_BNC: Tensor,
    weight_SC: Tensor | None,
    window_BWC: Tensor | None,
    documents_BN: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    key_size: int,
) -> Gradients:
    """q and k ``(B, N, H, K)`` and v ``(B, N, H, V)`` in x's type."""
    batch_size, length, channels = x_BNC.shape
    sizes = (key_size, key_size, channels // num_heads - 2 * key_size)
    taps, pieces = _wide(weight_SC, x_BNC), list(_pieces(x_BNC))
    results: list[Tensor] = []
    for rows, tokens in pieces:
        z = _convolved(_behind(x_BNC, taps, window_BWC, rows, tokens), taps, _same(documents_BN, taps, rows, tokens))
        s = torch.unflatten(F.silu(z), -1, (num_heads, -1))
        n, _ = _normed(s, key_size)
        if cos is not None and sin is not None:
            n = _turned(n, _table(cos, rows, tokens), _table(sin, rows, tokens))
        made = (n[..., 0, :], n[..., 1, :], s[..., 2 * key_size :])
        if len(pieces) == 1:
            # Copies, whose memory is their own.
            q, k, v = (y.to(x_BNC.dtype, copy=True, memory_format=torch.contiguous_format) for y in made)
            return q, k, v
        if not results:
            results = [x_BNC.new_empty(batch_size, length, num_heads, size) for size in sizes]
        for result, y in zip(results, made, strict=True):
            result[rows, tokens] = y
    q, k, v = results or (x_BNC.new_empty(batch_size, length, num_heads, size) for size in sizes)
    return q, k, v


def backward(
    gradients: Gradients,
    x_BNC: Tensor,
    weight_SC: Tensor | None,
    window_BWC: Tensor | None,
    documents_BN: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    key_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and weight, in their types."""
    q_bar, k_bar, v_bar = gradients
    taps = _wide(weight_SC, x_BNC)
    x_bar = torch.empty_like(x_BNC, memory_format=torch.contiguous_format)
    weight_bar = None if taps is None else torch.zeros_like(taps)
    later = x_BNC[:, :0]
    for rows, tokens in reversed(list(_pieces(x_BNC))):
        x = _behind(x_BNC, taps, window_BWC, rows, tokens)
        same = _same(documents_BN, taps, rows, tokens)
        z = _convolved(x, taps, same)
        s = torch.unflatten(F.silu(z), -1, (num_heads, -1))
        n, root = _normed(s, key_size)
        u = torch.empty_like(n)
        for index, bar in enumerate((q_bar, k_bar)):
            u[..., index, :] = bar[rows, tokens]
        if cos is not None and sin is not None:
            u = _turned(u, _table(cos, rows, tokens), -_table(sin, rows, tokens))
        s_bar = torch.empty_like(s)
        along = (u * n).mean(-1, keepdim=True)
        torch.mul(u.addcmul_(n, along, value=-1), root, out=_pairs(s_bar, key_size))
        s_bar[..., 2 * key_size :] = v_bar[rows, tokens]
        z_bar = torch.ops.aten.silu_backward(s_bar.flatten(-2), z)
        if taps is None or weight_bar is None:
            x_bar[rows, tokens] = z_bar
            continue
        _add_weight_gradient(weight_bar, z_bar, x, same)
        at_end = tokens.stop == x_BNC.shape[1]
        z_bar = F.pad(z_bar, (0, 0, 0, len(taps) - 1)) if at_end else torch.cat([z_bar, later], dim=1)
        later = z_bar[:, : len(taps) - 1]
        x_bar[rows, tokens] = _correlation(z_bar, taps, _same(documents_BN, taps, rows, tokens, ahead=True))
    return x_bar, None if weight_SC is None or weight_bar is None else weight_bar.to(weight_SC.dtype)


def _pieces(x_BNC: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and tokens that are worked on at once: of several rows only if they are whole."""
    batch_size, length, channels = x_BNC.shape
    most = max(1, PIECE // channels) if x_BNC.device.type == "cpu" else batch_size * length
    if length <= most:
        step = max(1, most // max(1, length))
        for first in range(0, batch_size, step):
            yield slice(first, min(first + step, batch_size)), slice(0, length)
        return
    for row in range(batch_size):
        for first in range(0, length, most):
            yield slice(row, row + 1), slice(first, min(first + most, length))


def _wide(x: Tensor | None, like: Tensor) -> Tensor | None:
    """In the type of the arithmetic."""
    return None if x is None else x.to(torch.promote_types(like.dtype, torch.float32))


def _behind(x_BNC: Tensor, taps: Tensor | None, window_BWC: Tensor | None, rows: slice, tokens: slice) -> Tensor:
    """The tokens and those before them that filters reach, in the type of the arithmetic."""
    before = 0 if taps is None else len(taps) - 1
    first = tokens.start - before
    x = x_BNC[rows, max(0, first) : tokens.stop]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if first >= 0:
        return x
    if window_BWC is None:
        return F.pad(x, (0, 0, -first, 0))
    return torch.cat([window_BWC[rows, tokens.start :].to(x.dtype), x], dim=1)


def _same(
    documents_BN: Tensor | None, taps: Tensor | None, rows: slice, tokens: slice, *, ahead: bool = False
) -> list[Tensor] | None:
    """For each tap: which tokens are of the same document as the one that it reaches, behind or ahead."""
    if documents_BN is None or taps is None:
        return None
    before = len(taps) - 1
    document_BM1 = F.pad(documents_BN, (before, before)).unsqueeze(-1)[rows]
    own = document_BM1[:, before + tokens.start : before + tokens.stop]
    steps = [s if ahead else -s for s in range(len(taps))]
    return [own == document_BM1[:, before + tokens.start + s : before + tokens.stop + s] for s in steps]


def _convolved(x_BMC: Tensor, taps: Tensor | None, same: list[Tensor] | None) -> Tensor:
    """``z_i = sum_s weight_s x_{i-s}``."""
    if taps is None:
        return x_BMC
    if same is None and x_BMC.shape[1] == len(taps):
        return (x_BMC * taps.flip(0)).sum(1, keepdim=True)  # one token, as in decoding: fewer calls
    return _correlation(x_BMC, taps, same, backward=True)


def _correlation(x_BMC: Tensor, taps: Tensor, same: list[Tensor] | None, *, backward: bool = False) -> Tensor:
    """``y_i = sum_s weight_s x_{i+s}``, or ``x_{i-s}``."""
    before = len(taps) - 1
    length = x_BMC.shape[1] - before
    result: Tensor | None = None
    for s, tap_C in enumerate(taps):
        first = before - s if backward else s
        x = x_BMC[:, first : first + length]
        if same is not None and s:
            x = x * same[s]
        result = x * tap_C if result is None else result.addcmul_(x, tap_C)
    assert result is not None
    return result


def _add_weight_gradient(weight_bar: Tensor, z_bar: Tensor, x_BMC: Tensor, same: list[Tensor] | None) -> None:
    before, length = len(weight_bar) - 1, z_bar.shape[1]
    ones = z_bar.new_ones(1, z_bar.shape[0] * length)
    for s in range(before + 1):
        products = z_bar * x_BMC[:, before - s : before - s + length]
        if same is not None and s:
            products *= same[s]
        # Summed by a product with ones, which is faster than a sum over rows.
        with torch.autocast(z_bar.device.type, enabled=False):
            weight_bar[s : s + 1].addmm_(ones, products.flatten(0, 1))


def _pairs(s_BNHC: Tensor, key_size: int) -> Tensor:
    """Queries and keys, ``(B, N, H, 2, K)``."""
    return torch.unflatten(s_BNHC[..., : 2 * key_size], -1, (2, key_size))


def _normed(s_BNHC: Tensor, key_size: int) -> tuple[Tensor, Tensor]:
    """Queries and keys by their root mean square, contiguous, and what they were multiplied by."""
    pairs = _pairs(s_BNHC, key_size)
    root = pairs.square().mean(-1, keepdim=True).add_(EPSILON).rsqrt_()
    return pairs * root, root


def _table(table: Tensor, rows: slice, tokens: slice) -> Tensor:
    """``(1 or B, N, 1, 1, K / 2)``."""
    return table[rows if len(table) > 1 else slice(None), tokens, None, None]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second, result = x[..., :half], x[..., half:], torch.empty_like(x)
    torch.mul(first, cos, out=result[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=result[..., half:]).addcmul_(first, sin)
    return result
