"""The Transformer's mixer: causal attention with rotary positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_bk.layers.context import MixerState, SequenceContext
from resnet_bk.layers.convolution import ShortConvolution
from resnet_bk.layers.linear import Linear
from resnet_bk.ops.rotation import rotate


class CausalAttention(nn.Module):
    """Multi-head attention through ``scaled_dot_product_attention``; keys and queries carry rotary positions.

    With a ``conv_size``, queries, keys and values go through a short convolution first. ``dropout`` is of the weights.
    """

    def __init__(self, *, hidden_size: int, num_heads: int, causal: bool, conv_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.causal, self.dropout = num_heads, causal, dropout
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.convolution = ShortConvolution(3 * hidden_size, conv_size) if conv_size else None
        self.output = Linear(hidden_size, hidden_size)

    def forward(self, x_BND: Tensor, context: SequenceContext, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """The mixed tokens, and the keys and values ``(B, heads, past + N, head_dim)`` for the next call.

        Behind packed documents it says besides which of them is the ``first`` ``(B,)`` of each row's last document.
        """
        batch_size, length, hidden_size = x_BND.shape
        heads = (batch_size, length, self.num_heads, hidden_size // self.num_heads)
        state = state or {}
        after: MixerState = {}
        qkv_BNC = self.qkv(x_BND)
        if self.convolution is not None:
            qkv_BNC, after["window"] = self._convolved(self.convolution, qkv_BNC, context, state.get("window"))
        q, k, v = (part.reshape(heads).transpose(1, 2) for part in qkv_BNC.chunk(3, dim=-1))
        if context.rotary is not None:
            cos_BN, sin_BN = context.rotary
            q, k = (rotate(part, cos_BN.unsqueeze(1), sin_BN.unsqueeze(1)) for part in (q, k))
        if "keys" in state:
            k, v = torch.cat([state["keys"], k], dim=2), torch.cat([state["values"], v], dim=2)
        if "first" in state:
            after["first"] = state["first"]
        elif context.document_ids_BN is not None and context.remember:
            after["first"] = _first_of_last_document(context.document_ids_BN, context.key_mask_BK)
        mask = self._mask(length, k.shape[2], context, state.get("first"), x_BND.device)
        plain_causal = self.causal and mask is None and length == k.shape[2]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=plain_causal)
        after["keys"], after["values"] = k, v
        return self.output(mixed.transpose(1, 2).reshape(batch_size, length, hidden_size)), after

    def _convolved(
        self, convolution: ShortConvolution, x_BNC: Tensor, context: SequenceContext, window_BWC: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        padding = context.padding
        if padding is None:
            mixed: tuple[Tensor, Tensor] = convolution(x_BNC, None, context.front_starts_BN, window_BWC)
            return mixed
        y_BNC, window_BWC = convolution(padding.to_front(x_BNC), padding, context.front_starts_BN, window_BWC)
        return padding.restore(y_BNC), window_BWC

    def _mask(
        self, length: int, num_keys: int, context: SequenceContext, first_B: Tensor | None, device: torch.device
    ) -> Tensor | None:
        """Which keys each query may read, bool; None where ``is_causal``, or nothing, says the same."""
        key_mask_BK, ids_BN = context.key_mask_BK, context.document_ids_BN
        nothing_is_told_apart = key_mask_BK is None and ids_BN is None and first_B is None
        if nothing_is_told_apart and (length in (1, num_keys) or not self.causal):
            return None
        own_key_N1 = torch.arange(num_keys - length, num_keys, device=device).unsqueeze(1)
        keys_K = torch.arange(num_keys, device=device)
        allowed = keys_K <= own_key_N1 if self.causal else torch.ones_like(keys_K <= own_key_N1)
        if ids_BN is not None:
            allowed = allowed & (ids_BN[:, None, :, None] == ids_BN[:, None, None, :])
        if first_B is not None:
            allowed = allowed & (keys_K >= first_B[:, None, None, None])
        if key_mask_BK is None:
            return allowed
        # A padding query reads itself: a row with nothing to read would be NaN.
        return (allowed & key_mask_BK.bool()[:, None, None, :]) | (keys_K == own_key_N1)


def _first_of_last_document(ids_BN: Tensor, key_mask_BN: Tensor | None) -> Tensor:
    """The first token of what each row's last real token belongs to ``(B,)``; documents are numbered upwards from 0."""
    of_real_BN = ids_BN if key_mask_BN is None else ids_BN * key_mask_BN.bool()
    return (ids_BN == of_real_BN.amax(1, keepdim=True)).int().argmax(1)
