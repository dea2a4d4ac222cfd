"""How long a step takes of the two whose loss is compared at equal time."""

import statistics
import time
from pathlib import Path

import torch

from quality_study.cells import Cell
from quality_study.contestants import CONTESTANTS, build
from quality_study.studies import STUDIES
from quality_study.training import batches_of, text_of, training_of
from resnet_bk.training.optimizer import build_optimizer
from resnet_bk.training.step import build_scaler, train_step

TIMED = ("ours", "attention")
TURNS, STEPS, WARM_UP = 5, 8, 8


def step_seconds(study_name: str, data: Path | None, device: str, threads: int) -> dict[str, float]:
    """The median over turns of each one's seconds for a training step, taken in turns in one process."""
    torch.set_num_threads(threads)
    study = STUDIES[study_name]
    text = text_of(study, data)
    batch = batches_of(study, text, seed=0)
    training = training_of(study, Cell(study=study_name, contestant=TIMED[0], rate=1e-3, seed=0), steps=study.steps)
    shape = {**study.shape, "vocab_size": text.vocab_size, "dropout": study.dropouts[-1]}
    ready = {}
    for name in TIMED:
        model = build(CONTESTANTS[name], shape, seed=0).to(device).train()
        ready[name] = model, build_optimizer(model, training), build_scaler(model.device, training.precision)
    seconds: dict[str, list[float]] = {name: [] for name in TIMED}
    for turn in range(-1, TURNS):
        for name, parts in ready.items():
            began = _now(device)
            for step in range(WARM_UP if turn < 0 else STEPS):
                train_step(*parts, [batch(step)], training, step)
            if turn >= 0:
                seconds[name].append((_now(device) - began) / STEPS)
    return {name: statistics.median(found) for name, found in seconds.items()}


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()
