"""Whole training steps over the length of the sequence: ResNet-BK, the same model with attention, the seed's mixer.

    python benchmarks/step.py --device cuda --preset 100m --precision bf16 --out benchmarks/results/gpu/step.json
    python benchmarks/step.py --device cpu --preset seed --out benchmarks/results/cpu/step.json

Each length keeps the tokens of a step (fewer rows as they get longer). Peak memory is each model's alone; times are
taken in turns, A B C C B A, forward to update, after steps that do not count; on a CPU, which others use too, for at
least a minute. On a GPU a turn is four steps with one wait behind them, and the mean of them counts: as in training,
which waits where it logs, the next step is launched while the one before is computed. Ratios are medians of the
rounds', with bootstrapped 95% intervals. Total parameters are equal within 1%, and all models run eagerly, attention
through scaled_dot_product_attention (flash attention on a GPU in half precision). Model FLOP utilisation counts the
formulas of resnet_bk.bench.flops, causal attention as the half it needs, over the rate of a large matrix product in the
same precision and run.
"""

import argparse
import gc
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from resnet_bk.bench.contestants import BASELINE, OURS, contestant_configs, without_position_table
from resnet_bk.bench.memory import peak_bytes
from resnet_bk.bench.statistics import Pairs, paired_ratio
from resnet_bk.bench.subject import Subject, random_batch, synchronizer
from resnet_bk.environment import describe_environment
from resnet_bk.files import write_json
from resnet_bk.heap import keep_freed_memory
from resnet_bk.models import ResNetBKConfig
from resnet_bk.models.flops import formula_flops
from resnet_bk.training.config import Precision, TrainingConfig
from resnet_bk.training.micro_step import AUTOCAST_DTYPES

ROUNDS, RESAMPLES = 7, 1000
WARMUP = {"cuda": 1, "cpu": 3}  # rounds
STEPS = {"cuda": 4, "cpu": 1}  # between two waits
LEAST_SECONDS = {"cuda": 0.0, "cpu": 60.0}
LENGTHS = {"cuda": [128, 512, 1024, 4096, 16_384, 65_536, 131_072], "cpu": [128, 512, 2048, 8192]}
TOKENS = {"cuda": 131_072, "cpu": 8192}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--preset", default="100m")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, measure(torch.device(arguments.device), arguments.preset, arguments.precision))


def measure(device: torch.device, preset: str, precision: Precision) -> dict[str, Any]:
    """Every length, as what is written."""
    keep_freed_memory(device)
    configs = {key: without_position_table(config) for key, config in contestant_configs(preset, {}).items()}
    document: dict[str, Any] = {
        "environment": describe_environment(),
        "preset": preset,
        "precision": precision,
        "tokens_per_step": TOKENS[device.type],
        "steps_per_sample": STEPS[device.type],
        "matrix_product_flops_per_second": matrix_product_rate(device, precision),
        "points": [],
    }
    for length in LENGTHS[device.type]:
        point = measure_length(configs, length, device, precision, document["matrix_product_flops_per_second"])
        document["points"].append(point)
        print(
            f"N {length:7,}: {point['speedup']:.2f} times the Transformer's tokens/s, "
            + ", ".join(
                f"{key} {row['tokens_per_second']:,.0f} tokens/s, {row['utilisation']:.1%} MFU, "
                f"{row['peak_bytes'] / 1e9:.2f} GB"
                for key, row in point["models"].items()
            ),
            flush=True,
        )
    return document


def measure_length(
    configs: dict[str, ResNetBKConfig], length: int, device: torch.device, precision: Precision, rate: float
) -> dict[str, Any]:
    """All models at one length."""
    batch_size = max(1, TOKENS[device.type] // length)
    training = TrainingConfig(batch_size=batch_size, sequence_length=length, precision=precision)

    def build(key: str) -> Subject:
        return Subject.build(configs[key], training, random_batch(configs[key], batch_size, length, device))

    peaks = {}
    for key in configs:
        peaks[key] = peak_bytes(build(key))
        gc.collect()
    subjects = {key: build(key) for key in configs}
    synchronize = synchronizer(device)
    samples: dict[str, list[float]] = {key: [] for key in configs}
    number, until, warmup, steps = 0, math.inf, WARMUP[device.type], STEPS[device.type]
    while number < warmup + ROUNDS or time.perf_counter() < until:
        if number == warmup:
            until = time.perf_counter() + LEAST_SECONDS[device.type]
        for key in subjects if number % 2 == 0 else reversed(subjects):
            synchronize()
            began = time.perf_counter()
            for _ in range(steps):
                subjects[key].step()
            synchronize()
            if number >= warmup:
                samples[key].append((time.perf_counter() - began) / steps)
        number += 1
    models = {}
    for key, config in configs.items():
        seconds = statistics.median(samples[key])
        flops = sum(part.forward + part.backward for part in formula_flops(config, batch_size, length))
        models[key] = {
            "samples": samples[key],
            "seconds": seconds,
            "tokens_per_second": batch_size * length / seconds,
            "utilisation": flops / seconds / rate,
            "peak_bytes": peaks[key],
        }
    pairs = Pairs(ours=samples[OURS], baseline=samples[BASELINE], blocks=[0] * len(samples[OURS]))
    ratio = paired_ratio(pairs, resamples=RESAMPLES)
    return {
        "sequence_length": length,
        "batch_size": batch_size,
        "models": models,
        "speedup": ratio.value,
        "speedup_interval": [ratio.low, ratio.high],
        "memory_ratio": peaks[BASELINE] / peaks[OURS],
    }


def matrix_product_rate(device: torch.device, precision: Precision) -> float:
    """FLOPs a second of a large square matrix product in the precision's type, on random numbers."""
    size = 8192 if device.type == "cuda" else 2048
    dtype = AUTOCAST_DTYPES.get(precision, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    synchronize = synchronizer(device)
    samples = []
    for _ in range(10):
        synchronize()
        began = time.perf_counter()
        left @ right
        synchronize()
        samples.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(samples[3:])


if __name__ == "__main__":
    main()
