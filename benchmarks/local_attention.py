"""Local attention on a CPU: how long queries' blocks are best, forward and backward.

    python benchmarks/local_attention.py --out benchmarks/results/cpu/local_attention.json

A shorter block computes fewer pairs behind the window and reads more keys. Blocks of the window itself and of parts of
it take turns, after each has been checked against all pairs in double precision.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoding import times_as_long
from resnet_bk.environment import describe_environment
from resnet_bk.files import write_json
from resnet_bk.heap import keep_freed_memory
from resnet_bk.models import ResNetBKConfig
from resnet_bk.ops import local_attention as op

TURNS, PARTS = 15, (1, 2, 4, 8)
LENGTHS, HEADS, HEAD_SIZES = (2048, 8192), 4, (32, 64)
CHECKED_LENGTH, LIMIT = 3000, 1e-5  # of the error's norm, relative


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    keep_freed_memory(torch.device("cpu"))
    window = ResNetBKConfig().local_attention_window
    points = [measure(window, length, size) for size in HEAD_SIZES for length in LENGTHS]
    document = {"environment": describe_environment(), "threads": torch.get_num_threads(), "window": window}
    write_json(arguments.out, document | {"heads": HEADS, "used": op.PARTS_ON_A_CPU, "points": points})


def measure(window: int, length: int, size: int) -> dict[str, Any]:
    """One row of ``length`` tokens."""
    errors = {parts: error(parts, window, size) for parts in PARTS}
    assert max(errors.values()) < LIMIT, f"wrong by {errors}"
    inputs = [torch.randn(1, length, HEADS, size, requires_grad=True) for _ in range(3)]
    samples: dict[int, list[float]] = {parts: [] for parts in PARTS}
    for number in range(1 + TURNS):
        for parts in PARTS if number % 2 == 0 else reversed(PARTS):
            began = time.perf_counter()
            mixed = attend(parts, window, inputs)
            torch.autograd.grad(mixed, inputs, torch.ones_like(mixed))
            if number:
                samples[parts].append(time.perf_counter() - began)
    ratios = {parts: times_as_long(samples[1], samples[parts]) for parts in PARTS}
    found = ", ".join(f"1/{parts} {ratio:.2f}" for parts, ratio in ratios.items())
    print(f"N {length:,}, heads of {size}: as fast as blocks of the window in blocks of {found} of it", flush=True)
    rows = [{"parts": x, "error": errors[x], "samples": samples[x], "speedup": ratios[x]} for x in PARTS]
    return {"sequence_length": length, "head_size": size, "blocks": rows}


def attend(parts: int, window: int, inputs: list[Tensor]) -> Tensor:
    """In blocks of that part of the window."""
    op.PARTS_ON_A_CPU = parts
    q, k, v = inputs
    return op.local_attention(q, k, v, window=window, rates=torch.full((HEADS,), 0.01))


def error(parts: int, window: int, size: int) -> float:
    """Of what is mixed, against all pairs in double precision."""
    inputs = [torch.randn(1, CHECKED_LENGTH, HEADS, size) for _ in range(3)]
    q, k, v = (x.double().transpose(1, 2) for x in inputs)
    places = torch.arange(CHECKED_LENGTH)
    distance = places[:, None] - places
    logits = q @ k.transpose(-1, -2) / math.sqrt(size) - 0.01 * distance
    exact = logits.masked_fill((distance < 0) | (distance >= window), -math.inf).softmax(-1) @ v
    return float((attend(parts, window, inputs).transpose(1, 2) - exact).norm() / exact.norm())


if __name__ == "__main__":
    main()
