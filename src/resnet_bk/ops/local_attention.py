"""Causal attention within a window that may fade with the distance, in time and memory that grow as N x window.

On a GPU half types go through torch's flash attention, which knows windows. Elsewhere queries go in blocks, each of
which reads itself and the ``window`` tokens before it, which is all that it may see.

A head's logits lose ``rate`` for each token between query and key (O. Press et al., "Train short, test long", 2022,
with rates that are learned). Rate x (j - i) is a product of a few more coordinates, rates in the query and places in
the key. So it takes no mask, and torch's fused kernels give the rates' gradient with all others.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from resnet_bk.imagined import capability_of, kind_of

# A key's place is written as 256 a + b, of which both are exact in bfloat16 up to 65,535. A query's is rounded: that is
# the same for all keys, and a softmax does not see it. The other coordinates are zeros, since kernels want heads in
# multiples of 8.
EXTRA_COORDINATES = 8
DIGIT = 256
# Where torch has flash attention: compute capability, coordinates of a head at most, and what they are multiples of.
FIRST_WITH_FLASH, MOST_COORDINATES, COORDINATES_MULTIPLE = (8, 0), 256, 8
# Blocks of a part of the window compute fewer pairs that no query may see, and read more keys. On a CPU, where products
# take most of the time, a quarter is best (benchmarks/local_attention.py); elsewhere a block is a window.
PARTS_ON_A_CPU, SHORTEST_BLOCK = 4, 64


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    rates: Tensor | None,
    filled: Tensor | None = None,
    documents: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k / sqrt(K) - rate x distance) v over each token and the ``window - 1`` before it.

    Args:
        q: ``(B, N, H, K)``.
        k, v: ``(B, P + N, H, K)``, those of the P < window tokens before in front.
        window: tokens that a query reads at most, itself included; up to 32,768.
        rates: ``(H,)``, what logits lose for each token between; None for nothing.
        filled: ``(B,)``, how many of the tokens before each row has, the last ones; None for all.
        documents: ``(B, N)``, numbers that are the same for tokens that may read each other; with none before.
        dropout: share of weights that are lost.

    Returns:
        ``(B, N, H, K)``.
    """
    length, before = q.shape[1], k.shape[1] - q.shape[1]
    plain = filled is None and documents is None and not dropout
    if plain and length > 1 and (before or length > window) and _flash_serves(q, fades=rates is not None):
        return _by_flash(q, k, v, window, rates)
    block = _block_size(window, q.device)
    first = min(window, length)
    in_blocks = length - (length - first) % block
    mask = _first_mask(first, before, window, filled, None if documents is None else documents[:, :first], q.device)
    mixed = [_attend(q[:, :first], k[:, : before + first], v[:, : before + first], rates, mask, dropout)]
    if in_blocks > first:
        of_keys, of_values = (_with_window_before(x[:, before : before + in_blocks], window, block) for x in (k, v))
        of_documents = None if documents is None else _with_window_before(documents[:, :in_blocks], window, block)
        others = q[:, first:in_blocks].reshape(-1, block, *q.shape[2:])
        others = _attend(others, of_keys, of_values, rates, _band(block, window, of_documents, q.device), dropout)
        mixed.append(others.reshape(len(q), -1, *q.shape[2:]))
    if in_blocks < length:
        rest = length - in_blocks
        of_keys, of_values = (x[:, -window - rest :] for x in (k, v))
        of_documents = None if documents is None else documents[:, -window - rest :]
        mask = _band(rest, window, of_documents, q.device)
        mixed.append(_attend(q[:, -rest:], of_keys, of_values, rates, mask, dropout))
    return torch.cat(mixed, dim=1) if len(mixed) > 1 else mixed[0]


def _flash_serves(q: Tensor, *, fades: bool) -> bool:
    """Whether torch's flash attention is there for queries like these."""
    is_half = q.dtype in (torch.float16, torch.bfloat16)
    if not is_half or not flash_takes(q.shape[-1], fades=fades) or kind_of(q.device) != "cuda":
        return False
    return capability_of(q.device) >= FIRST_WITH_FLASH


def flash_takes(head_size: int, *, fades: bool) -> bool:
    """Whether it has a kernel for heads of this size, with the coordinates for places of what fades."""
    size = head_size + EXTRA_COORDINATES * fades
    return size <= MOST_COORDINATES and size % COORDINATES_MULTIPLE == 0


def _by_flash(q: Tensor, k: Tensor, v: Tensor, window: int, rates: Tensor | None) -> Tensor:
    """In one call, whose time and memory are those of the pairs within the window."""
    rows, queries, heads, size = q.shape
    keys = k.shape[1]
    of_queries, of_keys = (
        torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=q.device) for length in (queries, keys)
    )
    if rates is not None:
        q, k, v = _with_places(q, k, v, rates)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    mixed = varlen_attn(q, k, v, of_queries, of_keys, queries, keys, scale=size**-0.5, window_size=(window - 1, 0))
    assert isinstance(mixed, Tensor)  # with log-sums it would be a pair
    return mixed.view(rows, queries, heads, -1)[..., :size]


