"""Tiny Shakespeare by characters in nanoGPT's setting for a CPU: every mixer, the same sweep, three seeds.

    python benchmarks/shakespeare.py --data tinyshakespeare.txt --out benchmarks/results/cpu/shakespeare

4 layers of width 128, context 64, 2,000 steps of 12 rows, AdamW with betas 0.9 and 0.99, one dense expert, tied
embeddings. As in nanoGPT the first 90% are trained on. Of the last 10%, the first half chooses the learning rate (by
the mean over the seeds) and the second half is what contestants are compared by; the loss over all of it is there to
compare with nanoGPT's published figure. Losses are means over whole windows of the context, all of them. Contestants
have as many parameters as attention with an MLP of 4 x width has, or fewer (by less than 1%).

Each cell (contestant, rate, seed) is a file; cells that are there are not run again. The summary is summary.json.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
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
SEEDS = (0, 1, 2)
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
        grid = [(name, rate, seed) for name in arguments.contestants for rate in RATES for seed in SEEDS]
        jobs = [pool.submit(run_cell, arguments.data, arguments.device, cells, *cell) for cell in grid]
        results = [job.result() for job in jobs]
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
        "setting": {"steps": STEPS, "rows": ROWS, "context": CONTEXT, "rates": RATES, "seeds": SEEDS, **SHAPE},
        "nanogpt_published_loss": NANOGPT_LOSS,
        "contestants": rows,
    }
    if {"resolvent", "attention"} <= set(rows):
        ours, theirs = rows["resolvent"], rows["attention"]
        error = (ours["test_loss_standard_error"] ** 2 + theirs["test_loss_standard_error"] ** 2) ** 0.5
        document["below_attention"] = theirs["test_loss"] - ours["test_loss"]
        document["below_attention_in_standard_errors"] = document["below_attention"] / error
    return document


def best_row(cells: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The contestant at the rate with the lowest mean of the loss that chooses."""
    by_rate = {
        rate: [cell for cell in cells if cell["contestant"] == name and cell["learning_rate"] == rate] for rate in RATES
    }
    choosing = {rate: statistics.mean(cell["choosing_loss"] for cell in mine) for rate, mine in by_rate.items()}
    best = min(choosing, key=lambda rate: choosing[rate])
    mine = by_rate[best]
    test = [cell["test_loss"] for cell in mine]
    return {
        "learning_rate": best,
        "choosing_loss_by_rate": choosing,
        "parameters": mine[0]["parameters"],
        "test_loss": statistics.mean(test),
        "test_loss_standard_error": statistics.stdev(test) / len(test) ** 0.5,
        "nanogpt_loss": statistics.mean(cell["nanogpt_loss"] for cell in mine),
        "seconds": statistics.mean(cell["seconds"] for cell in mine),
    }


if __name__ == "__main__":
    main()
