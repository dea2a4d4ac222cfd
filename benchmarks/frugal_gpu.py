"""Training under a cap on GPU memory: does the process stay below it, by the driver's own count, and how fast is it.

    python benchmarks/frugal_gpu.py --out benchmarks/results/gpu/frugal.json --budget-seconds 1500
    python benchmarks/frugal_gpu.py --out /tmp/frugal.json --device cpu --preset tiny    # the same code, without caps

Each cell is a process of its own, so that one that dies is a result. It has the strategy that `choose_training` chooses
for its cap, as `resnet-bk train --gpu-memory` does, and torch's allocator refuses it more than that, less what the
driver has given to the process besides tensors and will give it for kernels. The judge is the driver:
nvidia-smi's figure for the process where it shows processes, else the card's less what was used before the cell began.
Cells that train inside the GPU do so in the micro-batches that their counterpart under the cap ended with.

Cells run in the order of their importance until the time is up, and what is known is written after each, in place of
what `--out` has of it; its other cells stay, each with the commit that it is of. Text is Python's standard library in
bytes; the vocabulary is one of 32,768 all the same, as are the head and its memory.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from resnet_bk.bench.contestants import build_model
from resnet_bk.bench.subject import synchronizer
from resnet_bk.environment import describe_environment, peak_resident_bytes
from resnet_bk.files import read_json, write_json
from resnet_bk.frugal import host
from resnet_bk.frugal.micro_batches import MicroBatches
from resnet_bk.frugal.optimizer import OffloadedAdamW
from resnet_bk.memory.limits import is_out_of_memory
from resnet_bk.memory.parameters import count_parameters
from resnet_bk.memory.plan import Budget
from resnet_bk.memory.strategy import STRATEGIES
from resnet_bk.models import ResNetBKConfig
from resnet_bk.planner.devices import device_for
from resnet_bk.planner.predict import predict
from resnet_bk.planner.search import choose_training
from resnet_bk.training.budget import context_bytes, half_type_of, has_small_workspaces, hold_to_budget
from resnet_bk.training.config import DataConfig, TrainingConfig
from resnet_bk.training.data import TokenDataset, prepare_dataset, training_batch
from resnet_bk.training.step import train_step, updates_in_backward
from resnet_bk.training.strategy import (
    PreparedTraining,
    describe_strategy,
    prepare_training,
    training_fields,
)

GB, MIB = 10**9, 2**20
VOCABULARY, LENGTH = 32_768, 1024
LARGE, MEDIUM, SMALL = 131_072, 32_768, 16_384  # tokens of a step
DATA = DataConfig(data="stdlib", tokenizer="byte")
WARMUP = 2  # the first step proves that memory suffices, the second is the first that updates during backward
SAMPLE_SECONDS = 0.05  # from inside a cell
NVIDIA_SMI_SECONDS = 0.2  # it takes a part of that itself; what the allocator has, it keeps for longer
PATIENCE = 1.5  # a cell that takes so many times its seconds hangs
LEAST_SECONDS = 45.0  # with less, a cell would not get to its first step
# What a cell inside the GPU must not use, whatever would fit.
IN_GPU = {"offload_optimizer": False, "half_weights": False, "stream_weights": False, "checkpointing": "none"}
HALF_MOMENTS = {"moments": "bf16", "offload_optimizer": True}
# Of a cell inside the GPU: trained as usual, or with each block computed again, as under a cap.
INSIDE, RECOMPUTING = ": inside the GPU", ", recomputing"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement. ``fixed`` are fields of the training configuration that nobody chooses; ``like`` names the cell
    whose micro-batches it takes; ``clips`` is an update after backward, when all gradients are there."""

    name: str
    preset: str
    cap_bytes: int | None
    tokens: int = LARGE
    clips: bool = False
    steps: int = 6
    length: int = LENGTH
    fixed: dict[str, Any] = field(default_factory=dict)
    like: str | None = None


