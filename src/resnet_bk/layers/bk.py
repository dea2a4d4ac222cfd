"""The seed's mixer: a token's potential in, the resolvent's real and imaginary part out."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_bk.layers.context import MixerState, SequenceContext
from resnet_bk.layers.convolution import ShortConvolution
from resnet_bk.layers.linear import Linear
from resnet_bk.layers.padding import Padding, state_behind
from resnet_bk.ops.bk import bk_core_pairs
from resnet_bk.ops.single import linear_in_single


class BKMixer(nn.Module):
    """``W_o [Re G(v), Im G(v)]`` with the potential ``v = w . x``, one chain per head, in float32.

    The columns of W_o go by head: Re and Im of the first, then of the second, ...

    The energy z = E + i eta is learned per head; eta = softplus(raw) > 0 by construction. With a ``conv_size`` the
    potential reads a short convolution of the tokens.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        h0: float,
        hopping: float,
        energy: float,
        eta: float,
        causal: bool,
        grad: Literal["exact", "blend"],
        blend: float,
        conv_size: int,
    ) -> None:
        super().__init__()
        self.num_heads, self.h0, self.hopping, self.causal = num_heads, h0, hopping, causal
        self.grad: Literal["exact", "blend"] = grad
        self.blend = blend
        self.initial_energy, self.initial_eta = energy, eta
        self.convolution = ShortConvolution(hidden_size, conv_size) if conv_size else None
        self.potential = Linear(hidden_size, num_heads)
        self.output = Linear(2 * num_heads, hidden_size)
        self.energy = nn.Parameter(torch.empty(num_heads))
        self.raw_eta = nn.Parameter(torch.empty(num_heads))

    def initial_energies(self) -> Tensor:
        """One head sits at the configured energy; more are spread over the band, at its Chebyshev nodes."""
        if self.num_heads == 1:
            return torch.tensor([self.initial_energy])
        angles = torch.pi * (torch.arange(self.num_heads) + 0.5) / self.num_heads
        return self.h0 + 2 * math.sqrt(self.hopping) * torch.cos(angles)

    def initial_raw_eta(self) -> Tensor:
        """softplus of it is the configured eta."""
        return torch.full((self.num_heads,), math.log(math.expm1(self.initial_eta)))

    def forward(
        self, x_BND: Tensor, context: SequenceContext, state: MixerState | None
    ) -> tuple[Tensor, MixerState | None]:
        """The mixed tokens ``(B, N, D)``, and the state behind each row's last real token (causal only)."""
        padding, starts_BN = context.padding, context.front_starts_BN
        state = state or {}
        after: MixerState = {}
        if padding is not None:
            x_BND = padding.to_front(x_BND)
        if self.convolution is not None:
            x_BND, after["window"] = self.convolution(x_BND, padding, starts_BN, state.get("window"))
        with torch.autocast(x_BND.device.type, enabled=False):
            v_BNH = linear_in_single(x_BND, self.potential.weight)
            dtype = v_BNH.dtype
            eta_H = F.softplus(self.raw_eta.to(dtype))
            g_BNH2 = bk_core_pairs(
                v_BNH,
                torch.stack([self.h0 - self.energy.to(dtype), -eta_H], dim=-1),
                hopping=self._hopping(v_BNH, padding, starts_BN, has_state="chain" in state),
                causal=self.causal,
                grad=self.grad,
                blend=self.blend,
                initial_state=state.get("chain"),
            )
        if self.causal:
            after["chain"] = state_behind(g_BNH2, padding, state.get("chain"), at_first=0.0)
        pairs_BNC = g_BNH2.flatten(-2)
        if padding is not None:
            pairs_BNC = padding.restore(pairs_BNC)
        return self.output(pairs_BNC.to(self.output.weight.dtype)), after if self.causal else None

    def _hopping(
        self, v_BNH: Tensor, padding: Padding | None, starts_BN: Tensor | None, *, has_state: bool
    ) -> float | Tensor:
        """The bonds: none between documents, nor, where tokens read the future, with padding behind the real ones."""
        joined_BN = None if starts_BN is None else ~starts_BN[:, 0 if has_state else 1 :]
        if padding is not None and not self.causal:
            joined_BN = padding.neighbours_BN if joined_BN is None else joined_BN & padding.neighbours_BN
        if joined_BN is None:
            return self.hopping
        return (joined_BN.unsqueeze(-1) * self.hopping).to(v_BNH.dtype).expand(-1, -1, self.num_heads)
