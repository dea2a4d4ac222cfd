"""Tiny Shakespeare by characters in nanoGPT's setting for a CPU: every mixer, the same sweep, nine seeds.

    python benchmarks/shakespeare.py --data tinyshakespeare.txt --out runs/shakespeare

4 layers of width 128, context 64, 2,000 steps of 12 rows, AdamW with betas 0.9 and 0.99, one dense expert, tied
embeddings. As in nanoGPT the first 90% are trained on. Of the last 10%, the first half chooses the learning rate, by
the mean over three seeds; six more are trained at that rate, and the second half is what contestants are compared by,
over all nine. The loss over all of it is there to compare with nanoGPT's published figure. Losses are means over whole
windows of the context, all of them. Contestants have as many parameters as attention with an MLP of 4 x width has, or
fewer (by less than 1%).

Each cell (contestant, rate, seed) is a file; cells that are there are not run again. The summary is summary.json.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quality_study.tasks import characters
from resnet_bk.environment import describe_environment
from resnet_bk.files import read_json, write_json
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.models.matching import total_parameters
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.data import training_batch
from resnet_bk.training.evaluate import evaluate
from resnet_bk.training.optimizer import build_optimizer
from resnet_bk.training.step import build_scaler, train_step

NANOGPT_LOSS = 1.88  # its README's figure for this setting, on the last 10%
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_layers": 4,
    "num_experts": 1,
    "num_attention_heads": 4,
    "num_resolvent_heads": 4,
    "num_bk_heads": 4,
    "tie_word_embeddings": True,
    "router_aux_loss_coef": 0.0,
    # No head needs to remember more than a window holds.
    "resolvent_longest_memory": 64.0,
}
CONTESTANTS: dict[str, dict[str, Any]] = {
    "resolvent": {"mixer": "resolvent", "conv_size": 4},
    "attention": {"mixer": "attention", "conv_size": 4},
    "attention-plain": {"mixer": "attention", "conv_size": 0},
    "resolvent-plain": {"mixer": "resolvent", "conv_size": 0},
    "resolvent-scattering": {"mixer": "resolvent", "conv_size": 4, "resolvent_regime": "scattering"},
    "resolvent-vector": {"mixer": "resolvent", "conv_size": 4, "resolvent_state": "vector"},
    "bk": {"mixer": "bk", "conv_size": 0},
}
RATES = (2e-3, 4e-3, 8e-3)
CHOOSING_SEEDS, SEEDS = tuple(range(3)), tuple(range(9))
STEPS, ROWS, CONTEXT = 2000, 12, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the text")
    parser.add_argument("--out", type=Path, required=True, help="folder of the cells")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    arguments = parser.parse_args()
    cells = arguments.out / "cells"
    cells.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(arguments.workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        run = partial(pool.map, partial(run_cell, arguments.data, arguments.device, cells))
        sweep = [(name, rate, seed) for name in arguments.contestants for rate in RATES for seed in CHOOSING_SEEDS]
        results = list(run(*zip(*sweep, strict=True)))
        chosen = {name: best_rate(choosing_losses(results, name)) for name in arguments.contestants}
        more = [(name, rate, seed) for name, rate in chosen.items() for seed in SEEDS if seed not in CHOOSING_SEEDS]
        results += run(*zip(*more, strict=True))
    document = summary(results)
    write_json(arguments.out / "summary.json", document)
    print(json.dumps(document, indent=1))


def run_cell(data: Path, device: str, folder: Path, name: str, rate: float, seed: int) -> dict[str, Any]:
    """Trains one contestant, or reads what it gave before."""
    path = folder / f"{name}-{rate:g}-{seed}.json"
    if path.exists():
        cell: dict[str, Any] = read_json(path)
        return cell
    cell = {
        "contestant": name,
        "learning_rate": rate,
        "seed": seed,
        **train(data, CONTESTANTS[name], rate, seed, device),
    }
    write_json(path, cell)
    print(f"{name}, rate {rate:g}, seed {seed}: {cell['test_loss']:.4f} ({cell['seconds']:.0f} s)", flush=True)
    return cell


def train(data: Path, fields: dict[str, Any], rate: float, seed: int, device: str) -> dict[str, Any]:
    """Losses in nats a character."""
    text = characters(data)
    training = TrainingConfig(
        steps=STEPS,
        decay_steps=STEPS,
        batch_size=ROWS,
        sequence_length=CONTEXT,
        learning_rate=rate,
        warmup_steps=100,
        beta2=0.99,
        seed=seed,
    )
    torch.manual_seed(seed)
    model = ResNetBKForCausalLM(no_larger_than_attention({**SHAPE, **fields, "vocab_size": text.vocab_size}))
    model = model.to(device).train()
    optimizer, scaler = build_optimizer(model, training), build_scaler(model.device, training.precision)
    began = time.perf_counter()
    for step in range(STEPS):
        batch = training_batch(text.train, batch_size=ROWS, sequence_length=CONTEXT, seed=seed, step=step)
        train_step(model, optimizer, scaler, [batch], training, step)
    seconds = time.perf_counter() - began
    losses = {
        name: evaluate(model, part, batch_size=256, sequence_length=CONTEXT).loss
        for name, part in (
            ("choosing_loss", text.choosing),
            ("test_loss", text.test),
            ("nanogpt_loss", np.concatenate([text.choosing, text.test])),
        )
    }
    return {
        **losses,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "intermediate_size": model.config.intermediate_size,
        "seconds": seconds,
        "environment": describe_environment(),
    }


def no_larger_than_attention(fields: dict[str, Any]) -> ResNetBKConfig:
    """The widest experts with which the model has no more parameters than plain attention with 4 x width has."""
    plain = {**fields, "mixer": "attention", "conv_size": 0, "intermediate_size": 4 * fields["hidden_size"]}
    limit = total_parameters(ResNetBKConfig(**plain))
    config = ResNetBKConfig(**fields)
    config.intermediate_size = 1
    per_width = 2 * config.num_experts * config.hidden_size * config.num_layers
    config.intermediate_size = 1 + (limit - total_parameters(config)) // per_width
    return config


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard error over the seeds at each contestant's best rate, and how far ours is below attention."""
    rows = {name: best_row(cells, name) for name in CONTESTANTS if any(cell["contestant"] == name for cell in cells)}
    document = {
        "environment": describe_environment(),
        "trained_on": cells[0]["environment"],
        "setting": {
            "steps": STEPS,
            "rows": ROWS,
            "context": CONTEXT,
            "rates": RATES,
            "choosing_seeds": CHOOSING_SEEDS,
            "seeds": SEEDS,
            **SHAPE,
        },
        "nanogpt_published_loss": NANOGPT_LOSS,
        "contestants": rows,
    }
    if {"resolvent", "attention"} <= set(rows):
        ours, theirs = rows["resolvent"], rows["attention"]
        document["below_attention"] = {
            key: below(ours[key], ours[f"{key}_standard_error"], theirs[key], theirs[f"{key}_standard_error"])
            for key in ("test_loss", "nanogpt_loss")
        }
    return document


