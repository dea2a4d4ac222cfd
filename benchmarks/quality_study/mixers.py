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
from resnet_bk.layers.memories import memories
from resnet_bk.layers.resolvent import SHORTEST_MEMORY, TYPICAL_SOFTPLUS
from resnet_bk.models import ResNetBKConfig
from resnet_bk.ops.bk import bk_core_pairs, bk_tunnel
from resnet_bk.ops.carry import bk_carry
from resnet_bk.ops.gap import gap_of_rate
from resnet_bk.ops.gated_norm import gated_norm
from resnet_bk.ops.projections import queries_keys_values
from resnet_bk.ops.rotation import rotate

Decay = Literal["chain", "gap", "own gap", "gated"]
Rotation = Literal["positions", "none", "constant", "tokens"]
Write = Literal["all", "gate", "gap"]
Features = Literal["silu", "linear", "taylor"]
Gate = Literal["silu", "sigmoid", "none"]
ALL_FORGOTTEN = -30.0  # as log(l)
TEMPERATURE = 8.0  # of the Taylor features at the start: exp(8 s) to second order, s from -1 to 1


@dataclass(frozen=True, kw_only=True)
class Change:
    """What differs from the resolvent mixer in the tunnelling regime.

    ``decay``, with r = softplus(W x) * rate: l of the chain whose gap is 4 sinh(r / 2)^2, the library's; of the chain
    whose gap is softplus(W x) times a learned one, as the library had it first; of a chain that has this token's gap
    everywhere, which is exp(-r) from the library's rates on; or exp(-r), Mamba-2's kind, from the earlier study's rates
    on. ``rotation`` of keys and queries: by positions at fixed rates, none, by an angle per head, or by an angle that
    tokens choose. ``constant_gap``: the decay does not depend on tokens. ``write``: all of each token; as much as it
    says itself (a gate); or as much as it makes the head forget, softplus(W x), Mamba-2's way. ``delta``: a write first
    takes away what is read under its key. ``features`` of queries and keys: silu; nothing; or those whose products are
    exp(a s) to second order, s their cosine and a learned (S. Arora et al., "Based", 2024). ``gate``: what is read is
    multiplied by silu(W_g x), by sigmoid(W_g x), or not. Of the writes a share ``lost_writes`` is dropped in training,
    of the queries' coordinates ``lost_queries``, and of what the gate lets through ``lost_reads``: None is the dropout
    of all else, and each is 0 where that is. Queries' coordinates are dropped token by token, or the same ones in all
    of a row where it is ``of_whole_rows``. A share ``lost_memories`` of the tokens lets a head forget all that was
    before, a share ``lost_heads`` of a token's heads reads nothing, and for a share ``lost_taps`` of its channels a
    step's convolution has no such earlier token. ``quiet``: what a head reads is divided by the root of its mean square
    and a learned one's, so that what is weak beside that stays weak; without, all reads come to the same length.
    ``diagonal``: the seed's features, Re G and Im G, are added to the output. ``shortest_memory``: of the first head,
    at the start, from which on others spread.
    """

    decay: Decay = "chain"
    rotation: Rotation = "positions"
    constant_gap: bool = False
    write: Write = "all"
    delta: bool = False
    features: Features = "silu"
    gate: Gate = "silu"
    lost_writes: float | None = None
    lost_queries: float | None = 0.0
    lost_reads: float | None = 0.0
    of_whole_rows: bool = False
    lost_memories: float = 0.0
    lost_heads: float = 0.0
    lost_taps: float = 0.0
    quiet: bool = False
    diagonal: bool = False
    shortest_memory: float = SHORTEST_MEMORY


