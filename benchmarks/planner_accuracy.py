"""How right the planner is: every configuration of a grid predicted and then run, each in a process of its own.

    python benchmarks/planner_accuracy.py --out benchmarks/results/cpu/planner.json --figure docs/planner-accuracy.svg

On a CPU the tensors of a real step are watched one by one; on a GPU torch's allocator and the driver are asked. The
last section times strategies and asks whether the one that the planner calls fastest is. `--only recorded` compares
with figures of GPU runs that are in benchmarks/results/gpu, where nothing is run, and

    python benchmarks/planner_accuracy.py --anew benchmarks/results/gpu/planner.json

has what an H100 was measured to take predicted by the planner of today, on any machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_bk.environment import describe_environment
from resnet_bk.files import read_json, write_json, write_text
from resnet_bk.imagined import Machine
from resnet_bk.memory.parameters import count_parameters
from resnet_bk.memory.strategy import STRATEGIES
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.planner import module
from resnet_bk.planner.cost import step_cost
from resnet_bk.planner.devices import DEVICES, Device, device_for
from resnet_bk.planner.footprint import footprint
from resnet_bk.planner.predict import Prediction, predict
from resnet_bk.planner.search import Candidate, order
from resnet_bk.planner.trace import trace_training
from resnet_bk.planner.verify import verify_step, verify_training
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.step import train_step
from resnet_bk.training.strategy import prepare_training, strategy_of, training_fields, training_shape

TIMEOUT = 600
RESULTS = Path(__file__).parent / "results" / "gpu"
H100 = DEVICES["h100"]
BY_NAME = {strategy.name: strategy for strategy in STRATEGIES}
MIXERS = ("resolvent", "attention", "bk")
# Of preset tiny, what differs; batch size, sequence length.
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "few tokens": ({}, 2, 16),
    "many tokens": ({"hidden_size": 64, "intermediate_size": 128}, 8, 512),
    "wide": ({"hidden_size": 256, "intermediate_size": 512, "num_layers": 3}, 4, 128),
    "deep": ({"hidden_size": 64, "intermediate_size": 128, "num_layers": 12}, 4, 256),
    "vocabulary": ({"hidden_size": 64, "vocab_size": 20_000}, 4, 128),
    "tied vocabulary": ({"hidden_size": 64, "vocab_size": 20_000, "tie_word_embeddings": True}, 4, 128),
    "experts": ({"hidden_size": 64, "num_experts": 16, "intermediate_size": 256}, 4, 64),
    "behind the window": ({"hidden_size": 64, "num_layers": 3, "local_attention_window": 64}, 4, 250),
}
# What is timed on a GPU, which finishes smaller steps before the next one can be launched.
WIDE_AND_DEEP: dict[str, Any] = {
    "vocab_size": 32_768,
    "hidden_size": 512,
    "num_layers": 8,
    "num_experts": 8,
    "intermediate_size": 848,
    **{f"num_{mixer}_heads": 8 for mixer in MIXERS},
}
# Which strategies, in how many micro-batches, of which shapes.
RUNS: list[tuple[str, int, str]] = [
    *(("fp32", 1, shape) for shape in SHAPES),
    *(("mixed precision", 1, shape) for shape in ("many tokens", "wide", "vocabulary", "behind the window")),
    *(("selective checkpointing", 1, shape) for shape in ("many tokens", "deep", "behind the window")),
    *(("full checkpointing", 2, shape) for shape in ("many tokens", "deep", "vocabulary")),
    *(("offloaded optimizer", 2, shape) for shape in ("wide", "tied vocabulary")),
    *(("offloaded activations", 2, shape) for shape in ("many tokens", "deep", "vocabulary")),
]
FOREIGN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 8000, "resid_pdrop": 0.1},
    "llama": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 8000,
    },
    "gpt_neox": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 8000,
    },
}
FOREIGN_WAYS = {way.name: way for way in module.WAYS}


def grid() -> list[dict[str, Any]]:
    """Every configuration, as JSON."""
    ours = [
        {"kind": "ours", "name": f"{mixer}, {shape}, {name}, {pieces} micro-batches", "mixer": mixer}
        | {"shape": shape, "strategy": name, "pieces": pieces}
        for mixer in MIXERS
        for name, pieces, shape in RUNS
    ]
    foreign = [
        {"kind": "foreign", "name": f"{model}, {way}", "model": model, "way": way}
        for model in FOREIGN
        for way in FOREIGN_WAYS
    ]
    return ours + foreign


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--only", choices=("grid", "ranking", "recorded"))
    parser.add_argument("--anew", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cell")
    arguments = parser.parse_args()
    if arguments.cell:
        torch.set_num_threads(1)
        print(json.dumps(run_cell(json.loads(arguments.cell))))
        return
    if arguments.anew:
        document = read_json(arguments.anew)
        predict_anew(document)
        write_json(arguments.anew, document)
        print(json.dumps(document["errors"], indent=2))
        return
    document = {"environment": describe_environment()}
    if arguments.only in (None, "recorded"):
        document["recorded"] = recorded()
    if arguments.only in (None, "grid"):
        document["cells"] = run_all(grid(), arguments.jobs)
        document["errors"] = summary(document["cells"])
    if arguments.only in (None, "ranking"):
        document["ranking"] = [ranking(mixer) for mixer in MIXERS]
    if arguments.out:
        write_json(arguments.out, document)
    if arguments.figure:
        write_text(arguments.figure, picture(document))
    print(json.dumps({key: value for key, value in document.items() if key in ("errors", "ranking")}, indent=2))


def run_all(cells: list[dict[str, Any]], jobs: int) -> list[dict[str, Any]]:
    """Each in its own process; what goes wrong is a result."""
    with ThreadPoolExecutor(jobs) as pool:
        rows = []
        for cell, row in zip(cells, pool.map(in_process, cells), strict=True):
            rows.append(cell | row)
            print(f"{cell['name']}: {row.get('error', row.get('problem'))}", file=sys.stderr)
    return rows


def in_process(cell: dict[str, Any], script: str = __file__) -> dict[str, Any]:
    """What a script prints of a cell, or how it failed."""
    command = [sys.executable, script, "--cell", json.dumps(cell)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return {"problem": f"no end after {TIMEOUT} s"}
    if done.returncode:
        return {"problem": done.stderr.strip().splitlines()[-1:]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Predicted, then measured."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if cell["kind"] == "timed":
        return {"rows": [way | {"seconds": step_seconds(way, device)} for way in cell["ways"]]}
    began = time.perf_counter()
    predicted, over_bare, measured = (_foreign if cell["kind"] == "foreign" else _ours)(cell, device)
    keys = ["tensor_bytes"] if device.type == "cpu" else ["allocated_bytes", "reserved_bytes"]
    row: dict[str, Any] = {"predicted": predicted, "measured": measured, "seconds": time.perf_counter() - began}
    row["error"] = {key: predicted[key] / measured[key] - 1 for key in keys}
    row["predicted"]["host_bytes"] = over_bare  # no error of it: such small steps are lost in what malloc keeps
    return row


def predict_anew(document: dict[str, Any]) -> None:
    """Replaces what was predicted when a grid was measured on an H100, and says where and by which code."""
    for cell in document["cells"]:
        if "error" not in cell:
            continue
        prediction = _foreign_prediction(cell, H100) if cell["kind"] == "foreign" else _own_prediction(cell, H100)
        found = asdict(prediction.footprint)
        cell["predicted"] |= found
        cell["error"] = {key: found[key] / cell["measured"][key] - 1 for key in cell["error"]}
        print(f"{cell['name']}: {cell['error']}", file=sys.stderr)
    document |= {"errors": summary(document["cells"]), "predicted_in": describe_environment()}


def config_of(cell: dict[str, Any]) -> tuple[ResNetBKConfig, TrainingConfig]:
    """The model and how it is trained."""
    overrides, batch_size, length = {**SHAPES, "wide and deep": (WIDE_AND_DEEP, 32, 1024)}[cell["shape"]]
    config = ResNetBKConfig.from_preset("tiny", mixer=cell["mixer"], **{"intermediate_size": 64, **overrides})
    training = TrainingConfig(
        batch_size=batch_size,
        sequence_length=length,
        micro_batch_size=None if cell["pieces"] == 1 else batch_size // cell["pieces"],
        **training_fields(BY_NAME[cell["strategy"]], "bf16"),
    )
    return config, training


def _ours(cell: dict[str, Any], device: torch.device) -> tuple[dict[str, Any], int, dict[str, Any]]:
    config, training = config_of(cell)
    prediction = _own_prediction(cell, device_for(device))
    measured = verify_training(config, training, device)
    over_bare = prediction.host_bytes - prediction.host_parts["process"]
    return asdict(prediction.footprint), over_bare, asdict(measured)


def _own_prediction(cell: dict[str, Any], place: Device) -> Prediction:
    config, training = config_of(cell)
    return predict(config, training, place)


def _foreign_job(cell: dict[str, Any], place: Device) -> module.Job:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(cell["model"], **FOREIGN[cell["model"]])
    tokens = torch.empty(4, 256, dtype=torch.int64, device="meta")
    batch = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    return module.Job.of(lambda: AutoModelForCausalLM.from_config(config), batch, device=place)


def _foreign_prediction(cell: dict[str, Any], place: Device) -> module.ModulePrediction:
    return module.predict_way(_foreign_job(cell, place), FOREIGN_WAYS[cell["way"]], place)


def _foreign(cell: dict[str, Any], device: torch.device) -> tuple[dict[str, Any], int, dict[str, Any]]:
    place, way = device_for(device), FOREIGN_WAYS[cell["way"]]
    job = _foreign_job(cell, place)
    prediction = _foreign_prediction(cell, place)

    def prepare() -> tuple[nn.Module, torch.optim.Optimizer, Any, list[Tensor]]:
        return job.prepared(way, device)

    measured = verify_step(prepare, device)
    return asdict(prediction.footprint), prediction.host_bytes - place.process_bytes, asdict(measured)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, least and largest error of each figure, as shares; and how many cells have one."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.get("error", {}).items():
            found.setdefault(key, []).append(value)
    return {
        key: {
            "cells": len(values),
            "median_absolute": statistics.median(abs(value) for value in values),
            "least": min(values),
            "largest": max(values),
        }
        for key, values in found.items()
    } | {"problems": [row["name"] for row in rows if "error" not in row]}


def recorded() -> list[dict[str, Any]]:
    """Predictions beside peaks that are on record of an H100 (step.json, frugal.json)."""
    from resnet_bk.bench.contestants import contestant_configs

    machine = Machine(kind="cuda", capability=(9, 0))
    rows = []
    steps = read_json(RESULTS / "step.json")
    configs = contestant_configs(steps["preset"], {})
    for point in steps["points"]:
        training = TrainingConfig(
            batch_size=point["batch_size"], sequence_length=point["sequence_length"], precision=steps["precision"]
        )
        for key, found in point["models"].items():
            predicted = footprint(trace_training(configs[key], training, machine))
            name = f"{steps['preset']}, {key}, N {point['sequence_length']}"
            rows.append(_recorded_row(name, predicted.allocated_bytes, found["peak_bytes"]))
    for name, cell in read_json(RESULTS / "frugal.json")["cells"].items():
        if "allocated_bytes" not in cell:
            continue
        training, config = TrainingConfig(**cell["training"]), ResNetBKConfig.from_preset(cell["cell"]["preset"])
        held = cell["cell"]["cap_bytes"] is not None and "inside" not in name
        predicted = footprint(trace_training(config, training, machine), expandable=held)
        row = _recorded_row(name, predicted.allocated_bytes, cell["allocated_bytes"])
        rows.append(
            row
            | {"predicted_reserved": predicted.reserved_bytes, "measured_reserved": cell["reserved_bytes"]}
            | {"reserved_error": predicted.reserved_bytes / cell["reserved_bytes"] - 1}
        )
    return rows


def _recorded_row(name: str, predicted: int, measured: int) -> dict[str, Any]:
    print(f"{name}: {predicted / measured - 1:+.3%}", file=sys.stderr)
    return {"name": name, "predicted": predicted, "measured": measured, "error": predicted / measured - 1}


def ranking(mixer: str) -> dict[str, Any]:
    """Every strategy timed, and the one that the cost model calls fastest beside the fastest."""
    shape = "wide and deep" if torch.cuda.is_available() else "deep"
    ways = [
        {"mixer": mixer, "shape": shape, "strategy": name, "pieces": pieces}
        for name in BY_NAME
        if not BY_NAME[name].stream_weights
        for pieces in (1, 4)
    ]
    done = in_process({"kind": "timed", "name": f"{mixer}, timed", "ways": ways})
    return ranked(mixer, done["rows"]) if "rows" in done else {"mixer": mixer} | done


def ranked(mixer: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the planner would take first of all that were timed, beside the fastest."""
    device = device_for(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    ways = {}
    for row in rows:
        config, training = config_of(row)
        cost = step_cost(strategy_of(training), config, training_shape(training), count_parameters(config), device)
        ways[_key(row)] = Candidate(training=training, device_bytes=0, host_bytes=0, cost=cost)
        row["predicted_seconds"] = cost.seconds
    fastest = min(rows, key=lambda row: row["seconds"])
    called = min(rows, key=lambda row: order(ways[_key(row)], device))
    return {
        "mixer": mixer,
        "called_fastest": _key(called),
        "fastest": _key(fastest),
        "slower_by": called["seconds"] / fastest["seconds"] - 1,
        "rows": rows,
    }


def _key(row: dict[str, Any]) -> str:
    return f"{row['strategy']}, {row['pieces']} micro-batches"


def step_seconds(cell: dict[str, Any], device: torch.device) -> float:
    """The median of steps, after two."""
    config, training = config_of(cell)
    torch.manual_seed(0)
    prepared = prepare_training(ResNetBKForCausalLM(config).train(), training, device)
    size = (training.batch_size, training.sequence_length)
    batch = (torch.randint(config.vocab_size, size), torch.randint(config.vocab_size, size))
    samples = []
    for step in range(9):
        began = time.perf_counter()
        train_step(
            prepared.model,
            prepared.optimizer,
            prepared.scaler,
            [batch],
            training,
            step,
            device=device,
            by_block=prepared.by_block,
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - began)
    return statistics.median(samples[2:])


def picture(document: dict[str, Any]) -> str:
    """Predicted against measured bytes, on logarithmic axes, and the errors."""
    from resnet_bk.report.figures import BASELINE, GREY, OURS, THIRD, drawing

    key = "tensor_bytes" if document["environment"]["hardware"]["gpu"] is None else "allocated_bytes"
    cells = [row for row in document.get("cells", []) if "error" in row]
    groups = [
        (
            "ResNet-BK, run here",
            OURS,
            "o",
            [(r["measured"][key], r["predicted"][key]) for r in cells if r["kind"] == "ours"],
        ),
        (
            "Hugging Face, run here",
            BASELINE,
            "s",
            [(r["measured"][key], r["predicted"][key]) for r in cells if r["kind"] == "foreign"],
        ),
        ("on record of an H100", THIRD, "^", [(r["measured"], r["predicted"]) for r in document.get("recorded", [])]),
    ]
    with drawing(columns=2, height=3.2) as result:
        left, right = result.axes
        for label, colour, marker, points in groups:
            if points:
                measured, predicted = zip(*points, strict=True)
                left.scatter(measured, predicted, s=14, color=colour, marker=marker, label=label)
                errors = [100 * (p / m - 1) for m, p in points]
                right.scatter(measured, errors, s=14, color=colour, marker=marker)
        ends = [min(m for *_, pts in groups for m, _ in pts), max(m for *_, pts in groups for m, _ in pts)]
        left.plot(ends, ends, color=GREY, linewidth=0.8, zorder=0)
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xlabel("measured peak, bytes")
        left.set_yscale("log")
        left.set_ylabel("predicted peak, bytes")
        right.set_ylabel("error, %")
        result.legend_above()
    return result.svg


if __name__ == "__main__":
    main()
