"""Who is compared, and the models of equal size that they become."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quality_study.mixers import Change, ChangedResolvent, GatedDeltaNet
from resnet_bk.layers import CausalAttention
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM

# Dense unless a contestant says otherwise: what is compared is the mixer.
BASE: dict[str, Any] = {"num_experts": 1, "router_aux_loss_coef": 0.0, "tie_word_embeddings": True}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A name for keys of results and a label for people; ``fields`` of the configuration that differ; ``change`` of the
    resolvent mixer, or ``layer`` for another mixer altogether; ``attention_every`` has attention in every so many-th
    block; ``needs`` is a package without which it is left out."""

    name: str
    label: str
    fields: dict[str, Any] = field(default_factory=dict)
    change: Change | None = None
    layer: Callable[[ResNetBKConfig], nn.Module] | None = None
    attention_every: int = 0
    needs: str | None = None

    @property
    def is_available(self) -> bool:
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


def _changed(name: str, label: str, **change: Any) -> Contestant:
    return Contestant(name=name, label=label, change=Change(**change))


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(name="resolvent", label="Resolvent (ours)"),
        Contestant(name="attention", label="Transformer", fields={"mixer": "attention"}),
        Contestant(
            name="attention-plain", label="Transformer, no convolution", fields={"mixer": "attention", "conv_size": 0}
        ),
        _changed("gated", "real-gated linear attention (Mamba-2's kind)", decay="gated"),
        Contestant(name="deltanet", label="Gated DeltaNet (flash-linear-attention)", layer=GatedDeltaNet, needs="fla"),
        # What each part is worth.
        Contestant(name="scattering", label="scattering regime", fields={"resolvent_regime": "scattering"}),
        Contestant(name="vector", label="vector state", fields={"resolvent_state": "vector"}),
        Contestant(name="no-convolution", label="no convolution", fields={"conv_size": 0}),
        Contestant(name="half-state", label="keys half as wide", fields={"resolvent_key_size": "half"}),
        Contestant(name="double-state", label="keys twice as wide", fields={"resolvent_key_size": "double"}),
        Contestant(name="moe", label="4 experts, one a token", fields={"num_experts": 4, "router_aux_loss_coef": 0.01}),
        _changed("no-rotation", "no rotation", rotation="none"),
        _changed("constant-rotation", "one angle per head", rotation="constant"),
        _changed("token-rotation", "angles chosen by tokens", rotation="tokens"),
        _changed("constant-gap", "gap does not depend on tokens", constant_gap=True),
        _changed("own-gap", "l = f(w): no memory of earlier gaps", decay="own gap"),
        _changed("diagonal", "with the seed's diagonal features", diagonal=True),
        # What may be better.
        _changed("input-gate", "with an input gate", write="gate"),
        _changed("gap-write", "writes as much as it forgets", write="gap"),
        _changed("mamba2", "Mamba-2's decays and writes, no rotation", decay="gated", write="gap", rotation="none"),
        _changed("delta", "with delta-rule writes", delta=True),
        _changed(
            "gated-delta", "Gated DeltaNet's recurrence (our torch form)", decay="gated", delta=True, rotation="none"
        ),
        _changed("linear-keys", "no silu on queries and keys", features="linear"),
        _changed("linear-keys-no-rotation", "neither silu on them nor rotation", features="linear", rotation="none"),
        _changed("linear-delta", "delta-rule writes, no silu on keys", features="linear", delta=True),
        _changed("softmax-keys", "softmax over queries' and keys' coordinates", features="softmax"),
        Contestant(
            name="taylor",
            label="exp(a q.k) to second order, keys half as wide",
            fields={"resolvent_key_size": "half"},
            change=Change(features="taylor"),
        ),
        _changed("long", "memories from 16 tokens on", shortest_memory=16.0),
        _changed("long-gate", "memories from 16 tokens on, input gate", shortest_memory=16.0, write="gate"),
        _changed("lost-writes", "a tenth of the writes lost in training", lost_writes=0.1),
        Contestant(name="few-heads", label="half as many heads, twice as wide", fields={"num_resolvent_heads": "half"}),
        Contestant(
            name="few-heads-delta",
            label="half as many heads, delta-rule writes",
            fields={"num_resolvent_heads": "half"},
            change=Change(delta=True),
        ),
        Contestant(name="hybrid", label="hybrid: attention in every fourth block", attention_every=4),
        Contestant(name="hybrid-half", label="hybrid: attention in every second block", attention_every=2),
        # The seed's mixer and its gradient rules.
        Contestant(name="bk", label="the seed's mixer, exact gradient", fields={"mixer": "bk", "conv_size": 0}),
        Contestant(
            name="bk-blend",
            label="the seed's mixer, blended gradient",
            fields={"mixer": "bk", "conv_size": 0, "bk_grad": "blend"},
        ),
    )
}


def config_of(contestant: Contestant, shape: dict[str, Any]) -> ResNetBKConfig:
    """The configuration but for the experts' width."""
    fields = {**BASE, "conv_size": 4, **shape, **contestant.fields}
    heads = fields["num_bk_heads"] = fields["num_attention_heads"]
    if fields.get("num_resolvent_heads") == "half":
        heads //= 2
    fields["num_resolvent_heads"] = heads
    size = fields["hidden_size"] // heads
    key_size = fields.get("resolvent_key_size")
    fields["resolvent_key_size"] = {"half": size // 2, "double": 2 * size}.get(key_size, key_size)
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
    config = config_of(contestant, shape)
    model = ResNetBKForCausalLM(config)
    every = contestant.attention_every
    for index, block in enumerate(model.model.layers):
        if every and index % every == every // 2:
            block.mixer = CausalAttention(
                hidden_size=config.hidden_size,
                num_heads=config.num_attention_heads,
                causal=True,
                conv_size=config.conv_size,
                dropout=config.dropout,
            )
        elif contestant.change is not None:
            block.mixer = ChangedResolvent(config, contestant.change)
        elif contestant.layer is not None:
            block.mixer = contestant.layer(config)
    return model


def begin(model: ResNetBKForCausalLM) -> None:
    """The start of mixers that are not the library's."""
    for block in model.model.layers:
        mixer = block.mixer
        if isinstance(mixer, ChangedResolvent | CausalAttention):
            mixer.apply(model._init_weights)
        if isinstance(mixer, ChangedResolvent | GatedDeltaNet):
            mixer.begin()
