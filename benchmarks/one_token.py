"""A linear layer of one token on a CPU: how fast its matrix is read, by torch's BLAS and by resnet_bk.ops.one_token.

    OMP_NUM_THREADS=1 python benchmarks/one_token.py --out benchmarks/results/cpu/one_token.json

Of the matrices of preset 100m, as many of each as no cache holds, checked against double precision before they are
timed; in turns, beside a sum over the same matrices, which is the memory's own speed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_bk.environment import describe_environment
from resnet_bk.files import write_json
from resnet_bk.models import ResNetBKConfig
from resnet_bk.ops.one_token import choose_one_token_backend, linear

TURNS, BYTES = 15, 256 << 20
LIMIT = 2e-6  # of the error's norm, relative


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    config = ResNetBKConfig.from_preset("100m")
    hidden = config.hidden_size
    shapes = {
        "head": (config.vocab_size, hidden),
        "queries, keys, values": (3 * hidden, hidden),
        "output": (hidden, hidden),
    }
    with torch.inference_mode():
        rows = {name: measure(*shape) for name, shape in shapes.items()}
    for name, row in rows.items():
        print(name, {key: f"{value / 1e9:.1f} GB/s" for key, value in row["bytes_per_second"].items()})
    backend = choose_one_token_backend(torch.device("cpu"))
    document = {"environment": describe_environment(), "backend": backend.name, "matrices": rows}
    write_json(arguments.out, document)


def measure(width: int, hidden: int) -> dict[str, Any]:
    """One shape, ``(width, hidden)``."""
    matrices = [torch.randn(width, hidden) for _ in range(max(2, BYTES // (4 * width * hidden)))]
    x = torch.randn(1, 1, hidden)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda w: linear(x, w),
        "torch": lambda w: F.linear(x, w),
        "sum": lambda w: w.sum(),
    }
    exact = x.double() @ matrices[0].double().T
    error = float((ways["ours"](matrices[0]) - exact).norm() / exact.norm())
    assert error < LIMIT, f"wrong by {error:.1e}"
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(TURNS):
        for name in ways if number % 2 == 0 else reversed(ways):
            began = time.perf_counter()
            for matrix in matrices:
                ways[name](matrix)
            samples[name].append((time.perf_counter() - began) / len(matrices))
    size = 4 * width * hidden
    return {
        "shape": [width, hidden],
        "error": error,
        "samples": samples,
        "bytes_per_second": {name: size / statistics.median(seconds) for name, seconds in samples.items()},
    }


if __name__ == "__main__":
    main()
