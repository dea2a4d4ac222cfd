"""Attention over the last tokens only: exact recall of what is near, with a state of constant size."""

from typing import Literal

import torch
from torch import Tensor, nn

from resnet_bk.layers.context import MixerState, SequenceContext
from resnet_bk.layers.convolution import ShortConvolution
from resnet_bk.layers.linear import Linear
from resnet_bk.layers.memories import memories
from resnet_bk.layers.padding import Padding
from resnet_bk.ops import one_token
from resnet_bk.ops.local_attention import local_attention
from resnet_bk.ops.rotation import rotate

SHORTEST_MEMORY = 4.0  # tokens, of the first head at the start


LocalPositions = Literal["fading", "rotary"]


class LocalAttention(nn.Module):
    """Multi-head attention of each token to itself and the ``window - 1`` before it.

    It fades with the distance: a head's logits lose exp(``log_rate``) for each token between, at the start 1 / memory,
    for memories spread over the heads from ``SHORTEST_MEMORY`` to the window. There are no other positions, and
    distances that training never had read as those that it had. Or ``positions`` are rotary ones of keys and queries.

    With a ``conv_size``, queries, keys and values go through a short convolution first. ``dropout`` is of the weights.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        window: int,
        conv_size: int,
        positions: LocalPositions = "fading",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.window, self.positions, self.dropout = num_heads, window, positions, dropout
        if positions == "fading":
            self.log_rate = nn.Parameter(torch.empty(num_heads))
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.convolution = ShortConvolution(3 * hidden_size, conv_size) if conv_size else None
        self.output = Linear(hidden_size, hidden_size)

    @torch.no_grad()
    def initial_log_rate(self) -> Tensor:
        """``(H,)``; a window shorter than the shortest memory has one rate for all."""
        shortest = min(SHORTEST_MEMORY, float(self.window))
        return -torch.log(memories(self.num_heads, shortest, float(self.window)))

    def forward(self, x_BND: Tensor, context: SequenceContext, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """The mixed tokens, and the last ``window - 1`` real ones' keys and values ``(B, past, heads, head_dim)``.

        Rows that had padding or documents remember fewer, of the last document alone; then the state says how many of
        them are ``filled`` ``(B,)``, the last.
        """
        padding, starts_BN = context.padding, context.front_starts_BN
        state = state or {}
        after: MixerState = {}
        # With the real tokens in front, causality alone keeps padding out.
        qkv_BNC = self.qkv(x_BND if padding is None else padding.to_front(x_BND))
        if self.convolution is not None:
            qkv_BNC, after["convolved"] = self.convolution(qkv_BNC, padding, starts_BN, state.get("convolved"))
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in qkv_BNC.chunk(3, dim=-1))
        if self.positions == "rotary":
            rotary = context.front_local_rotary()
            assert rotary is not None
            cos_BN1C, sin_BN1C = (table.unsqueeze(2) for table in rotary)
            q, k = (rotate(part, cos_BN1C, sin_BN1C) for part in (q, k))
        mixed_BNHV, k, v = self._attend(q, k, v, context, state)
        if context.remember:
            after |= self._remembered(k, v, padding, starts_BN, state)
        mixed_BND = mixed_BNHV.flatten(2)
        return self.output(mixed_BND if padding is None else padding.restore(mixed_BND)), after

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, context: SequenceContext, state: MixerState
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values mixed ``(B, N, H, V)``, and all keys and values ``(B, past + N, H, K)``."""
        starts_BN, dropout = context.front_starts_BN, self.dropout if self.training else 0.0
        if "keys" in state:
            keys, values = state["keys"], state["values"]
            if context.padding is None and starts_BN is None and "filled" not in state and not dropout:
                tokens, rates = q.shape[0] * q.shape[1], self._rates()
                told = (q, k, v, keys, values, q.new_zeros(self.num_heads) if rates is None else rates)
                if one_token.is_alone(tokens, *told):
                    return one_token.attend(*told)
            k, v = torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1)
        mixed_BNHV = local_attention(
            q,
            k,
            v,
            window=self.window,
            rates=self._rates(),
            filled=state.get("filled"),
            documents=None if starts_BN is None else starts_BN.cumsum(1),
            dropout=dropout,
        )
        return mixed_BNHV, k, v

    def _rates(self) -> Tensor | None:
        """``(H,)``, None where nothing fades."""
        return self.log_rate.exp() if self.positions == "fading" else None

    def _remembered(
        self, k: Tensor, v: Tensor, padding: Padding | None, starts_BN: Tensor | None, state: MixerState
    ) -> MixerState:
        """Of all keys and values ``(B, past + N, H, K)``, detached."""
        past = state["keys"].shape[1] if "keys" in state else 0
        length = k.shape[1]
        kept = min(self.window - 1, length)
        tensors = {"keys": k.detach(), "values": v.detach()}
        if padding is None:
            found = {name: x[:, length - kept :] for name, x in tensors.items()}
            # A view keeps all of a projection or a prompt alive. While decoding that is one token too many, and worth
            # not copying all the others for.
            if not past or length - kept > 1:
                found = {name: x.clone() for name, x in found.items()}
            new_B = None if "filled" not in state else torch.full_like(state["filled"], length - past)
        else:
            new_B = padding.num_real_B
            indices_BK = (past + new_B.unsqueeze(1) - kept + torch.arange(kept, device=k.device)).clamp(min=0)
            rows_B1 = torch.arange(len(new_B), device=k.device).unsqueeze(1)
            found = {name: x[rows_B1, indices_BK] for name, x in tensors.items()}
        if starts_BN is not None:
            return {**found, "filled": _of_last_document(starts_BN, padding).clamp(max=kept)}
        if new_B is None:
            return found
        filled_B = state.get("filled", torch.full_like(new_B, past))
        return {**found, "filled": (filled_B + new_B).clamp(max=kept)}


def _of_last_document(starts_BN: Tensor, padding: Padding | None) -> Tensor:
    """How many tokens each row's last document has ``(B,)``, without the padding behind it."""
    first_B = (starts_BN * torch.arange(starts_BN.shape[1], device=starts_BN.device)).amax(1)
    return (starts_BN.shape[1] if padding is None else padding.num_real_B) - first_B
