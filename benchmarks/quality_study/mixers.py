"""Mixers that only the study has: the resolvent's with one thing changed, or added; and others' layers."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quality_study.delta import delta_chunked
from resnet_bk.layers.context import MixerState, SequenceContext
from resnet_bk.layers.convolution import ShortConvolution
from resnet_bk.layers.resolvent import SHORTEST_MEMORY, memories
from resnet_bk.models import ResNetBKConfig
from resnet_bk.ops.bk import bk_core_pairs, bk_tunnel
from resnet_bk.ops.carry import bk_carry
from resnet_bk.ops.gated_norm import gated_norm
from resnet_bk.ops.projections import queries_keys_values
from resnet_bk.ops.rotation import rotate

Decay = Literal["chain", "own gap", "gated"]
Rotation = Literal["positions", "none", "constant", "tokens"]
Write = Literal["all", "gate", "gap"]
Features = Literal["silu", "linear", "softmax", "taylor"]
TEMPERATURE = 8.0  # of the Taylor features at the start: exp(8 s) to second order, s from -1 to 1


@dataclass(frozen=True, kw_only=True)
class Change:
    """What differs from the resolvent mixer in the tunnelling regime.

    ``decay``: l of the chain, 1 / (1 + w_i + m_{i-1}), which knows of the gaps before; of a chain with this token's gap
    everywhere; or exp(-w), Mamba-2's kind. ``rotation`` of keys and queries: by positions at fixed rates, none, by an
    angle per head, or by an angle that tokens choose. ``constant_gap``: the decay does not depend on tokens. ``write``:
    all of each token; as much as it says itself (a gate); or as much as it makes the head forget, w of this token,
    Mamba-2's way. ``delta``: a write first takes away what is read under its key. ``features`` of queries and keys:
    silu; nothing; softmax, addresses that can become sharp; or those whose products are exp(a s) to second order, s
    their cosine and a learned (S. Arora et al., "Based", 2024). ``shortest_memory``: of the first head at the start, in
    tokens. ``lost_writes``: share of tokens, of each head, that are not written in training. ``diagonal``: the seed's
    features, Re G and Im G, are added to the output.
    """

    decay: Decay = "chain"
    rotation: Rotation = "positions"
    constant_gap: bool = False
    write: Write = "all"
    delta: bool = False
    features: Features = "silu"
    shortest_memory: float = SHORTEST_MEMORY
    lost_writes: float = 0.0
    diagonal: bool = False


class ChangedResolvent(nn.Module):
    """The resolvent mixer of whole rows, without padding, documents and decoding, with a :class:`Change`."""

    def __init__(self, config: ResNetBKConfig, change: Change) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_resolvent_heads
        self.change, self.num_heads, self.key_size = change, heads, config.key_size
        self.longest_memory, self.residual = config.resolvent_longest_memory, 1 / math.sqrt(2 * config.num_layers)
        channels = heads * (2 * self.key_size + hidden // heads)
        self.qkv = nn.Linear(hidden, channels, bias=False)
        self.convolution = ShortConvolution(channels, config.conv_size) if config.conv_size else None
        self.potential = nn.Linear(hidden, heads, bias=False)
        self.log_gap = nn.Parameter(torch.empty(heads))
        self.skip = nn.Parameter(torch.ones(heads))
        self.gate = nn.Linear(hidden, hidden, bias=False)
        self.norm = nn.RMSNorm(hidden // heads, eps=config.layer_norm_eps)
        self.output = nn.Linear(hidden, hidden, bias=False)
        if change.features == "taylor":
            self.log_temperature = nn.Parameter(torch.empty(heads))
        if change.rotation == "constant":
            self.angle = nn.Parameter(torch.empty(heads))
        if change.rotation == "tokens":
            self.turn = nn.Linear(hidden, heads, bias=False)
        if change.write == "gate" or change.delta:
            self.write = nn.Linear(hidden, heads, bias=False)
        if change.diagonal:
            self.diagonal_potential = nn.Linear(hidden, heads, bias=False)
            self.diagonal_energy = nn.Parameter(torch.empty(heads))
            self.diagonal_raw_eta = nn.Parameter(torch.empty(heads))
            self.diagonal_output = nn.Linear(2 * heads, hidden, bias=False)

    @torch.no_grad()
    def begin(self) -> None:
        """Its own parameters at the start; matrices are the model's business."""
        memory = memories(self.num_heads, self.change.shortest_memory, self.longest_memory)
        gap = 1 / memory if self.change.decay == "gated" else 4 * torch.sinh(0.5 / memory) ** 2
        self.log_gap.copy_(torch.log(gap / math.log(2)))
        self.output.weight.normal_(std=self.output.in_features**-0.5 * self.residual)
        if self.change.features == "taylor":
            self.log_temperature.fill_(math.log(TEMPERATURE))
        if self.change.rotation == "constant":
            self.angle.copy_(torch.linspace(0, math.pi / 4, self.num_heads))
        if self.change.diagonal:
            nodes = torch.pi * (torch.arange(self.num_heads) + 0.5) / self.num_heads
            self.diagonal_energy.copy_(2 * torch.cos(nodes))
            self.diagonal_raw_eta.fill_(math.log(math.expm1(1.0)))
            self.diagonal_output.weight.normal_(std=self.diagonal_output.in_features**-0.5 * self.residual)

    def forward(self, x_BND: Tensor, context: SequenceContext, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """The mixed tokens ``(B, N, D)``; there is no state."""
        assert context.padding is None and context.front_starts_BN is None and not state
        device = x_BND.device.type
        rounded_BND = x_BND.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_BND
        q, k, v = self._queries_keys_values(self.qkv(rounded_BND), context)
        with torch.autocast(device, enabled=False):
            o_BNHV = self._carried(q, k, v, x_BND.to(torch.promote_types(x_BND.dtype, torch.float32)))
        assert self.norm.eps is not None
        mixed_BND = self.output(gated_norm(o_BNHV, self.norm.weight, self.gate(rounded_BND), self.norm.eps))
        return mixed_BND + self._diagonal(x_BND) if self.change.diagonal else mixed_BND, {}

    def _queries_keys_values(self, qkv_BNC: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor, Tensor]:
        rotary = context.rotary if self.change.rotation == "positions" else None
        weight = None if self.convolution is None else self.convolution.weight
        if self.change.features == "silu":
            return queries_keys_values(qkv_BNC, self.num_heads, self.key_size, weight=weight, rotary=rotary)
        if self.convolution is not None:
            qkv_BNC, _ = self.convolution(qkv_BNC, None, None, None)
        size = self.key_size
        q, k, v = qkv_BNC.unflatten(-1, (self.num_heads, -1)).split(
            [size, size, qkv_BNC.shape[-1] // self.num_heads - 2 * size], -1
        )
        if self.change.features == "softmax":
            q, k = (size * F.softmax(part.float(), dim=-1) for part in (q, k))
        else:
            q, k = (F.rms_norm(part.float(), (size,), eps=1e-6) for part in (q, k))
        if rotary is not None:
            cos_BN1C, sin_BN1C = (table.unsqueeze(2) for table in rotary)
            q, k = (rotate(part, cos_BN1C, sin_BN1C) for part in (q, k))
        if self.change.features == "taylor":
            q, k = (self._taylor(part * size**-0.5) for part in (q, k))
        return q.to(v.dtype), k.to(v.dtype), F.silu(v)

    def _taylor(self, unit: Tensor) -> Tensor:
        root = self.log_temperature.exp().sqrt()[:, None]
        first = root * unit
        second = (first.unsqueeze(-1) * first.unsqueeze(-2)).flatten(-2) / math.sqrt(2)
        return torch.cat([torch.ones_like(first[..., :1]), first, second], dim=-1)

    def _carried(self, q: Tensor, k: Tensor, v: Tensor, x_BND: Tensor) -> Tensor:
        w_BNH = self._gap(x_BND)
        log_l_BNH, skip_H = self._log_l(w_BNH), self.key_size * self.skip
        if self.change.delta:
            # Keys and queries have length K^(1/2); the rule wants 1, and what it reads is scaled back.
            beta_BNH = torch.sigmoid(F.linear(x_BND, self.write.weight))
            unit = self.key_size**-0.5
            o_BNHV = delta_chunked(q * unit, k * unit, v, log_l_BNH, beta_BNH)
            return (o_BNHV + self.skip[:, None] * v).to(v.dtype)
        strength_BNH: Tensor | None = None
        if self.change.write == "gate":
            strength_BNH = 2 * torch.sigmoid(F.linear(x_BND, self.write.weight))
        if self.change.write == "gap":
            strength_BNH = w_BNH / self.log_gap.exp()
        if self.change.lost_writes and self.training:
            strength_BNH = torch.ones_like(w_BNH) if strength_BNH is None else strength_BNH
            strength_BNH = F.dropout(strength_BNH, self.change.lost_writes)
        if strength_BNH is not None:
            k = k * strength_BNH.unsqueeze(-1).to(k.dtype)
        carried = bk_carry(q, k, v, log_l_BNH, angle=self._angle(x_BND), skip=skip_H)
        assert isinstance(carried, Tensor)
        return carried

    def _gap(self, x_BND: Tensor) -> Tensor:
        potential_BNH = F.linear(x_BND, self.potential.weight)
        if self.change.constant_gap:
            potential_BNH = torch.zeros_like(potential_BNH)
        return F.softplus(potential_BNH) * self.log_gap.exp()

    def _log_l(self, w_BNH: Tensor) -> Tensor:
        if self.change.decay == "gated":
            return -w_BNH
        if self.change.decay == "own gap":
            return -2 * torch.asinh(0.5 * w_BNH.sqrt())
        log_l_BNH = bk_tunnel(w_BNH)
        assert isinstance(log_l_BNH, Tensor)
        return log_l_BNH

    def _angle(self, x_BND: Tensor) -> Tensor | None:
        if self.change.rotation == "constant":
            return self.angle.expand(*x_BND.shape[:2], -1)
        if self.change.rotation == "tokens":
            return math.pi / 4 * torch.tanh(F.linear(x_BND, self.turn.weight))
        return None

    def _diagonal(self, x_BND: Tensor) -> Tensor:
        with torch.autocast(x_BND.device.type, enabled=False):
            single_BND = x_BND.to(torch.promote_types(x_BND.dtype, torch.float32))
            eta_H = F.softplus(self.diagonal_raw_eta)
            g_BNH2 = bk_core_pairs(
                F.linear(single_BND, self.diagonal_potential.weight),
                torch.stack([-self.diagonal_energy, -eta_H], dim=-1),
                hopping=1.0,
            )
        diagonal_BND: Tensor = self.diagonal_output(g_BNH2.flatten(-2).to(self.diagonal_output.weight.dtype))
        return diagonal_BND


class GatedDeltaNet(nn.Module):
    """flash-linear-attention's layer in its authors' proportions (values twice as wide as keys), in our blocks."""

    def __init__(self, config: ResNetBKConfig) -> None:
        super().__init__()
        from fla.layers import GatedDeltaNet as Layer

        head_dim = 64 if config.hidden_size >= 256 else 32
        heads = max(1, round(0.75 * config.hidden_size / head_dim))
        self.residual, self.hidden_size = 1 / math.sqrt(2 * config.num_layers), config.hidden_size
        self.layer = Layer(
            hidden_size=config.hidden_size, expand_v=2, head_dim=head_dim, num_heads=heads, mode="chunk", layer_idx=0
        )

    @torch.no_grad()
    def begin(self) -> None:
        """The writing matrix as ours begins; the layer has begun all else by its own rule."""
        weight = self.layer.o_proj.weight
        weight.normal_(std=weight.shape[1] ** -0.5 * self.residual)

    def forward(self, x_BND: Tensor, context: SequenceContext, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """The mixed tokens ``(B, N, D)``; there is no state."""
        assert context.padding is None and not state
        y_BND: Any = self.layer(x_BND)[0]
        return y_BND, {}
