"""Decoding over the length of the context: ResNet-BK against the same model with attention and its KV cache.

    python benchmarks/decoding.py --device cpu --out benchmarks/results/cpu/decoding.json
    python benchmarks/decoding.py --device cuda --out benchmarks/results/gpu/decoding.json

One row, float32, weights at their start: what a token costs does not depend on them. A step is one token through the
model and its cache, and the likeliest next one. Contexts are made, not read: attention's cache holds random keys and
values of the context's length, local attention's those of its window, and a resolvent's is the state behind a short
text, which has the same size behind a long one. All models and contexts take their steps in turns, forth and back,
after steps that do not count; ratios are medians of the rounds'. Then ours behind the shortest and the longest context
takes turns alone, with caches built anew now and again, since the place in memory counts too; of that ratio there is a
bootstrapped 95% interval. Total parameters are equal within 1%. Attention's keys and values are appended as
transformers' dynamic cache does it, by a copy. Before anything is timed, each model's decoding is held against the full
pass.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_bk.bench.contestants import (
    BASELINE,
    OURS,
    build_model,
    contestant_configs,
    without_position_table,
)
from resnet_bk.bench.statistics import Pairs, paired_ratio
from resnet_bk.bench.subject import synchronizer
from resnet_bk.environment import describe_environment
from resnet_bk.files import write_json
from resnet_bk.heap import keep_freed_memory
from resnet_bk.memory.limits import available_bytes
from resnet_bk.memory.parameters import count_parameters
from resnet_bk.models import ResNetBKCache, ResNetBKForCausalLM
from resnet_bk.schema import Interval

CONTEXTS = [1024, 4096, 16_384, 65_536]
WARMUP, ROUNDS = 2, 45
BLOCKS, ROUNDS_OF_BLOCK, RESAMPLES = 12, 50, 1000
TEXT = 80  # tokens behind which ours decodes; the check's length too
LIMIT = 1e-4  # relative, of logits decoded and computed at once


@dataclass(kw_only=True)
class Decoder:
    """A model in the middle of a text."""

    model: ResNetBKForCausalLM
    cache: ResNetBKCache
    token_B1: Tensor

    def step(self) -> None:
        """One more token."""
        output = self.model(self.token_B1, past_key_values=self.cache)
        self.token_B1 = output.logits[:, -1:].argmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--preset", default="100m")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        document = measure(torch.device(arguments.device), arguments.preset)
    write_json(arguments.out, document)


def measure(device: torch.device, preset: str) -> dict[str, Any]:
    """Every context, as what is written."""
    keep_freed_memory(device)
    contestants = contestant_configs(preset, {})
    configs = {key: without_position_table(contestants[key]) for key in (OURS, BASELINE)}
    models = {key: build_model(config, seed=0).eval().to(device) for key, config in configs.items()}
    errors = {key: decoding_error(model) for key, model in models.items()}
    decoders = {
        (key, context): decoder
        for context in CONTEXTS
        for key in models
        if (decoder := decoder_behind(models[key], context)) is not None
    }
    samples = times(decoders, synchronizer(device))
    points = []
    for context in CONTEXTS:
        seconds = {key: statistics.median(samples[key, context]) for key in models if (key, context) in samples}
        points.append(
            {
                "context": context,
                "models": {
                    key: {
                        "samples": samples[key, context],
                        "seconds": value,
                        "tokens_per_second": 1 / value,
                        "cache_bytes": decoders[key, context].cache.num_bytes,
                    }
                    for key, value in seconds.items()
                },
                "speedup": times_as_long(samples[BASELINE, context], samples[OURS, context])
                if len(seconds) > 1
                else None,
            }
        )
        print_point(points[-1])
    decoders.clear()
    flatness = longest_over_shortest(models[OURS], synchronizer(device))
    costs = f"{flatness.value:.3f} ({flatness.low:.3f} to {flatness.high:.3f})"
    print(f"a token of ours behind {CONTEXTS[-1]:,} costs {costs} times one behind {CONTEXTS[0]:,}")
    return {
        "environment": describe_environment(),
        "preset": preset,
        "precision": "fp32",
        "parameters": {key: count_parameters(config).total for key, config in configs.items()},
        "decoding_error": errors,
        "threads": torch.get_num_threads(),
        "rounds": ROUNDS,
        "points": points,
        "longest_over_shortest": flatness.value,
        "longest_over_shortest_interval": [flatness.low, flatness.high],
    }


def times_as_long(one: list[float], other: list[float]) -> float:
    """The median over rounds, each of which is a moment of the machine."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def times(
    decoders: dict[tuple[str, int], Decoder], synchronize: Any, *, rounds: int = ROUNDS
) -> dict[tuple[str, int], list[float]]:
    """Seconds of every decoder's steps."""
    samples: dict[tuple[str, int], list[float]] = {name: [] for name in decoders}
    for number in range(WARMUP + rounds):
        for name in decoders if number % 2 == 0 else reversed(decoders):
            decoders[name].step()  # not timed: nobody meets the processor's caches as another model left them
            synchronize()
            began = time.perf_counter()
            decoders[name].step()
            synchronize()
            if number >= WARMUP:
                samples[name].append(time.perf_counter() - began)
    return samples


