"""The resolvent mixer: keys and values carried by the Green's function of the chain cut at each token."""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_bk.layers.context import MixerState, SequenceContext
from resnet_bk.layers.convolution import ShortConvolution
from resnet_bk.layers.linear import Linear
from resnet_bk.layers.memories import memories
from resnet_bk.layers.padding import Padding, state_behind
from resnet_bk.ops import one_token
from resnet_bk.ops.bk import bk_core_pairs, bk_tunnel
from resnet_bk.ops.carry import bk_carry
from resnet_bk.ops.gap import gap_of_rate
from resnet_bk.ops.gated_norm import gated_norm
from resnet_bk.ops.projections import queries_keys_values
from resnet_bk.ops.single import linear_in_single

Regime = Literal["tunnelling", "scattering"]
StateKind = Literal["matrix", "vector"]
SHORTEST_MEMORY = 2.0  # tokens, of the first head at the start
TYPICAL_SOFTPLUS = 0.960  # root mean square of softplus(z), z standard normal, as potentials are at the start


class ResolventMixer(nn.Module):
    """``W_o (norm(o) * silu(W_g x))`` with ``S_i = l_i (S_{i-1} + k_i v_i^T)``, ``o_i = q_i S_i + skip v_i``.

    Queries, keys and values go through a short convolution and a silu. Queries and keys then have unit length, and
    turn with the position at a fixed rate for each pair of coordinates, as rotary positions do: a decay says how far
    back something is, a phase says where.

    In the tunnelling regime l is real and at most 1: at the rate r = softplus(W_w x) * rate, w = 4 sinh(r / 2)^2 is the
    gap at which a chain that had it everywhere would decay by exp(-r) a token. In the scattering regime l is complex; a
    head's potential is amplitude * W_w x, at an energy inside the band and a learned eta. Memories are spread evenly in
    their logarithm over the heads, from two tokens to ``longest_memory``.

    With a vector as state there are no keys and queries: S is v's carried sum. State, gap and norm are in float32.
    In training each head does not write a share ``dropout`` of the tokens, as attention loses weights, and as large a
    share is 0 of the queries' coordinates and of what comes out of the gates.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        key_size: int,
        state: StateKind,
        regime: Regime,
        longest_memory: float,
        conv_size: int,
        norm_eps: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.regime, self.longest_memory, self.dropout = num_heads, regime, longest_memory, dropout
        self.key_size = key_size if state == "matrix" else 0
        value_size = hidden_size // num_heads
        channels = num_heads * (2 * self.key_size + value_size)
        self.qkv = Linear(hidden_size, channels)
        self.convolution = ShortConvolution(channels, conv_size) if conv_size else None
        self.potential = Linear(hidden_size, num_heads)
        if regime == "tunnelling":
            self.log_rate = nn.Parameter(torch.empty(num_heads))
        else:
            self.energy = nn.Parameter(torch.empty(num_heads))
            self.raw_eta = nn.Parameter(torch.empty(num_heads))
            self.log_amplitude = nn.Parameter(torch.empty(num_heads))
        self.skip = nn.Parameter(torch.empty(num_heads))
        self.gate = Linear(hidden_size, hidden_size)
        self.norm = nn.RMSNorm(value_size, eps=norm_eps)
        self.output = Linear(hidden_size, hidden_size)

    @torch.no_grad()
    def initial_chains(self) -> dict[str, Tensor]:
        """The chains' parameters by name, for memories (tokens until a factor of e) spread over the heads.

        Tunnelling: the rate is 1 / memory. Gaps add up in a chain, and small ones go by the rate's square.
        Scattering at energy e from the band's centre, s = sqrt(4 - e^2): eta decays by eta / s a token, a random
        potential of variance a^2 by a^2 / (2 s^2) (D. J. Thouless, 1979); each does half.
        """
        memory = memories(self.num_heads, SHORTEST_MEMORY, self.longest_memory)
        if self.regime == "tunnelling":
            return {"log_rate": -torch.log(memory * TYPICAL_SOFTPLUS)}
        # Energies at Chebyshev nodes, in an order that does not run with the memories.
        stride = 5 if self.num_heads % 5 else 1
        order = torch.arange(self.num_heads) * stride % self.num_heads
        energy = 2 * torch.cos(torch.pi * (order + 0.5) / self.num_heads)
        s = torch.sqrt(4 - energy**2)
        return {
            "energy": energy,
            "raw_eta": torch.log(torch.expm1(0.5 * s / memory)),
            "log_amplitude": 0.5 * torch.log(s**2 / memory),
        }

    def forward(self, x_BND: Tensor, context: SequenceContext, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """The mixed tokens ``(B, N, D)`` and the state behind each row's last real token."""
        padding, starts_BN = context.padding, context.front_starts_BN
        state = state or {}
        if padding is not None:
            x_BND = padding.to_front(x_BND)
        after: MixerState = {}
        q, k, v, window_BWC = self._queries_keys_values(self.qkv(x_BND), context, state.get("window"))
        if window_BWC is not None:
            after["window"] = window_BWC
        dropout = self.dropout if self.training else 0.0
        q = F.dropout(q, dropout) if dropout and self.key_size else q
        log_l_BNH, angle_BNH, after["chain"] = self._chains(x_BND, padding, starts_BN, state.get("chain"))
        o_BNHV, after["carried"] = self._carry(q, k, v, log_l_BNH, angle_BNH, padding, starts_BN, state.get("carried"))
        assert self.norm.eps is not None
        mixed_BND = gated_norm(o_BNHV, self.norm.weight, self.gate(x_BND), self.norm.eps)
        mixed_BND = F.dropout(mixed_BND, dropout) if dropout else mixed_BND
        if padding is not None:
            mixed_BND = padding.restore(mixed_BND)
        return self.output(mixed_BND), after

    def _queries_keys_values(
        self, qkv_BNC: Tensor, context: SequenceContext, window_BWC: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q and k ``(B, N, H, K)``, v ``(B, N, H, V)``, and the convolution's window behind the last real token."""
        padding, starts_BN, convolution = context.padding, context.front_starts_BN, self.convolution
        if not self.key_size:
            last_BWC = None
            if convolution is not None:
                qkv_BNC, last_BWC = convolution(qkv_BNC, padding, starts_BN, window_BWC)
            v = torch.unflatten(F.silu(qkv_BNC), -1, (self.num_heads, -1))
            one_BNH1 = torch.ones_like(v[..., :1])
            return one_BNH1, one_BNH1, v, last_BWC
        # Unit length is rms_norm times K^(-1/2) each: 1 / K of the product, which is left to the skip's scale and norm.
        rotary = context.front_rotary()
        if convolution is None:
            return *queries_keys_values(qkv_BNC, self.num_heads, self.key_size, rotary=rotary), None
        documents_BN = None if starts_BN is None else starts_BN.cumsum(1)
        q, k, v = queries_keys_values(
            qkv_BNC,
            self.num_heads,
            self.key_size,
            weight=convolution.weight,
            window=window_BWC,
            documents=documents_BN,
            rotary=rotary,
        )
        return q, k, v, convolution.window_behind(qkv_BNC, padding, documents_BN, window_BWC)

    def _carry(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_l_BNH: Tensor,
        angle_BNH: Tensor | None,
        padding: Padding | None,
        starts_BN: Tensor | None,
        state_BHKV: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if padding is not None:
            # Behind a row's last real token nothing decays, turns or is written: its state stays the last one.
            real_BN1 = padding.front_real_BN.unsqueeze(-1)
            log_l_BNH, k = log_l_BNH * real_BN1, k * real_BN1.unsqueeze(-1)
            angle_BNH = None if angle_BNH is None else angle_BNH * real_BN1
        if self.training and self.dropout:
            k = k * F.dropout(torch.ones_like(k[..., :1]), self.dropout)
        o_BNHV, final_BHKV = bk_carry(
            q,
            k,
            v,
            log_l_BNH,
            angle=angle_BNH,
            starts=starts_BN,
            initial_state=state_BHKV,
            skip=max(1, self.key_size) * self.skip.to(log_l_BNH.dtype),
            output_final_state=True,
            form="recurrent" if v.shape[1] == 1 else "chunked",
        )
        return o_BNHV, final_BHKV.detach()

    def _chains(
        self, x_BND: Tensor, padding: Padding | None, starts_BN: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """log|l| and arg l ``(B, N, H)``, and what the chains remember: m ``(B, H)``, or l as a pair ``(B, H, 2)``."""
        if self.regime == "tunnelling" and padding is None and starts_BN is None and state is not None:
            tokens = x_BND.shape[0] * x_BND.shape[1]
            if one_token.is_alone(tokens, x_BND, self.potential.weight, self.log_rate, state):
                potential_BNH = one_token.linear(x_BND, self.potential.weight)
                log_l_BNH, state = one_token.tunnel(potential_BNH, self.log_rate, state)
                return log_l_BNH, None, state
        with torch.autocast(x_BND.device.type, enabled=False):
            potential_BNH = linear_in_single(x_BND, self.potential.weight)
            dtype = potential_BNH.dtype
            if self.regime == "tunnelling":
                w_BNH = gap_of_rate(F.softplus(potential_BNH) * self.log_rate.to(dtype).exp())
                log_l_BNH = cast(Tensor, bk_tunnel(w_BNH, starts=starts_BN, initial_state=state))
                return log_l_BNH, None, state_behind(-torch.expm1(log_l_BNH.detach()), padding, state, at_first=1.0)
            eta_H = F.softplus(self.raw_eta.to(dtype))
            l_BNH2 = bk_core_pairs(
                potential_BNH * self.log_amplitude.to(dtype).exp(),
                torch.stack([-self.energy.to(dtype), -eta_H], dim=-1),
                hopping=1.0
                if starts_BN is None
                else (~starts_BN[:, 1:, None]).to(dtype).expand(-1, -1, self.num_heads),
                initial_state=state,
            )
            log_l_BNH = 0.5 * torch.log(l_BNH2.square().sum(-1))
            angle_BNH = torch.atan2(l_BNH2[..., 1], l_BNH2[..., 0])
            return log_l_BNH, angle_BNH, state_behind(l_BNH2, padding, state, at_first=0.0)
