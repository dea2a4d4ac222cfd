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