def below(ours: float, our_error: float, theirs: float, their_error: float) -> dict[str, float]:
    """How far ours is below theirs, and how many standard errors of that difference."""
    difference = theirs - ours
    return {"by": difference, "standard_errors": difference / (our_error**2 + their_error**2) ** 0.5}


def best_row(cells: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The contestant at the rate with the lowest mean of the loss that chooses."""
    choosing = choosing_losses(cells, name)
    best = best_rate(choosing)
    mine = [cell for cell in cells if cell["contestant"] == name and cell["learning_rate"] == best]
    losses = {key: [cell[key] for cell in mine] for key in ("test_loss", "nanogpt_loss")}
    return {
        "learning_rate": best,
        "choosing_loss_by_rate": choosing,
        "parameters": mine[0]["parameters"],
        **{key: statistics.mean(values) for key, values in losses.items()},
        **{f"{key}_standard_error": statistics.stdev(values) / len(values) ** 0.5 for key, values in losses.items()},
        "by_seed": {cell["seed"]: {key: cell[key] for key in losses} for cell in mine},
        "seconds": statistics.mean(cell["seconds"] for cell in mine),
    }


def choosing_losses(cells: list[dict[str, Any]], name: str) -> dict[float, float]:
    """Of each rate, the mean over the seeds that choose."""
    return {
        rate: statistics.mean(
            cell["choosing_loss"]
            for cell in cells
            if (cell["contestant"], cell["learning_rate"]) == (name, rate) and cell["seed"] in CHOOSING_SEEDS
        )
        for rate in RATES
    }


def best_rate(losses: dict[float, float]) -> float:
    return min(losses, key=lambda rate: losses[rate])


if __name__ == "__main__":
    main()
