"""Who is compared, and the models of equal size that they become."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quality_study.mixers import Change, ChangedResolvent, GatedDeltaNet, PositionedAttention, Positions
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM

# Dense unless a contestant says otherwise: what is compared is the mixer. One in all blocks, but for hybrids.
BASE: dict[str, Any] = {
    "num_experts": 1,
    "router_aux_loss_coef": 0.0,
    "tie_word_embeddings": True,
    "local_attention_every": 0,
}
EVERY = ResNetBKConfig.local_attention_every
HYBRID = {"local_attention_every": EVERY}
NOWHERE = Positions()
BOTH = Positions(pairs=1, lose="by the distance")
MAMBA2: dict[str, Any] = {"decay": "gated", "write": "gap", "rotation": "none"}
# Dropout as it is in the library, of queries and reads as of all else; without that; and of more of them.
DROPS_READS: dict[str, Any] = {"lost_queries": None, "lost_reads": None}
KEEPS_READS = Change()
LOST: dict[str, Any] = {"lost_queries": 0.6, "lost_reads": 0.3}
SHORT_TEXT_FADING: dict[str, Any] = {"local_attention_every": 2, "conv_size": 0}
SHORT_TEXT: dict[str, Any] = {**SHORT_TEXT_FADING, "local_attention_positions": "rotary"}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A name for keys of results and a label for people; ``fields`` of the configuration that differ; ``change`` of the
    resolvent mixer, or ``layer`` for another mixer in its place; ``positions`` of attention, None for the library's,
    which in a hybrid fades with the distance; ``needs`` is a package without which it is left out."""

    name: str
    label: str
    fields: dict[str, Any] = field(default_factory=dict)
    change: Change | None = None
    layer: Callable[[ResNetBKConfig], nn.Module] | None = None
    positions: Positions | None = None
    needs: str | None = None

    @property
    def is_available(self) -> bool:
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


def _of(name: str, label: str, **fields: Any) -> Contestant:
    """The library's, with these fields."""
    return Contestant(name=name, label=label, fields=fields)


def _changed(name: str, label: str, **change: Any) -> Contestant:
    return Contestant(name=name, label=label, change=Change(**change))


def _ours(name: str, label: str, every: int = EVERY, **change: Any) -> Contestant:
    """The library's hybrid, with another recurrent mixer where a change is given."""
    return Contestant(
        name=name,
        label=label,
        fields={"local_attention_every": every},
        change=Change(**change) if change else None,
    )


def _hybrid(name: str, label: str, change: Change | None = KEEPS_READS, **fields: Any) -> Contestant:
    return Contestant(name=f"hybrid-{name}", label=label, fields={**HYBRID, **fields}, change=change, positions=NOWHERE)


def _changed_hybrid(name: str, label: str, **change: Any) -> Contestant:
    return Contestant(name=f"hybrid-{name}", label=label, fields=HYBRID, change=Change(**change), positions=NOWHERE)


def _positioned(name: str, label: str, every: int = EVERY, **positions: Any) -> Contestant:
    return Contestant(
        name=f"hybrid-{name}",
        label=label,
        fields={"local_attention_every": every},
        change=KEEPS_READS,
        positions=Positions(**positions),
    )


