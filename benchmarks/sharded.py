"""Training on several GPUs: the same losses on any number of them, the speed, and each one's memory beside the plan.

    python benchmarks/sharded.py --out benchmarks/results/gpu/sharded.json                  # all GPUs there are
    python benchmarks/sharded.py --out /tmp/sharded.json --device cpu --preset tiny         # gloo, to see that it works

Starts torchrun once for each number of ranks: all, one, two, and half of all. Every launch goes through its cells: a
tiny model in float32, whose losses must agree to 1e-5 whatever the number of ranks; the preset in bfloat16, which is
timed and measured; and the checkpoint that all ranks have left, from which fewer go on to the same losses. Each rank
writes a file for each cell, and the document is written after every launch: what fails, hangs or was killed is recorded
and ends its launch, not the rest. Peaks are those from the second step on, the first with moments. Of a rank that
computes on a CPU tensors are counted, which makes it slow.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from resnet_bk.environment import describe_environment
from resnet_bk.files import read_json, write_json
from resnet_bk.memory.tracking import TensorTracker
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.planner.devices import this_cpu, this_gpu
from resnet_bk.planner.predict import predict
from resnet_bk.planner.ranks import of_one_rank
from resnet_bk.training.checkpoint import (
    TrainingState,
    load_model_checkpoint,
    path_of_step,
    restore_optimizer,
    save_checkpoint,
)
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.distributed import World, joined
from resnet_bk.training.step import train_step
from resnet_bk.training.strategy import prepare_training

EXACT, TRAINED, RESUMED = "tiny in fp32", "preset in bf16", "resumed"
MORE_STEPS = 2  # after the checkpoint
EXACT_TOLERANCE, HALF_TOLERANCE = 1e-5, 1e-2  # relative, of losses
WARMUP_STEPS = 2  # not timed
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Steps ``first`` to ``last`` of a training, from the checkpoint before them in ``folder``; may leave one."""

    name: str
    model: dict[str, Any]
    training: dict[str, Any]
    folder: str
    first: int
    last: int
    save: bool = False

    @property
    def config(self) -> ResNetBKConfig:
        """The model's."""
        fields = dict(self.model)
        return ResNetBKConfig.from_preset(fields.pop("preset"), **fields)

    @property
    def settings(self) -> TrainingConfig:
        """Of all ranks together."""
        return TrainingConfig(**self.training)