def all_cells() -> list[Cell]:
    """The most important first."""
    cells = [
        _capped("1b", 4.0, steps=50),
        _in_gpu("1b", "1b under 4 GB"),
        _in_gpu("1b", "1b under 4 GB", checkpointing="full"),
        _capped("7b", 12.0, tokens=MEDIUM, steps=50, fixed=HALF_MOMENTS),
        _capped("1b", 3.0),
        _in_gpu("1b", "1b under 3 GB"),
        _capped("1b", 4.0, clips=True),
        _capped("1b", 4.0, tokens=SMALL),
        _in_gpu("1b", "1b under 4 GB, 16,384 tokens", tokens=SMALL),
        _capped("100m", 1.6),
        _in_gpu("100m", "100m under 1.6 GB"),
        _capped("1b", 4.0, tokens=SMALL, clips=True),
        _capped("7b", 8.0, tokens=MEDIUM, steps=50, fixed=HALF_MOMENTS),
        _capped("100m", 1.0, tokens=MEDIUM, steps=50),
        _in_gpu("100m", "100m under 1 GB, 32,768 tokens", tokens=MEDIUM),
    ]
    assert len({cell.name for cell in cells}) == len(cells)
    return cells


def _capped(preset: str, gigabytes: float, **fields: Any) -> Cell:
    name = f"{preset} under {gigabytes:g} GB{_variant(fields)}"
    return Cell(name=name, preset=preset, cap_bytes=int(gigabytes * GB), **fields)


def _in_gpu(preset: str, like: str, checkpointing: str = "none", **fields: Any) -> Cell:
    name, fixed = f"{like}{INSIDE}", {**IN_GPU, "checkpointing": checkpointing}
    if checkpointing != "none":
        name += RECOMPUTING
    return Cell(name=name, preset=preset, cap_bytes=None, fixed=fixed, like=like, **fields)