def _plain(
    name: str,
    label: str,
    *,
    every: int = EVERY,
    change: Change | None = KEEPS_READS,
    rotary: bool = False,
    **fields: Any,
) -> Contestant:
    """The library's hybrid without convolution, and something else changed."""
    return Contestant(
        name=f"plain-{name}",
        label=f"ours, no convolution, {label}",
        fields={"local_attention_every": every, "conv_size": 0, **fields},
        change=change,
        positions=Positions(pairs=1) if rotary else None,
    )


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        _ours("ours", "ResNet-BK (ours)"),
        Contestant(
            name="ours-keeps-reads",
            label="ours, dropout leaves queries and reads alone",
            fields=HYBRID,
            change=KEEPS_READS,
        ),
        _ours("ours-half", "ours, attention in every second block", every=2),
        Contestant(
            name="ours-half-keeps-reads",
            label="ours, attention in every second block, leaves queries and reads alone",
            fields={"local_attention_every": 2},
            change=KEEPS_READS,
        ),
        _ours("ours-memory-64", "ours, memories from 64 tokens on", shortest_memory=64.0),
        Contestant(
            name="ours-no-convolution",
            label="ours, no convolution",
            fields={"conv_size": 0, **HYBRID},
            change=KEEPS_READS,
        ),
        _ours("ours-gated", "ours with real-gated linear attention", decay="gated"),
        _ours("ours-mamba2", "ours with Mamba-2's decays and writes", **MAMBA2),
        # Attention without positions: what the parts were tried with.
        Contestant(
            name="hybrid", label="hybrid without positions", fields=HYBRID, change=KEEPS_READS, positions=NOWHERE
        ),
        Contestant(name="resolvent", label="resolvent alone", change=KEEPS_READS),
        _of("ours-short-text", "ours for short texts", **SHORT_TEXT),
        Contestant(
            name="ours-short-text-lost-reads",
            label="ours for short texts, drops more queries and reads",
            fields=SHORT_TEXT,
            change=Change(**LOST),
        ),
        _ours("ours-quiet", "ours, weak reads stay weak", **DROPS_READS, quiet=True),
        Contestant(
            name="ours-short-text-quiet",
            label="ours for short texts, weak reads stay weak",
            fields=SHORT_TEXT,
            change=Change(**DROPS_READS, quiet=True),
        ),
        _ours("ours-lost-heads", "ours, drops whole heads' reads", **DROPS_READS, lost_heads=0.2),
        _ours("ours-lost-taps", "ours, drops taps of its convolution", **DROPS_READS, lost_taps=0.2),
        _of("ours-half-rotary", "ours, rotary attention in every second block", **{**SHORT_TEXT, "conv_size": 4}),
        # Attention that turns with the position and fades with the distance.
        Contestant(name="ours-both", label="ours, rotary attention that fades", fields=HYBRID, positions=BOTH),
        Contestant(
            name="ours-half-both",
            label="ours, rotary attention that fades in every second block",
            fields={"local_attention_every": 2},
            positions=BOTH,
        ),
        # The same but for the positions, which go on behind the training length.
        _of("ours-short-text-fading", "ours for short texts, fading", **SHORT_TEXT_FADING),
        Contestant(
            name="ours-short-text-fading-mamba2",
            label="ours for short texts, fading, with Mamba-2's decays and writes",
            fields=SHORT_TEXT_FADING,
            change=Change(**DROPS_READS, **MAMBA2),
        ),
        _of("attention", "Transformer", mixer="attention"),
        _of("attention-plain", "Transformer, no convolution", mixer="attention", conv_size=0),
        Contestant(
            name="attention-lost-reads",
            label="Transformer, no convolution, drops more queries and reads",
            fields={"mixer": "attention", "conv_size": 0},
            positions=Positions(pairs=1, **LOST),
        ),
        Contestant(
            name="attention-less-lost-reads",
            label="Transformer, no convolution, drops fewer queries and reads",
            fields={"mixer": "attention", "conv_size": 0},
            positions=Positions(pairs=1, lost_queries=0.2, lost_reads=0.2),
        ),
        Contestant(
            name="attention-conv-less-lost-reads",
            label="Transformer, drops fewer queries and reads",
            fields={"mixer": "attention"},
            positions=Positions(pairs=1, lost_queries=0.2, lost_reads=0.2),
        ),
        # The Mamba family, alone and in our hybrid's place for the resolvent.
        _changed("gated", "real-gated linear attention (Mamba-2's kind)", decay="gated"),
        _changed("mamba2", "Mamba-2's decays and writes, no rotation", **MAMBA2),
        _changed("mamba2-drops-reads", "Mamba-2's decays and writes, drops queries and reads", **DROPS_READS, **MAMBA2),
        _ours(
            "ours-mamba2-drops-reads",
            "ours with Mamba-2's decays and writes, drops queries and reads",
            **DROPS_READS,
            **MAMBA2,
        ),
        _changed_hybrid(
            "mamba2-drops-reads",
            "without positions, with Mamba-2's decays and writes, drops queries and reads",
            **DROPS_READS,
            **MAMBA2,
        ),
        _changed(
            "gated-delta", "Gated DeltaNet's recurrence (our torch form)", decay="gated", delta=True, rotation="none"
        ),
        Contestant(name="deltanet", label="Gated DeltaNet (flash-linear-attention)", layer=GatedDeltaNet, needs="fla"),
        _changed_hybrid("gated", "without positions, with real-gated linear attention", decay="gated"),
        _changed_hybrid("mamba2", "without positions, with Mamba-2's decays and writes", **MAMBA2),
        # Of the hybrid, one thing at a time: its attention,
        _positioned("rotary", "rotary positions in attention", pairs=1),
        _positioned("half-rotary", "rotary positions of half of its coordinates", pairs=0.5),
        _positioned("quarter-rotary", "rotary positions of a quarter of them", pairs=0.25),
        _positioned("rotary-heads", "rotary positions in half of its heads", heads=0.5, pairs=1),
        _positioned("forgetting", "attention forgets as the resolvent does", lose="by tokens' gaps"),
        _positioned("fading", "attention forgets at a constant gap of each head", lose="by a constant gap"),
        _positioned("half-fading", "the same attention in every second block", every=2, lose="by a constant gap"),
        _positioned("slopes", "attention fades with the distance (ours)", lose="by the distance"),
        _positioned(
            "keeps-weights",
            "ours, and dropout drops no weights of attention",
            lose="by the distance",
            keeps_weights=True,
        ),
        _hybrid("half", "attention in every second block", local_attention_every=2),
        _hybrid("third", "attention in every third block", local_attention_every=3),
        # decays,
        _changed_hybrid("gap", "gap softplus(.) times a learned one", decay="gap"),
        _changed_hybrid("constant-gap", "gap does not depend on tokens", constant_gap=True),
        _changed_hybrid("own-gap", "l = exp(-r): no memory of earlier gaps", decay="own gap"),
        _hybrid("scattering", "scattering regime", change=None, resolvent_regime="scattering"),
        # writes,
        _changed_hybrid("keeps-writes", "dropout drops no writes", lost_writes=0.0),
        _changed_hybrid("input-gate", "with an input gate", write="gate"),
        _changed_hybrid("gap-write", "writes as much as it forgets", write="gap"),
        _changed_hybrid("delta", "with delta-rule writes", delta=True),
        # keys and the state,
        _changed_hybrid("linear-keys", "no silu on queries and keys", features="linear"),
        Contestant(
            name="hybrid-taylor",
            label="exp(a q.k) to second order, keys half as wide",
            fields={**HYBRID, "resolvent_key_size": "half"},
            change=Change(features="taylor"),
            positions=NOWHERE,
        ),
        _changed_hybrid("no-rotation", "no rotation", rotation="none"),
        _changed_hybrid("constant-rotation", "one angle per head", rotation="constant"),
        _changed_hybrid("token-rotation", "angles chosen by tokens", rotation="tokens"),
        _hybrid("half-state", "keys half as wide", resolvent_key_size="half"),
        _hybrid("double-state", "keys twice as wide", resolvent_key_size="double"),
        _hybrid("vector", "vector state", change=None, resolvent_state="vector"),
        # and what is around them.
        _hybrid("no-convolution", "no convolution", conv_size=0),
        _changed_hybrid("diagonal", "with the seed's diagonal features", diagonal=True),
        _hybrid("moe", "4 experts, one a token", num_experts=4, router_aux_loss_coef=0.01),
        # Ours without convolution, and one thing more: what might learn less by heart.
        _plain("half", "attention in every second block", every=2),
        _plain("whole", "attention in every block", every=1),
        _plain("resolvent", "no attention", every=0),
        _plain("rotary", "rotary positions in attention", rotary=True),
        _plain("half-rotary", "rotary attention in every second block", every=2, rotary=True),
        _plain("half-state", "keys half as wide", resolvent_key_size="half"),
        _plain("quarter-state", "keys a quarter as wide", resolvent_key_size="quarter"),
        _plain("vector", "vector state", change=None, resolvent_state="vector"),
        _plain(
            "half-half-state",
            "attention in every second block, keys half as wide",
            every=2,
            resolvent_key_size="half",
        ),
        _plain("constant-gap", "gap does not depend on tokens", change=Change(constant_gap=True)),
        _plain("no-rotation", "no rotation", change=Change(rotation="none")),
        _plain("linear-keys", "no silu on queries and keys", change=Change(features="linear")),
        _plain("memory-16", "memories from 16 tokens on", change=Change(shortest_memory=16)),
        _plain("memory-64", "memories from 64 tokens on", change=Change(shortest_memory=64)),
        _plain(
            "memory-64-rotary",
            "memories from 64 tokens on, rotary attention",
            change=Change(shortest_memory=64),
            rotary=True,
        ),
        _plain(
            "constant-memory",
            "constant gaps, memories from 64 tokens on, rotary attention",
            change=Change(shortest_memory=64, constant_gap=True),
            rotary=True,
        ),
        _plain(
            "constant-linear",
            "constant gaps, memories from 64 tokens on, no silu, rotary attention",
            change=Change(shortest_memory=64, constant_gap=True, features="linear"),
            rotary=True,
        ),
        _ours("ours-lost-reads", "ours, drops more queries and reads", **LOST),
        _ours("ours-half-lost-reads", "ours, attention in every second block, drops more of both", every=2, **LOST),
        Contestant(
            name="ours-half-rotary-lost-reads",
            label="ours, rotary attention in every second block, drops more of both",
            fields={**SHORT_TEXT, "conv_size": 4},
            change=Change(**LOST),
        ),
        _ours("ours-mamba2-lost-reads", "ours with Mamba-2's decays and writes, drops more of both", **LOST, **MAMBA2),
        _changed_hybrid(
            "mamba2-lost-reads",
            "without positions, with Mamba-2's decays and writes, drops more of both",
            **LOST,
            **MAMBA2,
        ),
        _plain("all-lost-reads", "drops more queries and reads", change=Change(**LOST)),
        _plain(
            "half-lost-reads",
            "attention in every second block, drops more queries and reads",
            every=2,
            change=Change(**LOST),
        ),
        # What helps it there: attention's positions, a gate that opens and closes, and more that is dropped.
        _plain(
            "lost-reads",
            "rotary attention in every second block, drops more queries and reads",
            every=2,
            change=Change(**LOST),
            rotary=True,
        ),
        _plain(
            "sigmoid",
            "rotary attention in every second block, drops more queries and reads, a sigmoid as gate",
            every=2,
            change=Change(gate="sigmoid", **LOST),
            rotary=True,
        ),
        _plain(
            "sigmoid-lost-writes",
            "rotary attention in every second block, drops more of queries, reads and writes, a sigmoid as gate",
            every=2,
            change=Change(gate="sigmoid", lost_writes=0.4, **LOST),
            rotary=True,
        ),
        _plain(
            "lost-memories",
            "rotary attention in every second block, drops more queries and reads, and memories",
            every=2,
            change=Change(**LOST, lost_memories=1 / 64),
            rotary=True,
        ),
        _plain(
            "lost-coordinates",
            "rotary attention in every second block, drops more reads, and queries' coordinates of whole rows",
            every=2,
            change=Change(**LOST, of_whole_rows=True),
            rotary=True,
        ),
        _plain(
            "mamba2-lost-reads",
            "rotary attention in every second block, Mamba-2's decays and writes, drops more queries and reads",
            every=2,
            change=Change(**LOST, **MAMBA2),
            rotary=True,
        ),
        _plain("ungated", "no output gate", change=Change(gate="none")),
        _plain("mamba2", "no attention, with Mamba-2's decays and writes", every=0, change=Change(**MAMBA2)),
        # The seed's mixer and its gradient rules.
        _of("bk", "the seed's mixer, exact gradient", mixer="bk", conv_size=0),
        _of("bk-blend", "the seed's mixer, blended gradient", mixer="bk", conv_size=0, bk_grad="blend"),
    )
}


