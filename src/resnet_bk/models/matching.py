"""Equal total parameters for models that differ in the mixer."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resnet_bk.models.configuration import Mixer, ResNetBKConfig


def total_parameters(config: "ResNetBKConfig") -> int:
    """Number of parameters of the model that ``config`` describes, without building it."""
    hidden, experts = config.hidden_size, config.num_experts
    moe = hidden * experts + 2 * experts * hidden * config.intermediate_size
    norm = 2 * hidden
    blocks = sum(
        number * (moe + mixer_parameters(config, mixer) + (norm if mixer == "bk" else 2 * norm))
        for mixer, number in config.mixer_numbers().items()
    )
    positions = (config.max_position_embeddings or 0) * hidden
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    lost_token = hidden if config.token_dropout else 0
    return embeddings + positions + lost_token + blocks + norm


def mixer_parameters(config: "ResNetBKConfig", mixer: "Mixer") -> int:
    """Number of parameters of one block's mixer."""
    hidden, size = config.hidden_size, config.conv_size
    if mixer == "bk":
        return size * hidden + 3 * hidden * config.num_bk_heads + 2 * config.num_bk_heads
    if mixer in ("attention", "local"):
        fades = mixer == "local" and config.local_attention_positions == "fading"
        rates = config.num_attention_heads if fades else 0
        return 4 * hidden * hidden + 3 * size * hidden + rates
    heads = config.num_resolvent_heads
    channels = 2 * heads * config.key_size + hidden  # of queries, keys and values
    # With the skips.
    chains = hidden * heads + heads * (2 if config.resolvent_regime == "tunnelling" else 4)
    return (hidden + size) * channels + 2 * hidden * hidden + chains + hidden // heads


def match_total_parameters(config: "ResNetBKConfig", target: int) -> int:
    """The expert width (intermediate_size) that brings ``config`` closest to ``target`` parameters.

    A multiple of 8 where that is within 1%, since matrix units like those, else any width.

    Raises:
        ValueError: even experts of width 1 exceed the target by more than 1%.
    """
    per_width = 2 * config.num_experts * config.hidden_size * config.num_layers
    rest = total_parameters(config) - per_width * config.intermediate_size
    exact = (target - rest) / per_width
    for granularity in (8, 1):
        width = max(granularity, granularity * round(exact / granularity))
        if abs(rest + per_width * width - target) <= 0.01 * target:
            return width
    raise ValueError(
        f"a model of {target:,} parameters with mixer {config.mixer} does not exist at hidden_size "
        f"{config.hidden_size} and num_layers {config.num_layers}; give intermediate_size yourself"
    )
