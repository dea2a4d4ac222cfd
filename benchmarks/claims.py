"""What the benchmark claims where the truth is known: of a model against itself, and against one that is 5% slower.

    python benchmarks/claims.py --profile quick --out benchmarks/results/cpu/claims.json

Repeats section 2 with the profile's rounds and builds on the demo's attention model. The slower one ends its forward
pass with idle turns for 5% of what it took. A claim about a model and itself is an error wherever it is made; of the
slower model the forward pass has to be found.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_bk.bench.contestants import BASELINE, OURS, build_model, contestant_configs
from resnet_bk.bench.process import Waiting
from resnet_bk.bench.profiles import PROFILES, Profile
from resnet_bk.bench.subject import Loss, Subject, language_model_loss, random_batch
from resnet_bk.bench.timing import measure_timing
from resnet_bk.environment import describe_environment
from resnet_bk.files import write_json
from resnet_bk.training.config import TrainingConfig

SLOWER = 0.05
OVERRIDES = {"vocab_size": 2048, "conv_size": 4, "max_position_embeddings": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=list(PROFILES), default="quick")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    # Decoding takes most of the time and has no part in this.
    profile = replace(PROFILES[arguments.profile], decode_tokens=1)
    watch = Waiting()
    document = {
        "environment": describe_environment(),
        "profile": arguments.profile,
        "itself": repeat(language_model_loss, profile, arguments),
        "slower": repeat(slower, profile, arguments),
    }
    document["waited"] = watch.share()
    document["summary"] = {
        "claims_of_itself": sum(bool(row["claimed"]) for row in document["itself"]),
        "slower_found": sum("forward" in row["claimed"] for row in document["slower"]),
        "repetitions": arguments.repetitions,
    }
    if arguments.out:
        write_json(arguments.out, document)
    print(json.dumps(document["summary"] | {"waited": document["waited"]}, indent=2))


def slower(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The loss, and a twentieth of its time in idle turns."""
    began = time.perf_counter()
    loss = language_model_loss(model, inputs, targets)
    ended = time.perf_counter()
    while time.perf_counter() < ended + SLOWER * (ended - began):
        pass
    return loss


def repeat(baselines_loss: Loss, profile: Profile, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """By repetition, which phases a difference is claimed of, and all ratios."""
    builders = {OURS: builder(language_model_loss, arguments), BASELINE: builder(baselines_loss, arguments)}
    rows = []
    for _ in range(arguments.repetitions):
        result = measure_timing(builders, profile, compared=(OURS, BASELINE))
        ratios = {row.phase: row.ratio for row in result.ratios}
        claimed = [phase for phase, ratio in ratios.items() if ratio.claimed]
        rows.append({"claimed": claimed, "ratios": {phase: ratio.value for phase, ratio in ratios.items()}})
        print(claimed, f"forward {ratios['forward'].value:.3f}", file=sys.stderr)
    return rows


def builder(loss: Loss, arguments: argparse.Namespace) -> Callable[[], Subject]:
    """Makes the model anew."""
    config = contestant_configs("seed", {**OVERRIDES, "mixer": "attention"})[OURS]
    training = TrainingConfig(batch_size=arguments.batch_size, sequence_length=128)
    batch = random_batch(config, training.batch_size, training.sequence_length, torch.device("cpu"))
    return lambda: Subject.of(build_model(config, 0), training, batch, loss)


if __name__ == "__main__":
    main()