def _variant(fields: dict[str, Any]) -> str:
    tokens = f", {fields['tokens']:,} tokens" if "tokens" in fields else ""
    return tokens + (", clipped" if fields.get("clips") else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--preset", help="instead of each cell's own, in short sequences: to see that it works")
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="those whose names contain one of these")
    parser.add_argument("--steps", type=int, help="of each cell, instead of its own number")
    parser.add_argument("--budget-seconds", type=float, default=1500.0)
    parser.add_argument("--cell-seconds", type=float, default=300.0, help="after which a cell begins no further step")
    parser.add_argument("--list", action="store_true", help="print the cells' names and stop")
    parser.add_argument("--run-cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run_cell:
        run_cell(json.loads(arguments.run_cell), torch.device(arguments.device), arguments.out)
        return
    cells = chosen_cells(arguments.cells, arguments.preset, arguments.steps)
    if arguments.list:
        print("\n".join(cell.name for cell in cells))
        return
    if arguments.out is None:
        parser.error("--out is required")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    document = measure(cells, arguments.device, arguments.out, arguments.budget_seconds, arguments.cell_seconds)
    print(f"\n{table(document)}")


def chosen_cells(names: list[str] | None, preset: str | None, steps: int | None) -> list[Cell]:
    """What the command line asks for."""
    cells = [cell for cell in all_cells() if names is None or any(name in cell.name for name in names)]
    if steps is not None:
        cells = [replace(cell, steps=steps) for cell in cells]
    if preset is not None:
        cells = [replace(cell, preset=preset, tokens=cell.tokens // 256, length=64) for cell in cells]
    return cells


def measure(cells: list[Cell], device: str, out: Path, budget: float, cell_seconds: float) -> dict[str, Any]:
    """One cell after the other; written after each."""
    deadline = time.perf_counter() + budget
    # Once, so that the cells find it. No CUDA here: a context of this process would be counted with the cells'.
    prepare_dataset(DATA, on_progress=print)
    document = read_json(out) if out.exists() else {"environment": None, "data": asdict(DATA), "cells": {}}
    for cell in cells:
        left = deadline - time.perf_counter()
        if left < LEAST_SECONDS:
            document["cells"].setdefault(cell.name, {"cell": asdict(cell), "died": "not begun: the time was up"})
            continue
        like_others = _with_micro_batches(cell, document["cells"])
        row = measure_cell(like_others, device, min(left, cell_seconds), min(left, PATIENCE * cell_seconds))
        environment = row.pop("environment", None)
        document["environment"] = document["environment"] or environment
        row["commit"] = (environment or {}).get("commit")
        document["cells"][cell.name] = row
        write_json(out, document)
        print(f"{cell.name}: {in_words(row)}", flush=True)
    write_json(out, document)
    return document


def _with_micro_batches(cell: Cell, rows: dict[str, Any]) -> Cell:
    """The cell in the micro-batches that its counterpart ended with; in those that fit, if it has not run."""
    rows_at_once = rows.get(cell.like, {}).get("micro_batch_rows") if cell.like else None
    return cell if rows_at_once is None else replace(cell, fixed={**cell.fixed, "micro_batch_size": rows_at_once})


def measure_cell(cell: Cell, device: str, seconds: float, most: float) -> dict[str, Any]:
    """A cell in a process of its own, watched from here. After ``seconds`` it begins no step; ``most`` ends it."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result, errors = Path(folder) / "cell.json", Path(folder) / "stderr"
        command = [sys.executable, __file__, "--device", device, "--out", str(result)]
        command += ["--run-cell", json.dumps({"cell": asdict(cell), "seconds": seconds})]
        with watching_card(device) as card, errors.open("wb") as stderr:
            process = subprocess.Popen(command, stderr=stderr)
            try:
                code: int | None = process.wait(timeout=most)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = None
        row: dict[str, Any] = read_json(result) if result.exists() else {"cell": asdict(cell)}
        if code != 0 and "died" not in row:
            last_words = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            row["died"] = "ended: the time was up" if code is None else f"exit code {code}: {' / '.join(last_words)}"
    row["driver"] = card.figures(process.pid, row.get("card", {}))
    row["judged_bytes"] = row["driver"]["judged_bytes"]
    cap = cell.cap_bytes
    if cap is not None and row["judged_bytes"] is not None:
        row["within_cap"] = row["judged_bytes"] <= cap
    row["process_seconds"] = time.perf_counter() - began
    return row


class Card:
    """What nvidia-smi says of the card, sampled while a cell runs. Without nvidia-smi it knows nothing."""

    def __init__(self) -> None:
        self.idle: int | None = None
        self.used = 0
        self.by_process: dict[int, int] = {}

    def figures(self, pid: int, own: dict[str, int]) -> dict[str, int | None]:
        """``own`` is what the cell itself heard from the driver of the card's use, at its most.

        In a container nvidia-smi may not show processes, or not by the numbers that they have there. A single one is
        the cell's.
        """
        of_process = self.by_process.get(pid)
        if of_process is None and len(self.by_process) == 1:
            of_process = next(iter(self.by_process.values()))
        of_card = None if self.idle is None else self.used - self.idle
        judged = of_process or of_card or own.get("peak_used") or None
        return {
            "judged_bytes": judged,
            "process_bytes": of_process,
            "card_bytes_beyond_idle": of_card,
            "card_idle_bytes": self.idle,
            "card_bytes_heard_inside": own.get("peak_used") or None,
        }


@contextmanager
def watching_card(device: str) -> Iterator[Card]:
    """Samples until the block ends."""
    card = Card()
    card.idle = card_used() if device == "cuda" else None
    if card.idle is None:
        yield card
        return
    done = threading.Event()

    def sample() -> None:
        while not done.wait(NVIDIA_SMI_SECONDS):
            card.used = max(card.used, card_used() or 0)
            for pid, used in memory_by_process():
                card.by_process[pid] = max(card.by_process.get(pid, 0), used)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield card
    finally:
        done.set()
        thread.join()


def card_used() -> int | None:
    """The card's bytes in use; None where nvidia-smi is missing or does not say."""
    values = [line.split(",") for line in nvidia_smi("--query-gpu=memory.used")]
    return int(values[0][0]) * MIB if values and values[0][0].strip().isdecimal() else None


def memory_by_process() -> Iterator[tuple[int, int]]:
    """Process and bytes, of those that nvidia-smi shows."""
    for line in nvidia_smi("--query-compute-apps=pid,used_memory"):
        values = [value.strip() for value in line.split(",")]
        if len(values) == 2 and all(value.isdecimal() for value in values):  # or "[N/A]"
            yield int(values[0]), int(values[1]) * MIB


def nvidia_smi(query: str) -> list[str]:
    """Lines of its answer for the card that cells compute on."""
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", "-i", card, query, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def run_cell(spec: dict[str, Any], device: torch.device, out: Path) -> None:
    """In the cell's own process: what is known is written after every step, so that it survives the process."""
    began = time.perf_counter()
    cell, row = Cell(**spec["cell"]), {"cell": spec["cell"], "environment": describe_environment()}
    with watching_driver(device) as card:
        row["card"] = card
        try:
            for _ in train(cell, device, row, until=began + spec["seconds"]):
                write_json(out, row)
        except Exception as error:
            row["died"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            write_json(out, row)
            raise
    row["cell_seconds"] = time.perf_counter() - began
    write_json(out, row)


@contextmanager
def watching_driver(device: torch.device) -> Iterator[dict[str, int]]:
    """The card's memory in use by the driver's count, asked for from inside: nvidia-smi may be missing."""
    figures = {"peak_used": 0}
    if device.type != "cuda":
        yield figures
        return
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            free, total = torch.cuda.mem_get_info(device)
            figures["peak_used"] = max(figures["peak_used"], total - free)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield figures
    finally:
        done.set()
        thread.join()


def train(cell: Cell, device: torch.device, row: dict[str, Any], *, until: float) -> Iterator[None]:
    """Trains a cell and fills its row; yields where there is something new to write."""
    config = model_config(cell)
    if cell.cap_bytes is not None:
        hold_to_budget(cell.cap_bytes, device)
    row |= {"context": {"bare": context_bytes(device)}, "small_workspaces": has_small_workspaces()}
    training = chosen_training(cell, config, device)
    row |= describe_choice(cell, config, training, device)
    yield
    began = time.perf_counter()
    prepared = prepare_training(build_model(config, training.seed).train(), training, device)
    gc.collect()
    row["prepare_seconds"] = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    micro_batches = MicroBatches(
        min(training.micro_batch_size or training.batch_size, training.batch_size), is_out_of_memory=is_out_of_memory
    )
    row |= {"losses": [], "seconds": []}
    for step in range(cell.steps):
        if step and time.perf_counter() + row["seconds"][-1] > until:
            break
        loss, seconds = timed_step(prepared, training, step, device, micro_batches)
        row["losses"].append(loss)
        row["seconds"].append(seconds)
        row |= memory_figures(device) | {"micro_batch_rows": micro_batches.rows}
        row["context"]["at_the_end"] = context_bytes(device)
        yield
    if isinstance(prepared.optimizer, OffloadedAdamW):
        prepared.optimizer.synchronize()
    row["updated_in_backward"] = updates_in_backward(prepared.optimizer, prepared.scaler, training)
    warm = row["seconds"][WARMUP:] or row["seconds"][-1:]
    row["tokens_per_second"] = training.tokens_per_step / statistics.median(warm)
    row["steps_that_count"] = len(warm)
    yield


def model_config(cell: Cell, **overrides: Any) -> ResNetBKConfig:
    """The cell's model, with a vocabulary of a real size whatever the preset's."""
    return ResNetBKConfig.from_preset(cell.preset, vocab_size=VOCABULARY, **overrides)


def chosen_training(cell: Cell, config: ResNetBKConfig, device: torch.device) -> TrainingConfig:
    """The fastest strategy under the cap, or what the cell says. Inside the GPU that is mixed precision."""
    fixed = dict(cell.fixed)
    if device.type == "cpu" and cell.cap_bytes is not None:
        # Caps are the GPU's: here the most frugal strategy runs, as all others are part of it.
        fixed = {**training_fields(STRATEGIES[-1], half_type_of(device)), **fixed, "micro_batch_size": 2}
    elif cell.cap_bytes is None:
        fixed["precision"] = half_type_of(device)
    training = TrainingConfig(
        batch_size=cell.tokens // cell.length,
        sequence_length=cell.length,
        learning_rate=3e-4,
        warmup_steps=WARMUP,
        max_grad_norm=1.0 if cell.clips else None,
        **fixed,
    )
    return choose_training(config, training, budget_of(cell, device), device_for(device), fixed=fixed).training


def budget_of(cell: Cell, device: torch.device) -> Budget:
    """The cap, or the whole card."""
    if device.type == "cpu":
        return Budget()
    return Budget(gpu_bytes=cell.cap_bytes or torch.cuda.get_device_properties(device).total_memory)


def describe_choice(
    cell: Cell, config: ResNetBKConfig, training: TrainingConfig, device: torch.device
) -> dict[str, Any]:
    """What was chosen, and what the planner says of it."""
    found = predict(config, training, device_for(device), held=cell.cap_bytes is not None)
    return {
        "parameters": count_parameters(config).total,
        "training": asdict(training),
        "strategy": describe_strategy(training) or training.precision,
        "planned": {
            **asdict(found.footprint),
            "gpu_bytes": found.gpu_bytes,
            "host_bytes": found.host_bytes,
            "host_parts": found.host_parts,
            "cost": asdict(found.cost),
        },
    }


def planned_tensors(row: dict[str, Any]) -> int | None:
    """Of runs before the planner traced, by formula."""
    planned = row.get("planned", {})
    allocated: int | None = planned.get("allocated_bytes", planned.get("gpu_bytes"))
    return allocated


def timed_step(
    prepared: PreparedTraining, training: TrainingConfig, step: int, device: torch.device, micro_batches: MicroBatches
) -> tuple[float, float]:
    """Loss and seconds. Weights that are still on their way back when it ends arrive within the next step."""
    began = time.perf_counter()
    batch = training_batch(
        dataset().train.tokens,
        batch_size=training.batch_size,
        sequence_length=training.sequence_length,
        seed=training.seed,
        step=step,
    )
    result = train_step(
        prepared.model,
        prepared.optimizer,
        prepared.scaler,
        [batch],
        training,
        step,
        device=device,
        micro_batches=micro_batches,
        by_block=prepared.by_block,
    )
    loss = result.cross_entropy.item()
    synchronizer(device)()
    return loss, time.perf_counter() - began


@cache
def dataset() -> TokenDataset:
    """The text, opened once."""
    return prepare_dataset(DATA)


def memory_figures(device: torch.device) -> dict[str, Any]:
    """The allocator's peaks since training was prepared, and the host's memory: pinned, resident, the most resident."""
    figures: dict[str, Any] = {
        "host": {
            "resident_bytes": psutil.Process().memory_info().rss,
            "peak_resident_bytes": peak_resident_bytes(),
            **host_tensors(),
        }
    }
    if device.type == "cuda":
        figures["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        figures["allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        figures["out_of_memory_events"] = torch.cuda.memory_stats(device).get("num_ooms", 0)
    return figures


def host_tensors() -> dict[str, int]:
    """Bytes of host memory for a device, and those of it that the driver has pinned."""
    storages = [storage for reference in list(host._made_here.values()) if (storage := reference()) is not None]
    pinned = sum(storage.nbytes() for storage in storages if torch.cuda.is_available() and storage.is_pinned())
    return {"for_device_bytes": sum(storage.nbytes() for storage in storages), "pinned_bytes": pinned}


def in_words(row: dict[str, Any]) -> str:
    """A cell in one line, for whoever waits."""
    speed = f"{row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else "no speed"
    judged = f"{row['judged_bytes'] / GB:.2f} GB by the driver" if row["judged_bytes"] else "no GPU"
    died = f", died ({row['died']})" if "died" in row else ""
    return f"{row.get('strategy', 'nothing chosen')}; {speed}, {judged}, {row['process_seconds']:.0f} s{died}"


def table(document: dict[str, Any]) -> str:
    """The cells, as Markdown, in the columns that any of them has something for."""
    cells = document["cells"]
    figures = [figures_of(row, cells) for row in cells.values() if not row["cell"]["like"]]
    columns = [name for name in figures[0] if any(row[name] for row in figures)] if figures else []
    lines = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in figures)]
    shown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    others = [
        other_pieces(row)
        for row in cells.values()
        if row["cell"]["like"] and "tokens_per_second" in row and not is_alike(cells, row)
    ]
    if others:
        shown += f"\n\nInside the GPU in other micro-batches: {'; '.join(others)}."
    return f"{shown}\n\n<sub>[cells](benchmarks/results/gpu/frugal.json): {source(document)}</sub>"


def figures_of(row: dict[str, Any], cells: dict[str, Any]) -> dict[str, str]:
    """A row by its columns."""
    cell = row["cell"]
    name = cell["name"]
    died = row["died"].replace("|", "/") if "died" in row else ""
    return {
        "model, tokens a step": f"`{cell['preset']}`, {cell['tokens']:,}" + (", clipped" if cell["clips"] else ""),
        "cap": f"{cell['cap_bytes'] / GB:g} GB",
        "by the driver": gigabytes(row.get("judged_bytes")),
        "tensors, planned": f"{gigabytes(row.get('allocated_bytes'))}, {gigabytes(planned_tensors(row))}",
        "on the host": gigabytes(row.get("host", {}).get("peak_resident_bytes")),
        "at once": pieces(row) + (", replayed" if row.get("training", {}).get("cuda_graphs") else ""),
        "tokens/s": died or speed(row),
        "inside the GPU": ratio(row, cells.get(name + INSIDE)),
        "there, recomputing": ratio(row, cells.get(name + INSIDE + RECOMPUTING)),
        "loss": losses(row, cells.get(name + INSIDE)),
    }


def is_alike(cells: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether a row inside the GPU is of the micro-batches of its counterpart."""
    like: dict[str, Any] = cells.get(row["cell"]["like"], {})
    return like.get("micro_batch_rows") == row.get("micro_batch_rows")


def pieces(row: dict[str, Any]) -> str:
    """Rows and tokens of a micro-batch."""
    return f"{row.get('micro_batch_rows', '')} x {row['cell']['length']:,}"


def other_pieces(row: dict[str, Any]) -> str:
    """Such a row in words."""
    cell = row["cell"]
    again = ", recomputing" if cell["fixed"].get("checkpointing") != "none" else ""
    memory = gigabytes(row["judged_bytes"])
    return f"`{cell['preset']}`, {cell['tokens']:,}{again}, {pieces(row)}: {speed(row)} tokens/s in {memory}"


def gigabytes(num_bytes: int | None) -> str:
    """Empty where nothing is known."""
    return "" if num_bytes is None else f"{num_bytes / GB:.2f} GB"


def speed(row: dict[str, Any]) -> str:
    """Tokens a second."""
    return f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else ""


def ratio(row: dict[str, Any], inside: dict[str, Any] | None) -> str:
    """Training inside the GPU in the same micro-batches, what it needs, and the share of its speed that is kept."""
    if inside is not None and inside.get("micro_batch_rows") != row.get("micro_batch_rows") and "died" not in inside:
        return ""  # that is no comparison
    if inside is None or "tokens_per_second" not in inside or "tokens_per_second" not in row:
        return inside["died"] if inside is not None and "died" in inside else ""
    kept = row["tokens_per_second"] / inside["tokens_per_second"]
    needs = f" in {gigabytes(inside['judged_bytes'])}" if inside["judged_bytes"] else ""
    return f"{speed(inside)}{needs}: {kept:.0%}"


def losses(row: dict[str, Any], inside: dict[str, Any] | None) -> str:
    """Of the first step and the last; and of the last that training inside the GPU has done too."""
    ours, theirs = row.get("losses") or [], (inside or {}).get("losses") or []
    if not ours:
        return ""
    last = min(len(ours), len(theirs))
    beside = f"; at step {last} {ours[last - 1]:.3f}, inside {theirs[last - 1]:.3f}" if last else ""
    return f"{ours[0]:.2f} to {ours[-1]:.2f} in {len(ours)} steps{beside}"


def source(document: dict[str, Any]) -> str:
    """Machine, commit and torch of a result."""
    environment = document["environment"]
    if environment is None:
        return "nothing ran"
    hardware = environment["hardware"]
    name = hardware["gpu"]["name"] if hardware["gpu"] else f"{hardware['cpu']}, {hardware['threads']} threads"
    commits = dict.fromkeys(row["commit"] for row in document["cells"].values() if row.get("commit"))
    return f"{name}, commit {', '.join(commits)}, torch {environment['packages']['torch']}"


if __name__ == "__main__":
    main()
