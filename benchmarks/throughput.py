"""Training steps on a CPU over the length of the sequence, for a model of any shape: ours against attention's.

    python benchmarks/throughput.py --preset tiny --out benchmarks/results/cpu/throughput-tiny.json
    python benchmarks/throughput.py --preset tiny --hidden-size 128 --num-layers 4 --heads 4 \\
        --out benchmarks/results/cpu/throughput.json

The same measurement as benchmarks/step.py (whole steps in float32, in turns, the tokens of a step kept, equal total
parameters), at the two lengths that matter to small models: 1024 and 8192.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from resnet_bk.bench.contestants import BASELINE, OURS, contestant_configs, without_position_table
from resnet_bk.environment import describe_environment
from resnet_bk.files import write_json
from resnet_bk.heap import keep_freed_memory
from step import TOKENS, matrix_product_rate, measure_length

LENGTHS = [1024, 8192]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--hidden-size", type=int)
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--heads", type=int, help="of either")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    shape = {
        "hidden_size": arguments.hidden_size,
        "num_layers": arguments.num_layers,
        "num_resolvent_heads": arguments.heads,
        "num_attention_heads": arguments.heads,
    }
    write_json(arguments.out, measure(arguments.preset, {name: x for name, x in shape.items() if x is not None}))


def measure(preset: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Both lengths, as what is written."""
    device = torch.device("cpu")
    keep_freed_memory(device)
    contestants = contestant_configs(preset, overrides)
    configs = {key: without_position_table(contestants[key]) for key in (OURS, BASELINE)}
    rate = matrix_product_rate(device, "fp32")
    document: dict[str, Any] = {
        "environment": describe_environment(),
        "threads": torch.get_num_threads(),
        "preset": preset,
        "overrides": overrides,
        "tokens_per_step": TOKENS["cpu"],
        "points": [],
    }
    for length in LENGTHS:
        point = measure_length(configs, length, device, "fp32", rate)
        document["points"].append(point)
        speeds = ", ".join(f"{key} {row['tokens_per_second']:,.0f} tokens/s" for key, row in point["models"].items())
        low, high = point["speedup_interval"]
        ratio = f"{point['speedup']:.2f} ({low:.2f} to {high:.2f})"
        print(f"N {length:5,}: {ratio} times the Transformer's tokens/s, {speeds}", flush=True)
    return document


if __name__ == "__main__":
    main()
