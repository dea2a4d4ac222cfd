"""One cell: one contestant of one study, trained at one setting with one seed."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quality_study.cells import Cell
from quality_study.contestants import CONTESTANTS, build
from quality_study.reading import loss_by_kind, loss_by_position, losses_by_window
from quality_study.studies import STUDIES, Study
from quality_study.tasks import Batch, Text, accuracy, characters, embedded
from resnet_bk.bench.cells import NotANumberError
from resnet_bk.models import ResNetBKForCausalLM
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.data import training_batch
from resnet_bk.training.evaluate import evaluate
from resnet_bk.training.optimizer import build_optimizer
from resnet_bk.training.step import build_scaler, train_step

BUCKETS = 16  # of positions
LONGER = 4  # times the training length, for the loss by position


def text_of(study: Study, data: Path | None) -> Text | None:
    """What a study reads, None for one that makes its rows up; ``data`` is Tiny Shakespeare."""
    if study.corpus is None:
        return None
    if study.corpus == "embedded":
        return embedded()
    assert data is not None
    return characters(data)


def training_of(study: Study, cell: Cell, *, steps: int) -> TrainingConfig:
    """As nanoGPT has it: AdamW with betas 0.9 and 0.99, a cosine to a tenth of the rate at the last step."""
    return TrainingConfig(
        steps=steps,
        decay_steps=steps,
        batch_size=study.rows,
        sequence_length=study.length,
        learning_rate=cell.rate,
        weight_decay=cell.weight_decay,
        warmup_steps=study.warmup_steps,
        beta2=0.99,
        seed=cell.seed,
        precision=study.precision,
    )


def run(cell: Cell, data: Path | None, device: str, threads: int) -> dict[str, Any]:
    """What the contestant came to: losses in nats a token, or shares of right answers."""
    torch.set_num_threads(threads)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    study = STUDIES[cell.study]
    text = text_of(study, data)
    vocab_size = (text or study.task).vocab_size
    lost = {"dropout": cell.dropout, "token_dropout": cell.token_dropout}
    shape = {**study.shape, "vocab_size": vocab_size, **lost}
    model = build(CONTESTANTS[cell.contestant], shape, cell.seed).to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = _train(model, study, cell, text)
    return {"parameters": parameters, "intermediate_size": model.config.intermediate_size, **found}


def _train(model: ResNetBKForCausalLM, study: Study, cell: Cell, text: Text | None) -> dict[str, Any]:
    steps = max(1, round(study.steps * cell.share))
    training = training_of(study, cell, steps=steps)
    optimizer, scaler = build_optimizer(model, training), build_scaler(model.device, training.precision)
    batch = batches_of(study, text, cell.seed)
    # Every loss that is asked for is of weights at that step; the best of them by what chooses is the model's.
    marks = {max(1, round(steps * (number + 1) / study.evaluations)) for number in range(study.evaluations)}
    curve: list[dict[str, float]] = []
    weights: dict[str, Tensor] = {}
    seconds, losses = 0.0, []
    model.train()
    began = time.perf_counter()
    for step in range(steps):
        result = train_step(model, optimizer, scaler, [batch(step)], training, step)
        losses.append(result.cross_entropy)
        if step + 1 in marks:
            nats = torch.stack(losses).mean().item()
            seconds += time.perf_counter() - began
            if not math.isfinite(nats):
                raise NotANumberError(f"the training loss is {nats} at step {step + 1}")
            curve.append({"step": step + 1, "seconds": seconds, "training": nats, **_losses(model, study, text)})
            losses.clear()
            if text is not None and curve[-1] is _best(curve):
                weights = {name: value.clone() for name, value in model.state_dict().items()}
            began = time.perf_counter()
    found: dict[str, Any] = {"steps": steps, "training_seconds": seconds, "curve": curve}
    if text is not None:
        model.load_state_dict(weights)
        best = _best(curve)
        found |= {name: best[name] for name in ("choosing", "test", "held_out")}
        found |= {"best_step": best["step"], **_read(model, study, text)}
    else:
        assert study.task is not None
        # The lower the better, as a loss.
        found["choosing"] = -accuracy(model, study.task, rows=64, batches=4, precision=study.precision, seed=1)
        found["answers"] = {
            name: accuracy(model, task, rows=rows, batches=batches, precision=study.precision)
            for name, task in study.tests.items()
            for rows, batches in [_amount(task)]
        }
    return found


def _best(curve: list[dict[str, float]]) -> dict[str, float]:
    """Where the model is taken: the earliest of the lowest losses that choose."""
    return min(curve, key=lambda point: point["choosing"])


def _read(model: ResNetBKForCausalLM, study: Study, text: Text) -> dict[str, Any]:
    """Beyond the mean loss in windows as training's."""
    test = text.test[: study.evaluated_tokens]
    parts = {"choosing": text.choosing[: study.evaluated_tokens], "test": test}
    long, precision = LONGER * study.length, study.precision
    return {
        "by_position": loss_by_position(model, test, length=long, buckets=BUCKETS, precision=precision),
        "by_window": {name: losses_by_window(model, part, study.length, precision) for name, part in parts.items()},
        "by_kind": loss_by_kind(model, test, text, study.length, precision),
    }


def _amount(task: Any) -> tuple[int, int]:
    """Rows and batches of a test: fewer of long ones."""
    length = task.batch(1, np.random.default_rng(0))[0].shape[1]
    rows = max(1, min(64, 65_536 // length))
    return rows, max(4, 256 // rows)


def batches_of(study: Study, text: Text | None, seed: int) -> Callable[[int], Batch]:
    """The batch of each step."""
    if text is not None:
        return lambda step: training_batch(
            text.train, batch_size=study.rows, sequence_length=study.length, seed=seed, step=step
        )
    task = study.task
    assert task is not None
    return lambda step: task.batch(study.rows, np.random.default_rng([seed, step]))


def _losses(model: ResNetBKForCausalLM, study: Study, text: Text | None) -> dict[str, float]:
    if text is None:
        return {}
    parts = {"choosing": text.choosing, "test": text.test}
    found = {
        name: evaluate(
            model,
            part,
            batch_size=128,
            sequence_length=study.length,
            max_tokens=study.evaluated_tokens,
            precision=study.precision,
        )
        for name, part in parts.items()
    }
    tokens = sum(evaluation.tokens for evaluation in found.values())
    held_out = sum(evaluation.loss * evaluation.tokens for evaluation in found.values()) / tokens
    return {name: evaluation.loss for name, evaluation in found.items()} | {"held_out": held_out}
