"""Floating-point operations of a training step by formula, by component; 2 x multiply-adds.

Causal attention is counted as what it has to do, N (N + 1) / 2 pairs. Backward of fused attention recomputes the
scores: 5 matrix products to forward's 2. Local attention is counted as its blocks compute it, pairs behind the window
and coordinates for places included.
"""

from collections.abc import Iterable

from resnet_bk.models.configuration import ResNetBKConfig
from resnet_bk.ops.bk import operators
from resnet_bk.ops.carry import operators as carry_operators
from resnet_bk.ops.local_attention import EXTRA_COORDINATES
from resnet_bk.schema import ComponentFlops


def formula_flops(config: ResNetBKConfig, batch_size: int, sequence_length: int) -> list[ComponentFlops]:
    """One batch, by component. Matrix products cost twice their forward in backward."""
    tokens, layers, hidden = batch_size * sequence_length, config.num_layers, config.hidden_size
    parts = [
        _products("router", 2 * tokens * hidden * config.num_experts * layers),
        _products("experts", 4 * tokens * hidden * config.intermediate_size * layers),
    ]
    of_mixer = {
        "bk": _bk_flops,
        "attention": _attention_flops,
        "local": _attention_flops,
        "resolvent": _resolvent_flops,
    }
    parts += _joined(
        part
        for alike, number in config.alike()
        for part in of_mixer[alike.mixer](alike, number * batch_size, sequence_length)
    )
    # Its gradients are computed with the loss, so that no logits have to be kept for backward: all of it is forward.
    return [*parts, ComponentFlops(component="head", forward=6 * tokens * hidden * config.vocab_size, backward=0)]


def _joined(parts: Iterable[ComponentFlops]) -> list[ComponentFlops]:
    """Those of one name as one."""
    found: dict[str, ComponentFlops] = {}
    for part in parts:
        before = found.get(part.component, ComponentFlops(component=part.component, forward=0, backward=0))
        found[part.component] = ComponentFlops(
            component=part.component, forward=before.forward + part.forward, backward=before.backward + part.backward
        )
    return list(found.values())


def _bk_flops(config: ResNetBKConfig, rows: int, sequence_length: int) -> list[ComponentFlops]:
    """``rows`` are those of a batch in each block."""
    blocks = rows * sequence_length
    sites = blocks * config.num_bk_heads
    forward, backward = _core_flops(config)
    return [
        *_convolution(config, blocks * config.hidden_size),
        _products("potential and output projection", 6 * sites * config.hidden_size),
        ComponentFlops(component="BK-Core", forward=forward * sites, backward=backward * sites),
    ]


def _attention_flops(config: ResNetBKConfig, rows: int, sequence_length: int) -> list[ComponentFlops]:
    hidden, blocks = config.hidden_size, rows * sequence_length
    width = hidden
    if config.mixer == "local":
        pairs = rows * windowed_pairs(sequence_length, sequence_length, config.local_attention_window)
        width += extra_coordinates(config) * config.num_attention_heads
    else:
        pairs = rows * attended_pairs(sequence_length, sequence_length, config.causal)
    return [
        _products("query, key, value and output projection", 8 * blocks * hidden * hidden),
        *_convolution(config, blocks * 3 * hidden),
        ComponentFlops(component="attention", forward=4 * pairs * width, backward=10 * pairs * width),
    ]


def _resolvent_flops(config: ResNetBKConfig, rows: int, sequence_length: int) -> list[ComponentFlops]:
    hidden, heads, blocks = config.hidden_size, config.num_resolvent_heads, rows * sequence_length
    channels, sites = 2 * heads * config.key_size + hidden, blocks * heads
    chain = (operators.TUNNEL_FORWARD_FLOPS, operators.TUNNEL_BACKWARD_FLOPS)
    if config.resolvent_regime == "scattering":
        chain = (operators.CAUSAL_FORWARD_FLOPS, operators.CAUSAL_BACKWARD_FLOPS)
    # A vector as state is a key of one number.
    widths = (config.key_size or 1, hidden // heads)
    return [
        _products("query, key and value projection", 2 * blocks * hidden * channels),
        *_convolution(config, blocks * channels, again=config.key_size > 0),
        _products("potential projection", 2 * sites * hidden),
        ComponentFlops(component="chains", forward=chain[0] * sites, backward=chain[1] * sites),
        ComponentFlops(
            component="carry",
            forward=carry_operators.forward_flops(*widths) * sites,
            backward=carry_operators.backward_flops(*widths) * sites,
        ),
        _products("gate and output projection", 4 * blocks * hidden * hidden),
    ]


def _convolution(config: ResNetBKConfig, channels_of_tokens: int, *, again: bool = False) -> list[ComponentFlops]:
    """``again``: its output is not kept, and backward computes it once more."""
    if not config.conv_size:
        return []
    forward = 2 * config.conv_size * channels_of_tokens
    return [ComponentFlops(component="short convolution", forward=forward, backward=(3 if again else 2) * forward)]


def extra_coordinates(config: ResNetBKConfig) -> int:
    """Of each head of local attention, beside those of its keys: the places, where it fades."""
    return EXTRA_COORDINATES if config.mixer == "local" and config.local_attention_positions == "fading" else 0


def attended_pairs(queries: int, keys: int, causal: bool) -> int:
    """Query-key pairs of one row and head."""
    return queries * (queries + 1) // 2 if causal and queries == keys else queries * keys


def windowed_pairs(queries: int, keys: int, window: int) -> int:
    """Those of the last ``queries`` of ``keys`` tokens, each of which reads itself and the ``window - 1`` before it."""
    before = keys - queries
    growing = max(0, min(queries, window - before))
    return growing * before + growing * (growing + 1) // 2 + (queries - growing) * window


def _products(component: str, forward: int) -> ComponentFlops:
    return ComponentFlops(component=component, forward=forward, backward=2 * forward)


def _core_flops(config: ResNetBKConfig) -> tuple[int, int]:
    if config.causal:
        return operators.CAUSAL_FORWARD_FLOPS, operators.CAUSAL_BACKWARD_FLOPS
    return operators.BIDIRECTIONAL_FORWARD_FLOPS, operators.BIDIRECTIONAL_BACKWARD_FLOPS
