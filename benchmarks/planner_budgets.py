"""What is planned as fitting fits, and what is planned as not fitting does not: training at the edge of a GPU budget.

    python benchmarks/planner_budgets.py --out benchmarks/results/gpu/planner-budgets.json --jobs 6

A trial is a process of its own. It has a step predicted, has torch's allocator refuse all beyond the prediction (less
the driver's context, which `resnet-bk env --calibrate` has measured), and runs it; and again with a budget that the
prediction misses by 10%. Another kind of trial asks the search for a way to train under a round budget. Presets of 100M
and 1B parameters, so that the host's memory can be compared too.
"""

import argparse
import json
import math
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from planner_accuracy import BY_NAME, MIXERS, in_process
from resnet_bk.environment import describe_environment
from resnet_bk.files import write_json
from resnet_bk.memory.limits import is_out_of_memory
from resnet_bk.memory.plan import Budget
from resnet_bk.models import ResNetBKConfig
from resnet_bk.planner.calibration import calibration_of
from resnet_bk.planner.devices import Device, this_gpu
from resnet_bk.planner.predict import Prediction, predict
from resnet_bk.planner.search import choose_training
from resnet_bk.planner.verify import verify_training
from resnet_bk.training.budget import hold_allocator_to
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.strategy import describe_strategy, training_fields

GB = 10**9
DEVICE = torch.device("cuda")
TOO_MUCH = 1.1
# Rows of a batch, tokens of a row, micro-batches; one after the other for the trials at the edge.
SHAPES = ((8, 1024, 1), (4, 2048, 2), (32, 256, 1), (16, 512, 4))
CHOSEN = (("100m", (1.6, 2.0, 3.0, 4.0, 6.0)), ("1b", (4.0, 6.0, 12.0)))


def trials() -> list[dict[str, Any]]:
    """All of them, as JSON."""
    at_the_edge = [
        {"name": f"{mixer}, {strategy}", "mixer": mixer, "strategy": strategy, "shape": SHAPES[number % len(SHAPES)]}
        for number, (strategy, mixer) in enumerate((strategy, mixer) for strategy in BY_NAME for mixer in MIXERS)
    ]
    chosen = [
        {"name": f"{preset} under {size:g} GB", "kind": "chosen", "preset": preset, "budget": int(size * GB)}
        for preset, sizes in CHOSEN
        for size in sizes
    ]
    return [
        *({**trial, "kind": "fits"} for trial in at_the_edge),
        *({**trial, "kind": "misses"} for trial in at_the_edge),
        *chosen,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="trials whose names contain one of these")
    parser.add_argument("--cell")
    arguments = parser.parse_args()
    if arguments.cell:
        torch.set_num_threads(2)
        print(json.dumps(run_trial(json.loads(arguments.cell))))
        return
    calibration = calibration_of(torch.cuda.get_device_name())
    if calibration is None:
        parser.error("run `resnet-bk env --calibrate` first")
    chosen = [t for t in trials() if not arguments.only or any(part in t["name"] for part in arguments.only)]
    document: dict[str, Any] = {"environment": describe_environment(), "calibration": asdict(calibration)}
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for trial, row in zip(chosen, pool.map(lambda trial: in_process(trial, __file__), chosen), strict=True):
            rows.append(trial | row)
            brief = {key: row[key] for key in ("problem", "out_of_memory", "as_planned", "errors") if key in row}
            print(f"{trial['name']} ({trial['kind']}): {brief}", file=sys.stderr)
            document |= {"summary": summary(rows), "trials": rows}
            if arguments.out:
                write_json(arguments.out, document)
    print(json.dumps(document["summary"], indent=2))


def run_trial(trial: dict[str, Any]) -> dict[str, Any]:
    """Predicted, held to the budget, run."""
    device = this_gpu(DEVICE)
    config, prediction = _planned(trial, device)
    budget = trial.get("budget") or math.ceil(prediction.gpu_bytes / (TOO_MUCH if trial["kind"] == "misses" else 1))
    hold_allocator_to(budget - device.context_bytes, DEVICE)
    predicted = asdict(prediction.footprint) | {
        "gpu_bytes": prediction.gpu_bytes,
        "host_bytes": prediction.host_bytes - prediction.host_parts["process"],
    }
    row: dict[str, Any] = {
        "budget": budget,
        "training": describe_strategy(prediction.training),
        "micro_batch_size": prediction.training.micro_batch_size,
        "predicted": predicted,
    }
    try:
        measured = asdict(verify_training(config, prediction.training, DEVICE))
    except torch.OutOfMemoryError as error:
        assert is_out_of_memory(error)
        return row | {"out_of_memory": True, "as_planned": trial["kind"] == "misses"}
    names = ("allocated_bytes", "reserved_bytes", "host_bytes")
    errors = {name: predicted[name] / measured[name] - 1 for name in names}
    return row | {
        "out_of_memory": False,
        "as_planned": trial["kind"] != "misses",
        "measured": measured,
        "errors": errors,
    }


def _planned(trial: dict[str, Any], device: Device) -> tuple[ResNetBKConfig, Prediction]:
    if trial["kind"] == "chosen":
        config = ResNetBKConfig.from_preset(trial["preset"])
        training = TrainingConfig(batch_size=16, sequence_length=1024)
        return config, choose_training(config, training, Budget(gpu_bytes=trial["budget"]), device)
    config = ResNetBKConfig.from_preset("100m", mixer=trial["mixer"])
    batch_size, length, pieces = trial["shape"]
    training = TrainingConfig(
        batch_size=batch_size,
        sequence_length=length,
        micro_batch_size=None if pieces == 1 else batch_size // pieces,
        **training_fields(BY_NAME[trial["strategy"]], "bf16"),
    )
    return config, predict(config, training, device, held=True)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of how many trials each kind is, how many went as planned, and the errors of those that ran, as shares."""
    counts = {
        kind: {
            "trials": sum(row["kind"] == kind for row in rows),
            "as_planned": sum(row["kind"] == kind and row.get("as_planned", False) for row in rows),
        }
        for kind in ("fits", "misses", "chosen")
    }
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] != "misses":
            for name, error in row.get("errors", {}).items():
                found.setdefault(name, []).append(error)
    errors = {
        name: {"median_absolute": statistics.median(map(abs, values)), "least": min(values), "largest": max(values)}
        for name, values in found.items()
    }
    return {"counts": counts, "errors": errors}


if __name__ == "__main__":
    main()
