"""What several commands say in the same words."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resnet_bk.models import ResNetBKConfig


def local_attention_in_words(config: "ResNetBKConfig") -> str:
    """For behind the mixer's name: in how many blocks local attention stands between it; empty where it does not."""
    local = config.mixer_numbers().get("local", 0)
    if config.mixer == "local" or not local:
        return ""
    kind = "rotary local attention" if config.local_attention_positions == "rotary" else "local attention"
    return f", {kind} over {config.local_attention_window:,} tokens in {local} of {config.num_layers} blocks"


def untrained_distances_in_words(config: "ResNetBKConfig", sequence_length: int) -> str:
    """Empty where local attention has been trained on all distances that it meets in longer texts, or fades."""
    if not config.local_rotary_size or config.local_attention_window <= sequence_length:
        return ""
    return (
        f"rotary local attention sees {config.local_attention_window:,} tokens and is trained on {sequence_length:,}: "
        f"it will read longer texts badly, but for --local-attention-window {sequence_length}"
    )
