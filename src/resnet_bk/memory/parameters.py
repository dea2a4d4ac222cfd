"""Parameters by component, counted on the real model without allocating it."""

from dataclasses import dataclass

import torch

from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.models.configuration import Mixer

# The component of a parameter, by the first of these that its name contains.
COMPONENTS = {
    "embed_tokens": "token embedding",
    "embed_positions": "position embedding",
    "lost_token": "lost tokens' embedding",
    "lm_head": "head",
    ".moe.router": "router",
    ".moe.up": "experts",
    ".moe.down": "experts",
    ".mixer.potential": "potential projection",
    ".mixer.log_rate": "chain parameters",
    ".mixer.energy": "chain parameters",
    ".mixer.raw_eta": "chain parameters",
    ".mixer.log_amplitude": "chain parameters",
    ".mixer.skip": "chain parameters",
    ".mixer.qkv": "query, key and value projections",
    ".mixer.convolution": "short convolution",
    ".mixer.gate": "gate projection",
    ".mixer.output": "output projection",
    "norm": "norms",
}
BLOCK = ".layers."  # in the name of a parameter of a block
BYTES_PER_PARAMETER = {"fp32": 4, "fp16": 2, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class PartCounts:
    """Numbers of parameters of a part of the model, and of those that are float32 whatever the others are."""

    total: int
    float32: int


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers of parameters. ``active`` ones take part in one token's computation: one expert of each block.

    ``blocks`` has one block of each mixer, ``outside`` is what is in none, ``largest`` the largest single tensor.
    """

    by_component: dict[str, int]
    total: int
    active: int
    blocks: dict[Mixer, PartCounts]
    outside: PartCounts
    largest: int

    @property
    def block(self) -> PartCounts:
        """The largest block."""
        return max(self.blocks.values(), key=lambda counts: counts.total)


@dataclass(frozen=True, kw_only=True)
class SeedRow:
    """One row of the seed's corrected table beside the model's own number, and why they differ."""

    component: str
    seed: int
    ours: int
    reason: str


def count_parameters(config: ResNetBKConfig) -> ParameterCounts:
    """Counts the model of ``config`` on the meta device; tied weights count once, as embedding.

    Layers of a mixer are alike: one is built, and stands for all of them.
    """
    by_component: dict[str, int] = {}
    of_mixers: dict[Mixer, list[tuple[str, int]]] = {}
    for alike, number in config.alike():
        outside, of_mixers[alike.mixer] = _sizes(alike)
        for name, size in of_mixers[alike.mixer]:
            component = component_of(name)
            by_component[component] = by_component.get(component, 0) + number * size
    for name, size in outside:
        component = component_of(name)
        by_component[component] = by_component.get(component, 0) + size
    total = sum(by_component.values())
    idle = by_component["experts"] // config.num_experts * (config.num_experts - 1)
    return ParameterCounts(
        by_component=by_component,
        total=total,
        active=total - idle,
        blocks={mixer: _part(sizes) for mixer, sizes in of_mixers.items()},
        outside=_part(outside),
        largest=max(size for sizes in (outside, *of_mixers.values()) for _, size in sizes),
    )


def _sizes(config: ResNetBKConfig) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Names and numbers of the parameters outside of blocks, and of those of one block."""
    with torch.device("meta"):
        model = ResNetBKForCausalLM(ResNetBKConfig(**{**config.own_fields(), "num_layers": 1}))
    sizes = [(name, parameter.numel()) for name, parameter in model.named_parameters()]
    return [pair for pair in sizes if BLOCK not in pair[0]], [pair for pair in sizes if BLOCK in pair[0]]


def stays_float32(name: str, _parameter: object = None) -> bool:
    """Whether the parameter of this name is never stored in a half type."""
    return any(part in name for part in ResNetBKForCausalLM.float32_parameters)


def _part(sizes: list[tuple[str, int]]) -> PartCounts:
    return PartCounts(
        total=sum(number for _, number in sizes),
        float32=sum(number for name, number in sizes if stays_float32(name)),
    )


def component_of(name: str) -> str:
    """The component that a parameter's name tells."""
    return next(component for part, component in COMPONENTS.items() if part in name)


def compare_with_seed(counts: ParameterCounts) -> list[SeedRow]:
    """The seed's table with its arithmetic put right (4,112,512), beside what the model has."""
    ours = counts.by_component
    layers, hidden, experts, width, vocabulary, length = 4, 64, 4, 128, 30_000, 128
    seeds = {
        "token embedding": vocabulary * hidden,
        "position embedding": length * hidden,
        "router": layers * hidden * experts,
        "experts": layers * experts * 2 * hidden * width,
        "output projection": layers * 2 * hidden,
        "norms": layers * 2 * hidden + 2 * hidden,
        "head": vocabulary * hidden,
        "potential projection": 0,
        "chain parameters": 0,
    }
    reasons = {
        "experts": "the seed's text adds up 3 of 4 experts; all 4 are counted here",
        "potential projection": "v = w . m needs w, which the seed's table leaves out",
        "chain parameters": "E and eta are learned, per layer and head",
    }
    return [
        SeedRow(component=name, seed=number, ours=ours.get(name, 0), reason=reasons.get(name, ""))
        for name, number in seeds.items()
    ]