def _attend(q: Tensor, k: Tensor, v: Tensor, rates: Tensor | None, mask: Tensor | None, dropout: float) -> Tensor:
    """Without a mask each query reads the keys up to its own."""
    size, causal = q.shape[-1], mask is None
    if q.shape[1] == 1 < k.shape[1]:
        # While decoding, all keys would be copied for each token: here a mask is the smaller thing.
        causal, mask = False, _lost_to_the_last(rates, k, mask).to(q.dtype)
        if not dropout and _scales_all_keys(q):
            return _attend_alone(q, k, v, mask)
    elif rates is not None:
        q, k, v = _with_places(q, k, v, rates)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=size**-0.5
    )
    return mixed[..., :size].transpose(1, 2)


def _attend_alone(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A single query, with what is added to its logits."""
    q, k, v = (x.transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    return (torch.softmax(q @ k.transpose(-1, -2) + mask, dim=-1) @ v).transpose(1, 2)


def _scales_all_keys(q: Tensor) -> bool:
    """Whether torch's attention with a mask multiplies all keys by the scale's root: as much work as all the rest."""
    return kind_of(q.device) == "cpu" and q.dtype in (torch.float32, torch.float64)


def _lost_to_the_last(rates: Tensor | None, k: Tensor, mask: Tensor | None) -> Tensor:
    """What is added to the logits of a single query, whose own key is the last of M: ``(H, 1, M)``, or ``(B, H, 1, M)``
    with a mask ``(B, 1, 1, M)``."""
    length, heads = k.shape[1:3]
    rates = torch.zeros(heads, device=k.device) if rates is None else rates
    lost_H1M = rates[:, None, None] * torch.arange(1 - length, 1, device=k.device)
    return lost_H1M if mask is None else lost_H1M.masked_fill(~mask, -math.inf)


def _with_places(q: Tensor, k: Tensor, v: Tensor, rates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates whose product is sqrt(K) x rate x (key's place - query's); values are as wide, as fused kernels want.

    Of a softmax's gradient in half types, a sum over keys with their places would keep rounding errors as large as
    places are; with the query's place in it, what is common to all keys cancels.
    """
    of_keys_M = torch.arange(k.shape[1], device=k.device)
    rest_M = of_keys_M % DIGIT
    more_k_M13 = torch.stack([of_keys_M - rest_M, rest_M, torch.full_like(rest_M, DIGIT)], dim=-1).unsqueeze(1)
    of_queries_N11 = of_keys_M[-q.shape[1] :, None, None]
    rates_H1 = (rates * q.shape[-1] ** 0.5).unsqueeze(-1)
    more_q_NH3 = torch.cat([rates_H1.expand(len(of_queries_N11), -1, 2), rates_H1 * (of_queries_N11 / -DIGIT)], dim=-1)
    more_q_NHE, more_k_M1E = (F.pad(x, (0, EXTRA_COORDINATES - x.shape[-1])) for x in (more_q_NH3, more_k_M13))
    return (
        torch.cat([q, more_q_NHE.to(q.dtype).expand(*q.shape[:-1], -1)], dim=-1),
        torch.cat([k, more_k_M1E.to(k.dtype).expand(*k.shape[:-1], -1)], dim=-1),
        F.pad(v, (0, EXTRA_COORDINATES)),
    )


def _first_mask(
    length: int, before: int, window: int, filled: Tensor | None, documents: Tensor | None, device: torch.device
) -> Tensor | None:
    """Of the first block, whose keys begin with the ``before`` past ones; None where causality says it all."""
    if filled is None and documents is None and (before == 0 or (length == 1 and before < window)):
        return None
    own_N1 = torch.arange(before, before + length, device=device).unsqueeze(1)
    keys_K = torch.arange(before + length, device=device)
    allowed = (keys_K <= own_N1) & (own_N1 - keys_K < window)
    if documents is not None:
        return (allowed & (documents.unsqueeze(2) == documents.unsqueeze(1))).unsqueeze(1)
    if filled is None:
        return allowed
    return (allowed & (keys_K >= before - filled[:, None, None])).unsqueeze(1)


def _band(queries: int, window: int, documents: Tensor | None, device: torch.device) -> Tensor:
    """Which keys of the ``window`` before and of their own each of ``queries`` reads ``(queries, window + queries)``;
    with ``documents`` ``(B, window + queries)`` those of its own, ``(B, 1, queries, window + queries)``."""
    keys_K = torch.arange(window + queries, device=device)
    query_N1 = torch.arange(queries, device=device).unsqueeze(1)
    band = (keys_K > query_N1) & (keys_K <= query_N1 + window)
    if documents is None:
        return band
    return (band & (documents[:, window:].unsqueeze(2) == documents.unsqueeze(1))).unsqueeze(1)


def _block_size(window: int, device: torch.device) -> int:
    """Queries of a block, a divisor of the window."""
    if kind_of(device) == "cpu" and window % PARTS_ON_A_CPU == 0 and window // PARTS_ON_A_CPU >= SHORTEST_BLOCK:
        return window // PARTS_ON_A_CPU
    return window


def _with_window_before(x: Tensor, window: int, block: int) -> Tensor:
    """Each block behind the first window, with that many tokens before it: ``(B x blocks, window + block, ...)``."""
    blocks = x.reshape(len(x), -1, block, *x.shape[2:])
    before, number = window // block, blocks.shape[1] - window // block
    return torch.cat([blocks[:, i : i + number] for i in range(before + 1)], dim=2).flatten(0, 1)
