"""Training steps on a CPU with freed memory kept by the process, and returned to the system: time and peak.

    python benchmarks/freed_memory.py --out benchmarks/results/cpu/freed_memory.json [--preset tiny --length 8192]

glibc's malloc returns large blocks at once; resnet_bk.heap has it keep them, for every model alike. Each run is a
process of its own and runs take turns; of each, the median of its last steps, the share of processor time that the
system had, and the most that was resident. The loss behind all steps must be the same bit for bit.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from resnet_bk.bench.contestants import BASELINE, OURS, contestant_configs, without_position_table
from resnet_bk.bench.subject import Subject, random_batch
from resnet_bk.environment import describe_environment, peak_resident_bytes
from resnet_bk.files import write_json
from resnet_bk.heap import freed_memory, keep_freed_memory
from resnet_bk.training.config import TrainingConfig

CPU = torch.device("cpu")
TOKENS, TURNS, WARMUP, STEPS = 8192, 4, 3, 12
WAYS = ("kept", "returned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--one", nargs=2, metavar=("CONTESTANT", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(arguments.preset, arguments.length, *arguments.one)))
        return
    if arguments.out is None:
        parser.error("say where to write with --out")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, measure(arguments.preset, arguments.length))


def measure(preset: str, length: int) -> dict[str, Any]:
    """Both models both ways, as what is written."""
    command = [sys.executable, __file__, "--preset", preset, "--length", str(length), "--one"]
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {(key, way): [] for key in (OURS, BASELINE) for way in WAYS}
    for number in range(TURNS):
        for name in runs if number % 2 == 0 else reversed(runs):
            runs[name].append(json.loads(subprocess.run([*command, *name], check=True, capture_output=True).stdout))
    rows = {}
    for key in (OURS, BASELINE):
        losses = {found["loss"] for way in WAYS for found in runs[key, way]}
        assert len(losses) == 1, "what is computed depends on the way"
        row = {way: summary(runs[key, way]) for way in WAYS}
        row["speedup"] = row["returned"]["seconds"] / row["kept"]["seconds"]
        rows[key] = row
        peaks = ", ".join(f"{row[way]['peak_resident_bytes'] / 1e6:,.0f} MB where it is {way}" for way in WAYS)
        print(f"{key}: {row['speedup']:.2f} times as fast where freed memory is kept; at the peak {peaks}")
    environment = describe_environment()
    return {"environment": environment, "preset": preset, "sequence_length": length, "models": rows, "turns": TURNS}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the runs."""
    names = ("seconds", "system_share", "peak_resident_bytes")
    return {**{name: statistics.median(run[name] for run in runs) for name in names}, "runs": runs}


def run(preset: str, length: int, key: str, way: str) -> dict[str, Any]:
    """One process's steps."""
    if way == "kept":
        keep_freed_memory(CPU)
    assert freed_memory() == way
    config = without_position_table(contestant_configs(preset, {})[key])
    rows = max(1, TOKENS // length)
    training = TrainingConfig(batch_size=rows, sequence_length=length)
    subject = Subject.build(config, training, random_batch(config, rows, length, CPU))
    samples = []
    for number in range(WARMUP + STEPS):
        if number == WARMUP:
            spent = os.times()
        began = time.perf_counter()
        subject.step()
        samples.append(time.perf_counter() - began)
    user, system = (after - before for after, before in zip(os.times()[:2], spent[:2], strict=True))
    return {
        "seconds": statistics.median(samples[WARMUP:]),
        "samples": samples,
        "loss": float(subject.forward()),
        "system_share": system / (user + system),
        "peak_resident_bytes": peak_resident_bytes(),
    }


if __name__ == "__main__":
    main()
