"""Everything that needs a GPU, in one call of a few minutes: correctness first, then training, memory and time.

    python benchmarks/gpu.py --out benchmarks/results/gpu

Writes gpu.json (checks, losses, the planner against the allocator), bk_core.json and step.json (those scripts on the
GPU, the steps at preset 100m in bf16) and report.json (`resnet-bk bench` on the GPU). ``--only`` names what to do.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

import bk_core as bk_core_speed
import step as step_speed
from resnet_bk.bench.contestants import build_model, contestant_configs
from resnet_bk.bench.memory import measure_model_memory
from resnet_bk.bench.profiles import PROFILES
from resnet_bk.bench.stability import accuracy, largest_change_before
from resnet_bk.bench.subject import Subject, random_batch
from resnet_bk.bench.suite import BenchmarkConfig, run_benchmark
from resnet_bk.environment import describe_environment
from resnet_bk.files import write_json
from resnet_bk.ops import bk_core, bk_tunnel
from resnet_bk.ops.bk import choose_backend
from resnet_bk.training.config import DataConfig, TrainingConfig
from resnet_bk.training.data import TokenDataset, prepare_dataset, training_batch
from resnet_bk.training.optimizer import build_optimizer
from resnet_bk.training.step import build_scaler, train_step

STEPS = 200
DEVICE = torch.device("cuda")
DATA = DataConfig(data="stdlib", tokenizer="bpe:2048")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=["bk_core", "step", "gpu", "report"])
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[], object]] = {
        "bk_core": lambda: write_json(out / "bk_core.json", bk_core_speed.measure(DEVICE)),
        "gpu": lambda: measure_training_and_memory(out),
        "step": lambda: write_json(out / "step.json", step_speed.measure(DEVICE, "100m", "bf16")),
        "report": lambda: measure_report(out),
    }
    for name in arguments.only or parts:
        began = time.perf_counter()
        parts[name]()
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


def measure_training_and_memory(out: Path) -> None:
    """gpu.json, written as it grows."""
    document = {"environment": describe_environment(), "backend": choose_backend(DEVICE).name}
    dataset = prepare_dataset(DATA, on_progress=print)
    measures: dict[str, Callable[[], object]] = {
        "errors": measure_errors,
        "other_inputs": check_other_inputs,
        "training": lambda: measure_training(dataset),
        "memory": measure_planner,
    }
    for name, measure in measures.items():
        began = time.perf_counter()
        document[name] = measure()
        print(f"  {name}: {time.perf_counter() - began:.0f} s", flush=True)
        write_json(out / "gpu.json", document)


def measure_report(out: Path) -> None:
    """report.json of the quick benchmark, on this text and device."""
    config = BenchmarkConfig(
        profile=PROFILES["quick"], preset="seed", overrides={}, data=DATA, training=TrainingConfig(device="cuda")
    )
    run_benchmark(config, out, command=["bench", "--tokenizer", "bpe:2048", "--device", "cuda"], on_remark=print)


def measure_errors() -> list[dict[str, object]]:
    """float32 on the GPU against complex128, and causality of both models in float64."""
    points = [
        accuracy(causal=causal, length=length, eta=eta, potential=1.0, device=DEVICE)
        for causal in (True, False)
        for length in (1, 127, 1024)
        for eta in (1.0, 0.1)
    ]
    errors: list[dict[str, object]] = [vars(point) for point in points]
    for key, config in contestant_configs("seed", {"vocab_size": 2048}).items():
        change = largest_change_before(build_model(config, 0), config.vocab_size, DEVICE, config)
        errors.append({"model": key, "largest_change_before": change})
    return errors


def check_other_inputs() -> dict[str, float]:
    """Half types and the tunnelling regime against the CPU."""
    torch.manual_seed(0)
    v = torch.randn(3, 65, 4)
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        here, there = bk_core(v.to(dtype), 1j), bk_core(v.to(dtype).to(DEVICE), 1j)
        found[f"bk_core {dtype}"] = float((here - there.cpu()).abs().max())
    gap = torch.rand(3, 65, 4) * 1e-3
    found["bk_tunnel"] = float((bk_tunnel(gap) - bk_tunnel(gap.to(DEVICE)).cpu()).abs().max())
    return found


def measure_training(dataset: TokenDataset) -> list[dict[str, object]]:
    """Losses of both models in every precision: the same data, the same steps."""
    rows: list[dict[str, object]] = []
    for key, config in contestant_configs("seed", {"vocab_size": dataset.tokenizer.vocab_size}).items():
        for precision in ("fp32", "bf16", "fp16"):
            training = TrainingConfig(steps=STEPS, decay_steps=STEPS, learning_rate=3e-3, precision=precision)
            model = build_model(config, 0).to(DEVICE).train()
            optimizer, scaler = build_optimizer(model, training), build_scaler(DEVICE, precision)
            began = time.perf_counter()
            losses = []
            for step in range(STEPS):
                batch = training_batch(dataset.train.tokens, batch_size=20, sequence_length=128, seed=0, step=step)
                losses.append(train_step(model, optimizer, scaler, [batch], training, step).cross_entropy)
            nats = torch.stack(losses).tolist()
            rows.append(
                {
                    "model": key,
                    "precision": precision,
                    "first_loss": nats[0],
                    "last_20_mean": sum(nats[-20:]) / 20,
                    "steps_per_second": STEPS / (time.perf_counter() - began),
                }
            )
            print(rows[-1])
    return rows


def measure_planner() -> list[dict[str, object]]:
    """The planner's peak against the allocator's, fp32 and bf16."""
    rows: list[dict[str, object]] = []
    for preset, batch_size, length in (("seed", 20, 128), ("100m", 4, 512)):
        for precision in ("fp32", "bf16"):
            training = TrainingConfig(batch_size=batch_size, sequence_length=length, precision=precision)
            for key, config in contestant_configs(preset, {}).items():
                torch.cuda.empty_cache()
                subject = Subject.build(config, training, random_batch(config, batch_size, length, DEVICE))
                model = measure_model_memory(key, subject)
                assert model.predicted_peak is not None
                error = model.predicted_peak / model.peak_step - 1
                figures = msgspec.to_builtins(model)
                rows.append({"preset": preset, "precision": precision, "planner_error": error, **figures})
                print(preset, precision, key, f"{error:+.1%}")
                del subject
    return rows


if __name__ == "__main__":
    main()
