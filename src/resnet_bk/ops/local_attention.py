"""Causal attention within a window, in time and memory that grow as N x window.

Queries go in blocks of ``window``: a block reads itself and the block before it, which is all that it may see.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    past: tuple[Tensor, Tensor] | None = None,
    filled: Tensor | None = None,
    documents: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k / sqrt(K)) v over each token and the ``window - 1`` before it.

    Args:
        q, k, v: ``(B, N, H, K)``.
        window: tokens that a query reads at most, itself included.
        past: keys and values ``(B, P, H, K)`` of the tokens before, P < window.
        filled: ``(B,)``, how many of them each row has, the last ones; None for all.
        documents: ``(B, N)``, numbers that are the same for tokens that may read each other; not with ``past``.
        dropout: share of weights that are lost.

    Returns:
        ``(B, N, H, K)``.
    """
    length, before = q.shape[1], 0 if past is None else past[0].shape[1]
    if past is not None:
        k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
    first = min(window, length)
    mask = _first_mask(first, before, window, filled, None if documents is None else documents[:, :first], q.device)
    mixed = _attend(q[:, :first], k[:, : before + first], v[:, : before + first], mask, dropout)
    if length <= window:
        return mixed
    of_keys, of_values = (_blocks_before(x[:, before:], window) for x in (k, v))
    mask = _band(window, q.device)
    if documents is not None:
        of_keys_GW2 = _blocks_before(documents, window, fill=-1)
        of_queries_GW = _blocks(documents[:, window:], window, fill=-1)
        mask = (mask & (of_queries_GW.unsqueeze(-1) == of_keys_GW2.unsqueeze(-2))) | _own(window, q.device)
        mask = mask.unsqueeze(1)
    others = _attend(_blocks(q[:, window:], window), of_keys, of_values, mask, dropout)
    others = others.reshape(len(q), -1, *q.shape[2:])[:, : length - window]
    return torch.cat([mixed, others], dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Without a mask each query reads the keys up to its own, or all where there is a single query."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal).transpose(1, 2)


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


def _band(window: int, device: torch.device) -> Tensor:
    """Keys of the block before and of the own one ``(W, 2 W)`` that each query reads."""
    keys_K = torch.arange(2 * window, device=device)
    query_N1 = torch.arange(window, device=device).unsqueeze(1)
    return (keys_K > query_N1) & (keys_K <= query_N1 + window)


def _own(window: int, device: torch.device) -> Tensor:
    """Each query's own key: padding behind the last token has nothing else to read, and would be NaN."""
    return torch.arange(2 * window, device=device) == torch.arange(window, 2 * window, device=device).unsqueeze(1)


def _blocks(x: Tensor, window: int, fill: int = 0) -> Tensor:
    """``(B, N, ...)`` as ``(B blocks, W, ...)``, padded behind."""
    return _padded(x, window, fill).reshape(-1, window, *x.shape[2:])


def _blocks_before(x: Tensor, window: int, fill: int = 0) -> Tensor:
    """From the second block on, each with the one before it: ``(B (blocks - 1), 2 W, ...)``."""
    blocks = _padded(x, window, fill)
    blocks = blocks.reshape(len(blocks), -1, window, *blocks.shape[2:])
    return torch.cat([blocks[:, :-1], blocks[:, 1:]], dim=2).flatten(0, 1)


def _padded(x: Tensor, window: int, fill: int) -> Tensor:
    missing = -x.shape[1] % window
    if not missing:
        return x
    return torch.cat([x, x.new_full((len(x), missing, *x.shape[2:]), fill)], dim=1)