class ChangedResolvent(nn.Module):
    """The resolvent mixer of whole rows, without padding, documents and decoding, with a :class:`Change`."""

    def __init__(self, config: ResNetBKConfig, change: Change) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_resolvent_heads
        self.change, self.num_heads, self.key_size = change, heads, config.key_size
        self.longest_memory, self.residual = config.resolvent_longest_memory, 1 / math.sqrt(2 * config.num_layers)
        lost = (change.lost_writes, change.lost_queries, change.lost_reads, change.lost_memories)
        self.lost_writes, self.lost_queries, self.lost_reads, self.lost_memories, self.lost_heads, self.lost_taps = (
            (config.dropout if share is None else share) if config.dropout else 0.0
            for share in (*lost, change.lost_heads, change.lost_taps)
        )
        channels = heads * (2 * self.key_size + hidden // heads)
        self.qkv = nn.Linear(hidden, channels, bias=False)
        self.convolution = ShortConvolution(channels, config.conv_size) if config.conv_size else None
        self.potential = nn.Linear(hidden, heads, bias=False)
        self.log_rate = nn.Parameter(torch.empty(heads))  # the logarithm of a gap where the decay is made of gaps
        self.skip = nn.Parameter(torch.ones(heads))
        if change.gate != "none":
            self.gate = nn.Linear(hidden, hidden, bias=False)
        self.norm = nn.RMSNorm(hidden // heads, eps=config.layer_norm_eps)
        if change.quiet:
            self.log_floor = nn.Parameter(torch.empty(heads))
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
        wanted = gap_of_rate(1 / memory) if self.change.decay == "gap" else 1 / memory
        # A constant one is softplus(0) itself; the old gaps and Mamba-2's kind begin as if all were.
        is_of_zero = self.change.constant_gap or self.change.decay in ("gap", "gated")
        self.log_rate.copy_(torch.log(wanted / (math.log(2) if is_of_zero else TYPICAL_SOFTPLUS)))
        self.output.weight.normal_(std=self.output.in_features**-0.5 * self.residual)
        if self.change.quiet:
            self.log_floor.fill_(math.log(self.key_size))
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
        kept = torch.ones_like(q[:, :1] if self.change.of_whole_rows else q)
        q = q * F.dropout(kept, self.lost_queries, self.training)
        with torch.autocast(device, enabled=False):
            o_BNHV = self._carried(q, k, v, x_BND.to(torch.promote_types(x_BND.dtype, torch.float32)))
        mixed_BND = self.output(F.dropout(self._normed(o_BNHV, rounded_BND), self.lost_reads, self.training))
        return mixed_BND + self._diagonal(x_BND) if self.change.diagonal else mixed_BND, {}

    def _normed(self, o_BNHV: Tensor, x_BND: Tensor) -> Tensor:
        assert self.norm.eps is not None
        if self.lost_heads:
            o_BNHV = o_BNHV * F.dropout(torch.ones_like(o_BNHV[..., :1]), self.lost_heads, self.training)
        if self.change.quiet:
            quiet_BNHV = (o_BNHV * torch.exp(-self.log_floor)[:, None]).to(o_BNHV.dtype)
            return gated_norm(quiet_BNHV, self.norm.weight, self.gate(x_BND), 1.0)
        if self.change.gate == "silu":
            return gated_norm(o_BNHV, self.norm.weight, self.gate(x_BND), self.norm.eps)
        single_BNHV = o_BNHV.to(torch.promote_types(o_BNHV.dtype, torch.float32))
        read_BND = self.norm(single_BNHV).flatten(2)
        if self.change.gate == "sigmoid":
            read_BND = read_BND * torch.sigmoid(self.gate(x_BND).to(read_BND.dtype))
        return read_BND.to(x_BND.dtype)

    def _queries_keys_values(self, qkv_BNC: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor, Tensor]:
        rotary = context.rotary if self.change.rotation == "positions" else None
        weight = None if self.convolution is None else self._kept_taps(self.convolution.weight)
        if self.change.features == "silu":
            return queries_keys_values(qkv_BNC, self.num_heads, self.key_size, weight=weight, rotary=rotary)
        if self.convolution is not None:
            qkv_BNC, _ = self.convolution(qkv_BNC, None, None, None)
        size = self.key_size
        q, k, v = qkv_BNC.unflatten(-1, (self.num_heads, -1)).split(
            [size, size, qkv_BNC.shape[-1] // self.num_heads - 2 * size], -1
        )
        q, k = (F.rms_norm(part.float(), (size,), eps=1e-6) for part in (q, k))
        if rotary is not None:
            cos_BN1C, sin_BN1C = (table.unsqueeze(2) for table in rotary)
            q, k = (rotate(part, cos_BN1C, sin_BN1C) for part in (q, k))
        if self.change.features == "taylor":
            q, k = (self._taylor(part * size**-0.5) for part in (q, k))
        return q.to(v.dtype), k.to(v.dtype), F.silu(v)

    def _kept_taps(self, weight_SC: Tensor) -> Tensor:
        if not self.lost_taps:
            return weight_SC
        earlier_SC = F.dropout(torch.ones_like(weight_SC[1:]), self.lost_taps, self.training)
        return weight_SC * torch.cat([torch.ones_like(weight_SC[:1]), earlier_SC])

    def _taylor(self, unit: Tensor) -> Tensor:
        root = self.log_temperature.exp().sqrt()[:, None]
        first = root * unit
        second = (first.unsqueeze(-1) * first.unsqueeze(-2)).flatten(-2) / math.sqrt(2)
        return torch.cat([torch.ones_like(first[..., :1]), first, second], dim=-1)

    def _carried(self, q: Tensor, k: Tensor, v: Tensor, x_BND: Tensor) -> Tensor:
        strength_BNH = self._strength(x_BND)
        log_l_BNH, skip_H = self._log_l(strength_BNH * self.log_rate.exp()), self.key_size * self.skip
        # Ones that are dropped in training, as the library does it; what is left is larger by as much.
        written_BNH1 = F.dropout(torch.ones_like(k[..., :1]), self.lost_writes, self.training)
        if self.change.delta:
            # Keys and queries have length K^(1/2); the rule wants 1, and what it reads is scaled back. It writes the
            # difference to what is there already, so that what is left of the writes is to stay as large as it was.
            beta_BNH = torch.sigmoid(F.linear(x_BND, self.write.weight)) * (written_BNH1.squeeze(-1) > 0)
            unit = self.key_size**-0.5
            o_BNHV = delta_chunked(q * unit, k * unit, v, log_l_BNH, beta_BNH)
            return (o_BNHV + self.skip[:, None] * v).to(v.dtype)
        k = k * written_BNH1
        if self.change.write == "gate":
            k = k * 2 * torch.sigmoid(F.linear(x_BND, self.write.weight)).unsqueeze(-1).to(k.dtype)
        if self.change.write == "gap":
            k = k * strength_BNH.unsqueeze(-1).to(k.dtype)
        carried = bk_carry(q, k, v, log_l_BNH, angle=self._angle(x_BND), skip=skip_H)
        assert isinstance(carried, Tensor)
        return carried

    def _strength(self, x_BND: Tensor) -> Tensor:
        """softplus(W x): how much each token wants each head to forget, before the head's own rate."""
        potential_BNH = F.linear(x_BND, self.potential.weight)
        return F.softplus(torch.zeros_like(potential_BNH) if self.change.constant_gap else potential_BNH)

    def _log_l(self, rate_BNH: Tensor) -> Tensor:
        if self.change.decay in ("own gap", "gated"):
            return self._lost(-rate_BNH)
        log_l_BNH = bk_tunnel(rate_BNH if self.change.decay == "gap" else gap_of_rate(rate_BNH))
        assert isinstance(log_l_BNH, Tensor)
        return self._lost(log_l_BNH)

    def _lost(self, log_l_BNH: Tensor) -> Tensor:
        if not (self.training and self.lost_memories):
            return log_l_BNH
        return log_l_BNH.masked_fill(torch.rand_like(log_l_BNH) < self.lost_memories, ALL_FORGOTTEN)

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


@dataclass(frozen=True, kw_only=True)
class Positions:
    """What attention knows of them: rotary ones in the first ``heads`` of its heads, of the ``pairs`` of coordinates
    with the shortest waves. Or its logits ``lose`` something for each token on the way: what the resolvent's l would,
    by gaps that tokens choose or that are constant; or a learned rate of the head, wherever the text began.
    ``keeps_weights``: dropout leaves attention's weights alone. ``lost_queries`` and ``lost_reads`` as of a
    :class:`Change`."""

    heads: float = 1.0
    pairs: float = 0.0
    lose: Literal["nothing", "by tokens' gaps", "by a constant gap", "by the distance"] = "nothing"
    keeps_weights: bool = False
    lost_queries: float = 0.0
    lost_reads: float = 0.0

    @property
    def are_rotary_alone(self) -> bool:
        """Whether all coordinates of all heads turn, and nothing else tells the positions."""
        return self.heads == self.pairs == 1 and self.lose == "nothing"


class PositionedAttention(nn.Module):
    """Causal attention of whole rows, without padding, documents and decoding, with :class:`Positions`."""

    def __init__(self, config: ResNetBKConfig, positions: Positions) -> None:
        super().__init__()
        hidden, self.num_heads = config.hidden_size, config.num_attention_heads
        self.positions, self.dropout = positions, 0.0 if positions.keeps_weights else config.dropout
        self.lost_queries = positions.lost_queries if config.dropout else 0.0
        self.lost_reads = positions.lost_reads if config.dropout else 0.0
        self.longest_memory = 8 * config.resolvent_longest_memory
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.convolution = ShortConvolution(3 * hidden, config.conv_size) if config.conv_size else None
        self.output = nn.Linear(hidden, hidden, bias=False)
        if positions.lose != "nothing":
            self.log_rate = nn.Parameter(torch.empty(self.num_heads))
        if positions.lose == "by tokens' gaps":
            self.potential = nn.Linear(hidden, self.num_heads, bias=False)

    @torch.no_grad()
    def begin(self) -> None:
        """Its own parameters at the start; matrices are the model's business."""
        typical = {"by tokens' gaps": TYPICAL_SOFTPLUS, "by a constant gap": math.log(2), "by the distance": 1.0}
        if self.positions.lose in typical:
            memory = memories(self.num_heads, 4.0, self.longest_memory)
            self.log_rate.copy_(-torch.log(memory * typical[self.positions.lose]))

    def forward(self, x_BND: Tensor, context: SequenceContext, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """The mixed tokens ``(B, N, D)``; there is no state."""
        assert context.padding is None and context.front_starts_BN is None and not state
        qkv_BNC = self.qkv(x_BND)
        if self.convolution is not None:
            qkv_BNC, _ = self.convolution(qkv_BNC, None, None, None)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in qkv_BNC.chunk(3, dim=-1))
        if self.positions.pairs:
            q, k = (self._turned(part, context) for part in (q, k))
        q = F.dropout(q, self.lost_queries, self.training)
        bias = None if self.positions.lose == "nothing" else self._lost(x_BND)
        mixed_BHNV = F.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in (q, k, v)),
            attn_mask=None if bias is None else bias.to(v.dtype),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=bias is None,
        )
        return self.output(F.dropout(mixed_BHNV.transpose(1, 2).flatten(2), self.lost_reads, self.training)), {}

    def _turned(self, part_BNHC: Tensor, context: SequenceContext) -> Tensor:
        assert context.rotary is not None
        cos_BN1C, sin_BN1C = (table.unsqueeze(2) for table in context.rotary)
        is_still_C = (
            torch.arange(cos_BN1C.shape[-1], device=cos_BN1C.device) >= self.positions.pairs * cos_BN1C.shape[-1]
        )
        count = round(self.positions.heads * self.num_heads)
        turned = rotate(
            part_BNHC[:, :, :count], cos_BN1C.masked_fill(is_still_C, 1), sin_BN1C.masked_fill(is_still_C, 0)
        )
        return torch.cat([turned, part_BNHC[:, :, count:]], dim=2)

    def _lost(self, x_BND: Tensor) -> Tensor:
        """Of each query and key, from the key on to the query ``(B, H, N, N)``; -inf where the key is later."""
        with torch.autocast(x_BND.device.type, enabled=False):
            single_BND = x_BND.to(torch.promote_types(x_BND.dtype, torch.float32))
            log_l_BNH = self._log_l(single_BND)
            sum_BHN = log_l_BNH.cumsum(1).transpose(1, 2)
            lost = sum_BHN.unsqueeze(-1) - sum_BHN.unsqueeze(-2)
            later = torch.ones_like(lost[0, 0], dtype=torch.bool).triu(1)
            return lost.masked_fill(later, -math.inf)

    def _log_l(self, x_BND: Tensor) -> Tensor:
        rate_H = self.log_rate.exp()
        if self.positions.lose == "by the distance":
            return -rate_H.expand(*x_BND.shape[:2], -1)
        if self.positions.lose == "by tokens' gaps":
            potential_BNH = F.linear(x_BND, self.potential.weight)
        else:
            potential_BNH = x_BND.new_zeros(*x_BND.shape[:2], self.num_heads)
        log_l_BNH = bk_tunnel(gap_of_rate(F.softplus(potential_BNH) * rate_H))
        assert isinstance(log_l_BNH, Tensor)
        return log_l_BNH


class GatedDeltaNet(nn.Module):
    """flash-linear-attention's layer in its authors' proportions (values twice as wide as keys), in our blocks.

    Dropout leaves its writes alone.
    """

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
