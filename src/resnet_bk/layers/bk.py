"""The seed's mixer: a token's potential in, the resolvent's real and imaginary part out."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_bk.layers.padding import Padding
from resnet_bk.ops.bk import bk_core_pairs


class BKMixer(nn.Module):
    """``W_o [Re G(v), Im G(v)]`` with the potential ``v = w . x``, one chain per head, in float32.

    The columns of W_o go by head: Re and Im of the first, then of the second, ...

    The energy z = E + i eta is learned per head; eta = softplus(raw) > 0 by construction.
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
    ) -> None:
        super().__init__()
        self.num_heads, self.h0, self.hopping, self.causal = num_heads, h0, hopping, causal
        self.grad: Literal["exact", "blend"] = grad
        self.blend = blend
        self.initial_energy, self.initial_eta = energy, eta
        self.potential = nn.Linear(hidden_size, num_heads, bias=False)
        self.output = nn.Linear(2 * num_heads, hidden_size, bias=False)
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

    def forward(self, x_BND: Tensor, padding: Padding | None, state_BH2: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The mixed tokens ``(B, N, D)``, and the state after each row's last real token (causal only)."""
        with torch.autocast(x_BND.device.type, enabled=False):
            dtype = torch.promote_types(x_BND.dtype, torch.float32)
            v_BNH = F.linear(x_BND.to(dtype), self.potential.weight.to(dtype))
            eta_H = F.softplus(self.raw_eta.to(dtype))
            shift_H2 = torch.stack([self.h0 - self.energy.to(dtype), -eta_H], dim=-1)
            g_BNH2, state_BH2 = self._resolvent(v_BNH, shift_H2, padding, state_BH2)
        return self.output(g_BNH2.flatten(-2).to(self.output.weight.dtype)), state_BH2

    def _resolvent(
        self, v_BNH: Tensor, shift_H2: Tensor, padding: Padding | None, state_BH2: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        hopping: float | Tensor = self.hopping
        if padding is not None:
            v_BNH = padding.to_front(v_BNH)
            if not self.causal:
                hopping = (padding.neighbours_BN.unsqueeze(-1) * self.hopping).to(v_BNH.dtype)
                hopping = hopping.expand(-1, -1, self.num_heads)
        g_BNH2 = bk_core_pairs(
            v_BNH,
            shift_H2,
            hopping=hopping,
            causal=self.causal,
            grad=self.grad,
            blend=self.blend,
            initial_state=state_BH2,
        )
        final_BH2 = self._final_state(g_BNH2, padding, state_BH2) if self.causal else None
        if padding is not None:
            g_BNH2 = padding.restore(g_BNH2.flatten(-2)).view_as(g_BNH2)
        return g_BNH2, final_BH2

    def _final_state(self, l_BNH2: Tensor, padding: Padding | None, state_BH2: Tensor | None) -> Tensor:
        if padding is None:
            return l_BNH2[:, -1].detach()
        last_B = (padding.num_real_B - 1).clamp(min=0)
        last_BH2 = l_BNH2[torch.arange(len(last_B), device=last_B.device), last_B].detach()
        before_BH2 = torch.zeros_like(last_BH2) if state_BH2 is None else state_BH2
        return torch.where((padding.num_real_B > 0).view(-1, 1, 1), last_BH2, before_BH2)
