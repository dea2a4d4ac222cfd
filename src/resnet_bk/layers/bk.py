"""The seed's mixer: a token's potential in, the resolvent's real and imaginary part out."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_bk.layers.padding import Padding
from resnet_bk.ops.bk import bk_core


class BKMixer(nn.Module):
    """``W_o [Re G(v), Im G(v)]`` with the potential ``v = w . x``, one chain per head, in float32.

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

    def forward(self, x_BND: Tensor, padding: Padding | None, state_BH: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The mixed tokens ``(B, N, D)``, and the state after each row's last real token (causal only)."""
        with torch.autocast(x_BND.device.type, enabled=False):
            dtype = torch.promote_types(x_BND.dtype, torch.float32)
            v_BNH = F.linear(x_BND.to(dtype), self.potential.weight.to(dtype))
            z_H = torch.complex(self.energy.to(dtype), F.softplus(self.raw_eta.to(dtype)))
            g_BNH, state_BH = self._resolvent(v_BNH, z_H, padding, state_BH)
            features_BNF = torch.cat([g_BNH.real, g_BNH.imag], dim=-1)
        return self.output(features_BNF.to(self.output.weight.dtype)), state_BH

    def _resolvent(
        self, v_BNH: Tensor, z_H: Tensor, padding: Padding | None, state_BH: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        hopping: float | Tensor = self.hopping
        if padding is not None:
            v_BNH = padding.to_front(v_BNH)
            if not self.causal:
                hopping = (padding.neighbours_BN.unsqueeze(-1) * self.hopping).to(v_BNH.dtype)
                hopping = hopping.expand(-1, -1, self.num_heads)
        g_BNH = bk_core(
            v_BNH,
            z_H,
            h0=self.h0,
            hopping=hopping,
            causal=self.causal,
            grad=self.grad,
            blend=self.blend,
            initial_state=state_BH,
        )
        assert isinstance(g_BNH, Tensor)
        final_BH = self._final_state(g_BNH, padding, state_BH) if self.causal else None
        return (g_BNH if padding is None else padding.restore(g_BNH)), final_BH

    def _final_state(self, l_BNH: Tensor, padding: Padding | None, state_BH: Tensor | None) -> Tensor:
        if padding is None:
            return l_BNH[:, -1].detach()
        last_B = (padding.num_real_B - 1).clamp(min=0)
        last_BH = l_BNH.gather(1, last_B.view(-1, 1, 1).expand(-1, 1, self.num_heads)).squeeze(1).detach()
        before_BH = torch.zeros_like(last_BH) if state_BH is None else state_BH
        return torch.where(padding.num_real_B.unsqueeze(1) > 0, last_BH, before_BH)