@dataclass
class Document:
    """What is known by now."""

    settings: dict[str, Any]
    launches: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--ranks", type=int, help="the most; as many as there are GPUs, or 2 on a CPU")
    parser.add_argument("--preset", default="100m")
    parser.add_argument("--batch-size", type=int, default=32, help="of all ranks together")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--launch-seconds", type=float, default=75.0, help="after which a launch is ended")
    parser.add_argument("--run-cells", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--predict", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run_cells:
        run_cells(arguments.run_cells, torch.device(arguments.device))
    elif arguments.predict:
        write_predictions(arguments.predict, arguments.device)
    elif arguments.out is None:
        parser.error("--out is needed")
    else:
        launch_all(arguments)


def launch_all(arguments: argparse.Namespace) -> None:
    """All launches, one after the other, and predictions beside them."""
    most = arguments.ranks or (torch.cuda.device_count() if arguments.device == "cuda" else 2)
    if most < 2:
        raise SystemExit(f"there are {most} GPUs, and this is about several; use --device cpu to see that it works")
    settings = {
        name: value for name, value in vars(arguments).items() if name not in ("out", "run_cells", "predict", "ranks")
    }
    document = Document({**settings, "ranks": most})
    with tempfile.TemporaryDirectory(prefix="sharded-") as name:
        folder = Path(name)
        exact, trained = planned_cells(arguments, folder)
        for cell in (exact, trained):
            save_first(cell)
        numbers = list(dict.fromkeys((most, 1, 2, most // 2)))
        predicting = start_predicting(folder, [exact, trained], numbers, arguments.device)
        for ranks in numbers:
            document.launches.append(launch(ranks, cells_of(ranks, most, exact, trained), folder, arguments))
            write(arguments.out, document)
        document.predictions = predictions_of(predicting, folder, arguments.launch_seconds)
        write(arguments.out, document)
    print("\n".join(conclusions(document)["failures"]) or "everything ran and agreed")


def planned_cells(arguments: argparse.Namespace, folder: Path) -> tuple[Cell, Cell]:
    """The tiny model and the preset, without what is of a number of ranks."""
    plain = {"batch_size": arguments.batch_size, "warmup_steps": 4}
    exact = Cell(
        name=EXACT,
        model={"preset": "tiny", "vocab_size": 512},
        training={**plain, "sequence_length": 64, "precision": "fp32"},
        folder=str(folder / "exact"),
        first=0,
        last=5,
    )
    trained = Cell(
        name=TRAINED,
        model={"preset": arguments.preset, "vocab_size": arguments.vocab_size},
        training={**plain, "sequence_length": arguments.sequence_length, "precision": "bf16", "learning_rate": 3e-4},
        folder=str(folder / "trained"),
        first=0,
        last=arguments.steps,
    )
    return exact, trained


def cells_of(ranks: int, most: int, exact: Cell, trained: Cell) -> list[Cell]:
    """What so many ranks do: all leave a checkpoint and go on, fewer go on from it."""
    resumed = Cell(**{**asdict(trained), "name": RESUMED, "first": trained.last, "last": trained.last + MORE_STEPS})
    saving = Cell(**{**asdict(trained), "save": ranks == most})
    if ranks in (1, 2, most):
        return [exact, saving, resumed]
    return [exact, resumed]


def save_first(cell: Cell) -> None:
    """The checkpoint of step 0, which every number of ranks starts from."""
    torch.manual_seed(0)
    prepared = prepare_training(ResNetBKForCausalLM(cell.config), cell.settings, CPU)
    save_checkpoint(Path(cell.folder), prepared.model, prepared.optimizer, prepared.scaler, TrainingState())


def launch(ranks: int, cells: list[Cell], folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """torchrun, until it ends or its time is up; what each rank has written of each cell."""
    results = folder / f"results-{ranks}"
    results.mkdir()
    write_json(results / "cells.json", [asdict(cell) for cell in cells])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    own = [__file__, "--run-cells", str(results), "--device", arguments.device]
    print(f"{ranks} ranks ...", flush=True)
    start = time.perf_counter()
    code, errors = _run([*torchrun, *own], results / "errors.txt", arguments.launch_seconds)
    found = []
    for number, cell in enumerate(cells):
        files = [results / f"{number}-{rank}.json" for rank in range(ranks)]
        if all(file.is_file() for file in files):
            found.append({"cell": cell.name, "ranks": [read_json(file) for file in files]})
        else:
            found.append({"cell": cell.name, "failure": errors or f"exit code {code}"})
    return {"ranks": ranks, "exit_code": code, "seconds": time.perf_counter() - start, "cells": found}


def _run(command: list[str], errors_file: Path, seconds: float) -> tuple[int, str]:
    """Exit code and the end of what went wrong; with all its children, it is ended after so many seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with errors_file.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            ours = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for child in ours:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            process.wait()
            return -1, f"ended after {seconds:g} s; {_tail(errors_file)}"
    return code, _tail(errors_file) if code else ""


def _tail(file: Path) -> str:
    """The first traceback's end, if there is one: what torchrun says of it comes behind."""
    text = file.read_text(errors="replace")
    start = text.find("Traceback (most recent call last)")
    return text[-3000:] if start < 0 else text[start : start + 6000]


def run_cells(results: Path, device: torch.device) -> None:
    """Inside a rank: every cell, each with a file."""
    cells = [Cell(**fields) for fields in read_json(results / "cells.json")]
    if device.type == "cpu":
        torch.set_num_threads(1)
    with joined() as world:
        here = world.place(device)
        for number, cell in enumerate(cells):
            write_json(results / f"{number}-{world.rank}.json", run_cell(cell, world, here))
            gc.collect()
            if here.type == "cuda":
                torch.cuda.empty_cache()


def run_cell(cell: Cell, world: World, device: torch.device) -> dict[str, Any]:
    """Losses, seconds and memory of a rank."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    tracker = None if on_gpu else TensorTracker()
    with tracker or nullcontext(), tracker.hearing_of_resizes() if tracker else nullcontext():
        return _trained(cell, world, device, tracker)


def _trained(cell: Cell, world: World, device: torch.device, tracker: TensorTracker | None) -> dict[str, Any]:
    training = of_one_rank(cell.settings, world.size)
    checkpoint = path_of_step(Path(cell.folder), cell.first)
    model = load_model_checkpoint(checkpoint, world, device).train()
    prepared = prepare_training(model, training, device)
    restore_optimizer(checkpoint, prepared.model, prepared.optimizer, prepared.scaler, world)
    losses, norms, seconds = [], [], []
    for step in range(cell.first, cell.last):
        if step == cell.first + 1:
            _reset_peaks(device, tracker)
        batch = _batch(cell, step, world)
        _synchronize(device)
        start = time.perf_counter()
        result = train_step(
            prepared.model, prepared.optimizer, prepared.scaler, [batch], training, step, device=device, world=world
        )
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
        losses.append(float(result.cross_entropy))
        norms.append(float(result.grad_norm) if result.grad_norm is not None else None)
    memory = _memory(device, tracker)
    if cell.save:
        state = TrainingState(step=cell.last)
        save_checkpoint(Path(cell.folder), prepared.model, prepared.optimizer, prepared.scaler, state, world)
    timed = seconds[WARMUP_STEPS:] or seconds
    return {
        "rank": world.rank,
        "losses": losses,
        "grad_norms": norms,
        "step_seconds": seconds,
        "tokens_per_second": cell.settings.tokens_per_step / statistics.median(timed),
        **memory,
    }


def _batch(cell: Cell, step: int, world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's rows of random text in which each token has a usual successor: there is something to learn."""
    generator = torch.Generator().manual_seed(1000 + step)
    training, vocab_size = cell.settings, cell.config.vocab_size
    size = (training.batch_size, training.sequence_length + 1)
    tokens = (torch.rand(size, generator=generator).pow(3) * vocab_size).long()
    usual = torch.rand(size, generator=generator) < 0.5
    tokens[:, 1:] = torch.where(usual[:, 1:], (3 * tokens[:, :-1] + 1) % vocab_size, tokens[:, 1:])
    own = tokens[world.rows(training.batch_size)]
    return own[:, :-1].contiguous(), own[:, 1:].contiguous()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peaks(device: torch.device, tracker: TensorTracker | None) -> None:
    if tracker is not None:
        tracker.reset_peak()
    else:
        torch.cuda.reset_peak_memory_stats(device)


def _memory(device: torch.device, tracker: TensorTracker | None) -> dict[str, int]:
    if tracker is not None:
        return {"tensor_bytes": tracker.peak_bytes}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        # Context, kernels and NCCL's buffers, if nobody else is on the card.
        "outside_bytes": total - free - torch.cuda.memory_reserved(device),
    }


def start_predicting(folder: Path, cells: list[Cell], numbers: list[int], device: str) -> "subprocess.Popen[bytes]":
    """In a process beside the launches, which has no context on a GPU."""
    asked = [{"cell": asdict(cell), "ranks": ranks} for ranks in numbers for cell in cells]
    write_json(folder / "asked.json", asked)
    command = [sys.executable, __file__, "--predict", str(folder), "--device", device]
    with (folder / "predicting.txt").open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def write_predictions(folder: Path, kind: str) -> None:
    """One after the other, each with those before."""
    device = this_gpu() if kind == "cuda" else this_cpu()
    found = []
    for asked in read_json(folder / "asked.json"):
        cell, ranks = Cell(**asked["cell"]), asked["ranks"]
        start = time.perf_counter()
        try:
            prediction = predict(cell.config, cell.settings, device, ranks=ranks)
        except Exception as error:  # one that fails is recorded
            found.append({"cell": cell.name, "ranks": ranks, "failure": repr(error)})
        else:
            found.append(
                {
                    "cell": cell.name,
                    "ranks": ranks,
                    **asdict(prediction.footprint),
                    "context_bytes": device.context_bytes,
                    "nccl_bytes": prediction.nccl_bytes,
                    "gpu_bytes": prediction.gpu_bytes,
                    "tokens_per_second": prediction.cost.tokens_per_second,
                    "seconds": time.perf_counter() - start,
                }
            )
        write_json(folder / "predictions.json", found)


def predictions_of(process: "subprocess.Popen[bytes]", folder: Path, seconds: float) -> list[dict[str, Any]]:
    """What was predicted by the time that all was measured, and a little later."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    file = folder / "predictions.json"
    return read_json(file) if file.is_file() else [{"failure": _tail(folder / "predicting.txt")}]


def write(out: Path, document: Document) -> None:
    """Everything, with what follows from it."""
    write_json(out, {**asdict(document), **conclusions(document), "environment": describe_environment()})


def conclusions(document: Document) -> dict[str, Any]:
    """Agreement of losses with the first launch that has the cell, predictions' errors, and what failed."""
    failures, agreement, memory = [], [], []
    first: dict[str, list[float]] = {}
    for launched in document.launches:
        ranks = launched["ranks"]
        for row in launched["cells"]:
            name = row["cell"]
            if "failure" in row:
                failures.append(f"{name} on {ranks} ranks: {row['failure'][-4000:]}")
                continue
            losses = row["ranks"][0]["losses"]
            expected = first.setdefault(name, losses)
            difference = max(abs(ours / theirs - 1) for ours, theirs in zip(losses, expected, strict=True))
            tolerance = EXACT_TOLERANCE if name == EXACT else HALF_TOLERANCE
            agreement.append({"cell": name, "ranks": ranks, "difference": difference, "tolerance": tolerance})
            if not difference <= tolerance:
                failures.append(f"{name} on {ranks} ranks: losses differ by {difference:.2e} of {tolerance:g}")
            memory += _beside(row, ranks, document.predictions)
    return {"agreement": agreement, "memory": memory, "failures": failures}


def _beside(row: dict[str, Any], ranks: int, predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each kind of bytes that was both measured and predicted, of each rank."""
    known = [found for found in predictions if found.get("cell") == row["cell"] and found.get("ranks") == ranks]
    return [
        {
            "cell": row["cell"],
            "ranks": ranks,
            "rank": measured["rank"],
            "what": what,
            "predicted": found[what],
            "measured": measured[what],
            "error": found[what] / measured[what] - 1,
        }
        for found in known
        for measured in row["ranks"]
        for what in ("tensor_bytes", "allocated_bytes", "reserved_bytes")
        if what in measured and what in found
    ]


if __name__ == "__main__":
    main()
