"""Named sizes. Each is the fields of a ``ResNetBKConfig`` that differ from its defaults."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # The seed's own: untied head, and a learned position table that bounds N by 128.
    "seed": {
        "vocab_size": 30_000,
        "hidden_size": 64,
        "num_layers": 4,
        "num_experts": 4,
        "intermediate_size": 128,
        "mixer": "bk",
        "conv_size": 0,
        "num_resolvent_heads": 4,
        "num_bk_heads": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    # For tests: small enough to train in seconds, without a position table.
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 32,
        "num_layers": 2,
        "num_experts": 2,
        "intermediate_size": 64,
        "num_resolvent_heads": 2,
        "num_bk_heads": 2,
        "num_attention_heads": 2,
    },
    # Named by their total parameters. The experts' width makes it so.
    "100m": {
        "vocab_size": 32_768,
        "hidden_size": 512,
        "num_layers": 10,
        "num_experts": 8,
        "intermediate_size": 848,
        "num_resolvent_heads": 8,
        "num_bk_heads": 8,
        "num_attention_heads": 8,
        "tie_word_embeddings": True,
    },
    "1b": {
        "vocab_size": 32_768,
        "hidden_size": 1280,
        "num_layers": 18,
        "num_experts": 8,
        "intermediate_size": 2176,
        "num_resolvent_heads": 20,
        "num_bk_heads": 20,
        "num_attention_heads": 20,
        "tie_word_embeddings": True,
    },
    "7b": {
        "vocab_size": 32_768,
        "hidden_size": 3072,
        "num_layers": 23,
        "num_experts": 8,
        "intermediate_size": 5120,
        "num_resolvent_heads": 48,
        "num_bk_heads": 48,
        "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
    "70b": {
        "vocab_size": 32_768,
        "hidden_size": 8192,
        "num_layers": 32,
        "num_experts": 8,
        "intermediate_size": 14_080,
        "num_resolvent_heads": 128,
        "num_bk_heads": 128,
        "num_attention_heads": 64,
        "tie_word_embeddings": True,
    },
}
