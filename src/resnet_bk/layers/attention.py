"""The Transformer's mixer: causal attention with rotary positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_bk.layers.rotary import rotate


class CausalAttention(nn.Module):
    """Multi-head attention through ``scaled_dot_product_attention``; keys and queries carry rotary positions."""

    def __init__(self, *, hidden_size: int, num_heads: int, rope_theta: float, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.rope_theta, self.causal = num_heads, rope_theta, causal
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        x_BND: Tensor,
        position_ids_BN: Tensor,
        key_mask_BK: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The mixed tokens, and the keys and values ``(B, heads, past + N, head_dim)`` for the next call.

        ``key_mask_BK`` is nonzero for the real ones of all keys, past and present; None if all are.
        """
        batch_size, length, hidden_size = x_BND.shape
        heads = (batch_size, length, self.num_heads, hidden_size // self.num_heads)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.qkv(x_BND).chunk(3, dim=-1))
        q, k = (rotate(part, position_ids_BN, self.rope_theta) for part in (q, k))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        mask = self._mask(length, k.shape[2], key_mask_BK, x_BND.device)
        plain_causal = self.causal and mask is None and length == k.shape[2]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain_causal)
        return self.output(mixed.transpose(1, 2).reshape(batch_size, length, hidden_size)), (k, v)

    def _mask(self, length: int, num_keys: int, key_mask_BK: Tensor | None, device: torch.device) -> Tensor | None:
        """Which keys each query may read, bool; None where ``is_causal``, or nothing, says the same."""
        if key_mask_BK is None and (length in (1, num_keys) or not self.causal):
            return None
        own_key_N = torch.arange(num_keys - length, num_keys, device=device).unsqueeze(1)
        keys_K = torch.arange(num_keys, device=device)
        allowed = keys_K <= own_key_N if self.causal else torch.ones_like(keys_K <= own_key_N)
        if key_mask_BK is None:
            return allowed
        # A padding query reads itself: a row with nothing to read would be NaN.
        return (allowed & key_mask_BK.bool()[:, None, None, :]) | (keys_K == own_key_N)