def config_of(contestant: Contestant, shape: dict[str, Any]) -> ResNetBKConfig:
    """The configuration but for the experts' width."""
    fields = {**BASE, "conv_size": 4, **shape, **contestant.fields}
    heads = fields["num_bk_heads"] = fields["num_resolvent_heads"] = fields["num_attention_heads"]
    size = fields["hidden_size"] // heads
    key_size = fields.get("resolvent_key_size")
    fields["resolvent_key_size"] = {"quarter": size // 4, "half": size // 2, "double": 2 * size}.get(key_size, key_size)
    return ResNetBKConfig(**fields)


def build(contestant: Contestant, shape: dict[str, Any], seed: int) -> ResNetBKForCausalLM:
    """A model with as many parameters as the Transformer with its convolution and an MLP 4 times as wide, or up to 1%
    fewer; its weights depend on the seed alone."""
    limit = _parameters(CONTESTANTS["attention"], {**shape, "intermediate_size": 4 * shape["hidden_size"]})
    without = _parameters(contestant, {**shape, "intermediate_size": 1})
    config = config_of(contestant, shape)
    per_width = 2 * config.num_experts * config.hidden_size * config.num_layers
    width = 1 + (limit - without) // per_width
    # Matrix units like multiples of 8.
    width = width // 8 * 8 if width >= 64 and 8 * per_width < 0.01 * limit else width
    torch.manual_seed(seed)
    model = _model(contestant, {**shape, "intermediate_size": width})
    begin(model)
    return model


def _parameters(contestant: Contestant, shape: dict[str, Any]) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in _model(contestant, shape).parameters())


def _model(contestant: Contestant, shape: dict[str, Any]) -> ResNetBKForCausalLM:
    """The library's model, with the study's mixers where it has resolvents, and rotary attention where it has local."""
    config = config_of(contestant, shape)
    model = ResNetBKForCausalLM(config)
    for mixer, block in zip(config.layer_mixers, model.model.layers, strict=True):
        if mixer in ("local", "attention") and contestant.positions is not None:
            block.mixer = PositionedAttention(config, contestant.positions)
        elif mixer == "resolvent" and contestant.change is not None:
            block.mixer = ChangedResolvent(config, contestant.change)
        elif mixer == "resolvent" and contestant.layer is not None:
            block.mixer = contestant.layer(config)
    return model


def begin(model: ResNetBKForCausalLM) -> None:
    """The start of mixers that are not the library's."""
    for block in model.model.layers:
        mixer = block.mixer
        if isinstance(mixer, ChangedResolvent | PositionedAttention):
            mixer.apply(model._init_weights)
        if isinstance(mixer, ChangedResolvent | GatedDeltaNet | PositionedAttention):
            mixer.begin()