def longest_over_shortest(model: ResNetBKForCausalLM, synchronize: Any) -> Interval:
    """How many times a token behind the shortest context one behind the longest costs."""
    ends = [(OURS, CONTEXTS[0]), (OURS, CONTEXTS[-1])]
    samples: dict[tuple[str, int], list[float]] = {end: [] for end in ends}
    for _ in range(BLOCKS):
        decoders = {end: decoder for end in ends if (decoder := decoder_behind(model, end[1])) is not None}
        for end, seconds in times(decoders, synchronize, rounds=ROUNDS_OF_BLOCK).items():
            samples[end] += seconds
    blocks = [number for number in range(BLOCKS) for _ in range(ROUNDS_OF_BLOCK)]
    shortest, longest = (samples[end] for end in ends)
    return paired_ratio(Pairs(ours=shortest, baseline=longest, blocks=blocks), resamples=RESAMPLES)


def decoder_behind(model: ResNetBKForCausalLM, context: int) -> Decoder | None:
    """The model behind ``context`` tokens; None where their cache does not fit into memory."""
    config, device = model.config, model.device
    # Twice: a step writes each layer's keys and values anew.
    needed = 2 * 8 * config.num_layers * config.hidden_size * context
    if config.mixer == "attention" and needed > free_bytes(device):
        return None
    cache = model(random_tokens(model, TEXT), use_cache=True).past_key_values
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    for mixer, layer in zip(config.layer_mixers, cache.layers, strict=True):
        shape = {
            "attention": (1, heads, context, size),
            "local": (1, min(context, config.local_attention_window - 1), heads, size),
        }.get(mixer)
        if shape is not None:
            layer.advance(
                {**layer.state, **{name: torch.randn(shape, device=device) for name in ("keys", "values")}}, 0
            )
        if mixer != "attention":
            layer.num_tokens = context
    return Decoder(model=model, cache=cache, token_B1=random_tokens(model, 1))


def free_bytes(device: torch.device) -> int:
    """What may still be allocated there."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


def decoding_error(model: ResNetBKForCausalLM) -> float:
    """Largest relative difference of logits, token by token against at once.

    Raises:
        RuntimeError: it is above ``LIMIT``.
    """
    row = random_tokens(model, TEXT)
    at_once = model(row, use_cache=False).logits
    cache = ResNetBKCache(model.config)
    decoded = torch.cat([model(token, past_key_values=cache).logits for token in row.split(1, dim=1)], dim=1)
    error = ((decoded - at_once).norm() / at_once.norm()).item()
    if error > LIMIT:
        raise RuntimeError(f"decoding is off by {error:.1e}, more than {LIMIT:.0e}; nothing is timed")
    return error


def random_tokens(model: ResNetBKForCausalLM, length: int) -> Tensor:
    """One row."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)


def print_point(point: dict[str, Any]) -> None:
    """A line for a person."""
    speedup = "" if point["speedup"] is None else f"{point['speedup']:.2f} times the Transformer's tokens/s, "
    rows = (
        f"{key} {row['tokens_per_second']:.1f} tokens/s, {row['cache_bytes'] / 1e6:.1f} MB of cache"
        for key, row in point["models"].items()
    )
    print(f"context {point['context']:6,}: {speedup}" + ", ".join(rows), flush=True)


if __name__ == "__main__":
    main()
