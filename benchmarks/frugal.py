"""What each way to train needs and costs on a CPU: memory by part, the planner's word for it, time, and the loss.

    python benchmarks/frugal.py --out benchmarks/results/cpu/frugal.json [--quick]

Every strategy of resnet_bk.memory.strategy as `resnet-bk train` runs it, in float32 and with bf16 on the device, and
the most frugal one with moments in bf16 too. Bytes are those of live tensors, each one watched; what would wait on the
host beside a GPU is counted apart. Nothing is timed before the losses are right: those of strategies that compute the
same must be equal bit for bit, and those in half types near plain training's.

Then how much of the activations checkpointing saves, over the depth.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_bk.bench.contestants import build_model
from resnet_bk.environment import describe_environment
from resnet_bk.files import write_json
from resnet_bk.frugal.gradients import HostGradient
from resnet_bk.frugal.host import is_host_memory
from resnet_bk.frugal.optimizer import OffloadedAdamW
from resnet_bk.memory.activations import TrainingShape
from resnet_bk.memory.parameters import count_parameters
from resnet_bk.memory.plan import activation_parts
from resnet_bk.memory.strategy import STRATEGIES, Strategy
from resnet_bk.memory.tracking import TensorTracker
from resnet_bk.models import ResNetBKConfig
from resnet_bk.planner.devices import this_cpu
from resnet_bk.planner.predict import Prediction, predict
from resnet_bk.training.config import DataConfig, TrainingConfig
from resnet_bk.training.data import TokenDataset, prepare_dataset, training_batch
from resnet_bk.training.step import train_step
from resnet_bk.training.strategy import PreparedTraining, prepare_training, training_fields

CPU = torch.device("cpu")
SEED = 0
PLAIN = STRATEGIES[0]
POLICIES = ("none", "selective", "full", "offload")
# Nats by which a loss in half types may differ from plain training's at any of the steps that are compared.
TOLERANCE = 0.02
# The learning rate is whole from the third step on, so that a wrong update would show.
RATE, WARMUP_STEPS = 1e-3, 2
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_experts": 4,
    "num_resolvent_heads": 4,
    "vocab_size": 4096,
}
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured."""

    num_layers: int
    depths: tuple[int, ...]
    batch_size: int
    sequence_length: int
    steps: int
    rounds: int


FULL = Size(num_layers=8, depths=(2, 4, 8, 16), batch_size=8, sequence_length=256, steps=4, rounds=4)
QUICK = Size(num_layers=2, depths=(2, 4), batch_size=2, sequence_length=64, steps=2, rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it works")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    document = measure(QUICK if arguments.quick else FULL)
    write_json(arguments.out, document)
    print(f"\n{table(document)}\n\n{depth_table(document)}")


def measure(size: Size) -> dict[str, Any]:
    """All of it, as what is written."""
    dataset = prepare_dataset(DataConfig(data="stdlib", tokenizer="byte"), on_progress=print)
    config = model_config(size.num_layers)
    subjects = {}
    document: dict[str, Any] = {
        "environment": describe_environment(),
        "threads": torch.get_num_threads(),
        "model": config.own_fields(),
        "parameters": count_parameters(config).total,
        "batch_size": size.batch_size,
        "sequence_length": size.sequence_length,
        "steps": size.steps,
        "tolerance": TOLERANCE,
        "counter": "bytes of live tensors, each one watched; memory for the host counted apart",
    }
    began = time.perf_counter()
    for strategy in ways_to_train():
        subject = subjects[strategy.name] = Subject.build(strategy, config, size, dataset)
        subject.watch_first_steps()
        print(f"{time.perf_counter() - began:4.0f} s: {strategy.name}, {subject.in_words()}", flush=True)
    check_losses(list(subjects.values()))
    measure_times(subjects, size.rounds)
    document["strategies"] = [subject.row() for subject in subjects.values()]
    print(f"{time.perf_counter() - began:4.0f} s: timed", flush=True)
    subjects.clear()
    document["depths"] = [depth_row(depth, half, size, dataset) for half in (False, True) for depth in size.depths]
    document["layer"] = [layer_row(document["depths"], half, size) for half in (False, True)]
    print(f"{time.perf_counter() - began:4.0f} s: depths", flush=True)
    return document


def model_config(num_layers: int) -> ResNetBKConfig:
    """The measured model at some depth."""
    return ResNetBKConfig.from_preset("tiny", **MODEL, num_layers=num_layers)


def ways_to_train() -> Iterator[Strategy]:
    """Plain training, each strategy in float32, and each as it is, in half precision."""
    in_fp32 = [
        replace(strategy, name=f"{strategy.name}, fp32", half=False, half_weights=False)
        for strategy in STRATEGIES
        if strategy.checkpointing != "none"
    ]
    for ways in ([PLAIN, *in_fp32], STRATEGIES[1:]):
        yield from ways
        yield replace(ways[-1], name=f"{ways[-1].name}, bf16 moments", half_moments=True)


class PeakParts(TensorTracker):
    """A tracker that tells activations from the gradients that parameters have.

    ``peak_activations`` is the most there ever was beyond those and what was there at ``begin``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gradient_bytes = self.gradient_bytes_at_peak = self.most_gradient_bytes = 0
        self.peak_activations = self._before = 0

    def watch_gradients(self, model: nn.Module) -> None:
        """After an offloading optimizer was made: its hooks come first, and gradients that they take do not count."""
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._has_gradient)

    def begin(self) -> None:
        """A step without gradients yet: its peak is the one that counts."""
        self.gradient_bytes = self.gradient_bytes_at_peak = self.most_gradient_bytes = 0
        self.peak_activations, self._before = 0, self.current_bytes
        self.reset_peak()

    def _has_gradient(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None and not isinstance(gradient, HostGradient) and not is_host_memory(gradient):
            self.gradient_bytes += gradient.nbytes
            self.most_gradient_bytes = max(self.most_gradient_bytes, self.gradient_bytes)

    def _count(self, key: int, num_bytes: int, on_host: bool) -> None:
        peak = self.peak_bytes
        super()._count(key, num_bytes, on_host)
        if self.peak_bytes > peak:
            self.gradient_bytes_at_peak = self.gradient_bytes
        beyond = self.current_bytes - self.gradient_bytes - self._before
        self.peak_activations = max(self.peak_activations, beyond)


@dataclass(kw_only=True)
class Subject:
    """One strategy: a model in training, and what has been found out about it."""

    strategy: Strategy
    prepared: PreparedTraining
    training: TrainingConfig
    batches: list[Batch]
    plan: Prediction
    tracker: PeakParts
    memory: dict[str, int]
    losses: list[float]
    samples: list[float]
    cpu_samples: list[float]

    @classmethod
    def build(cls, strategy: Strategy, config: ResNetBKConfig, size: Size, dataset: TokenDataset) -> "Subject":
        """Fresh weights, the same for all; all memory that training takes is watched from the beginning."""
        training = training_config(strategy, size)
        model = build_model(config, SEED).train()
        tracker = PeakParts()
        with tracker:
            tracker.include([*model.parameters(), *model.buffers()])
            prepared = prepare_training(model, training, CPU)
        tracker.watch_gradients(model)
        return cls(
            strategy=strategy,
            prepared=prepared,
            training=training,
            batches=[batch_of(dataset, size, step) for step in range(size.steps)],
            plan=plan_of(strategy, config, size),
            tracker=tracker,
            memory={},
            losses=[],
            samples=[],
            cpu_samples=[],
        )

    def step(self, step: int) -> float:
        """One training step; the loss before it."""
        prepared, batch = self.prepared, self.batches[step % len(self.batches)]
        arguments = (prepared.model, prepared.optimizer, prepared.scaler, [batch], self.training, step)
        result = train_step(*arguments, by_block=prepared.by_block)
        return result.cross_entropy.item()

    def finish(self) -> None:
        """Returns when an update that goes on beside what comes next is done: what comes next is another's."""
        if isinstance(self.prepared.optimizer, OffloadedAdamW):
            self.prepared.optimizer.synchronize()

    def watch_first_steps(self) -> None:
        """Memory of the second step, which is the first that has moments from its beginning, and all losses."""
        tracker, optimizer = self.tracker, self.prepared.optimizer
        with tracker:
            self.losses.append(self.step(0))
            optimizer.zero_grad(set_to_none=True)
            tracker.include(self.batches[1])
            gc.collect()  # what the first step has left in cycles
            tracker.begin()
            self.losses.append(self.step(1))
            # The first step's batch is here for later steps: it is none of this one's.
            other_batch = sum(tensor.nbytes for tensor in self.batches[0])
            peak, host, gradients = tracker.peak_bytes, tracker.peak_host_bytes, tracker.gradient_bytes_at_peak
            peak -= other_batch
            optimizer.zero_grad(set_to_none=True)
            resident = tracker.current_bytes - other_batch
        moments = sum(
            tensor.nbytes
            for state in optimizer.state.values()
            for tensor in state.values()
            if isinstance(tensor, Tensor) and not is_host_memory(tensor)
        )
        batch = sum(tensor.nbytes for tensor in self.batches[1])
        weights = resident - moments - batch
        self.memory = {
            "peak": peak,
            "weights": weights,
            "gradients": gradients,
            "most_gradients": tracker.most_gradient_bytes,
            "moments": moments,
            "activations": peak - weights - moments - gradients,
            "host": host,
        }
        self.losses += [self.step(step) for step in range(2, len(self.batches))]

    def in_words(self) -> str:
        """For whoever waits."""
        return f"{self.memory['peak'] / 1e6:.1f} MB, loss {self.losses[0]:.4f} to {self.losses[-1]:.4f}"

    def row(self) -> dict[str, Any]:
        """What is written."""
        besides = ("process", "tensors of the step", "freed, and kept by malloc")
        planned_host = sum(size for name, size in self.plan.host_parts.items() if name not in besides)
        return {
            "name": self.strategy.name,
            "training": training_fields(self.strategy, "bf16"),
            "bytes": self.memory,
            "planned": self.plan.footprint.tensor_bytes,
            "planner_error": self.plan.footprint.tensor_bytes / self.memory["peak"] - 1,
            "planned_host": planned_host,
            "planner_host_error": planned_host / self.memory["host"] - 1 if self.memory["host"] else None,
            "losses": self.losses,
            "samples": self.samples,
            "seconds": statistics.median(self.samples),
            "cpu_samples": self.cpu_samples,
            "cpu_seconds": statistics.median(self.cpu_samples),
        }


def training_config(strategy: Strategy, size: Size) -> TrainingConfig:
    """A configuration that is this strategy."""
    return TrainingConfig(
        batch_size=size.batch_size,
        sequence_length=size.sequence_length,
        seed=SEED,
        learning_rate=RATE,
        warmup_steps=WARMUP_STEPS,
        **training_fields(strategy, "bf16"),
    )


def plan_of(strategy: Strategy, config: ResNetBKConfig, size: Size) -> Prediction:
    """The planner's word, by a trace."""
    return predict(config, training_config(strategy, size), this_cpu())


def batch_of(dataset: TokenDataset, size: Size, step: int) -> Batch:
    """Bytes of Python's standard library."""
    tokens, length = dataset.train.tokens, size.sequence_length
    return training_batch(tokens, batch_size=size.batch_size, sequence_length=length, seed=SEED, step=step)


def check_losses(subjects: list[Subject]) -> None:
    """Raises AssertionError unless every strategy learns what it should, at every step."""
    plain = subjects[0].losses
    first_of_kind: dict[tuple[bool, ...], Subject] = {}
    for subject in subjects:
        strategy = subject.strategy
        # Strategies with the same of these do the same arithmetic: where things wait changes no bit.
        kind = (strategy.half, strategy.half_weights, strategy.half_moments)
        model = first_of_kind.setdefault(kind, subject)
        assert subject.losses == model.losses, f"{strategy.name} differs from {model.strategy.name}"
        worst = max(abs(ours - theirs) for ours, theirs in zip(subject.losses, plain, strict=True))
        assert worst <= TOLERANCE, f"{strategy.name} is {worst:.3f} nats away from plain training"
        assert kind != (False, False, False) or worst == 0


def measure_times(subjects: dict[str, Subject], rounds: int) -> None:
    """A step of each in turns, forth and back, so that a slow moment of the machine hits all alike."""
    for number in range(rounds):
        for subject in list(subjects.values()) if number % 2 == 0 else reversed(list(subjects.values())):
            gc.collect()
            step = len(subject.losses) + len(subject.samples)
            # The process's own time too, which does not grow when others use the machine.
            began, cpu_began = time.perf_counter(), time.process_time()
            subject.step(step)
            subject.finish()
            subject.samples.append(time.perf_counter() - began)
            subject.cpu_samples.append(time.process_time() - cpu_began)


def depth_row(depth: int, half: bool, size: Size, dataset: TokenDataset) -> dict[str, Any]:
    """Activations of each way of checkpointing at one depth, and the share that it saves."""
    found = {policy: activations_of(policy, depth, half, size, dataset) for policy in POLICIES}
    saved = {
        policy: {what: 1 - figures[what] / found["none"][what] for what in figures} for policy, figures in found.items()
    }
    return {"num_layers": depth, "precision": "bf16" if half else "fp32", "bytes": found, "saved": saved}


def activations_of(policy: Any, depth: int, half: bool, size: Size, dataset: TokenDataset) -> dict[str, int]:
    """Bytes of one forward and backward beyond weights and the gradients of weights.

    ``kept`` waits for backward when the forward pass has ended; ``peak`` is the most there ever is, with logits and
    with what backward computes again.
    """
    strategy = Strategy(name=policy, half=half, checkpointing=policy)
    training = training_config(strategy, size)
    model = build_model(model_config(depth), SEED).train()
    prepare_training(model, training, CPU)
    inputs, targets = batch_of(dataset, size, 0)
    tracker = PeakParts()
    tracker.watch_gradients(model)
    with tracker:
        tracker.include([*model.parameters(), *model.buffers(), inputs, targets])
        tracker.begin()
        before = tracker.current_bytes
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = model(inputs, shift_labels=targets, use_cache=False).loss
        kept = tracker.current_bytes - before
        loss.backward()
    return {"kept": kept, "peak": tracker.peak_activations}


def layer_row(rows: list[dict[str, Any]], half: bool, size: Size) -> dict[str, Any]:
    """What one more layer adds, and the share of it that is saved: where a deep model's share tends to."""
    shallow, deep = [row for row in rows if row["precision"] == ("bf16" if half else "fp32")][-2:]
    added = {
        policy: {
            what: (deep["bytes"][policy][what] - shallow["bytes"][policy][what])
            / (deep["num_layers"] - shallow["num_layers"])
            for what in ("kept", "peak")
        }
        for policy in POLICIES
    }
    saved = {policy: {what: 1 - x / added["none"][what] for what, x in row.items()} for policy, row in added.items()}
    planned = {policy: planned_layer(policy, half, size) for policy in POLICIES}
    planned_saved = {policy: 1 - num_bytes / planned["none"] for policy, num_bytes in planned.items()}
    return {
        "precision": deep["precision"],
        "bytes": added,
        "saved": saved,
        "planned": planned,
        "planned_saved": planned_saved,
    }


def planned_layer(policy: Any, half: bool, size: Size) -> int:
    """What one more layer adds by the planner, whose selective checkpointing is a GPU's."""
    shape = TrainingShape(batch_size=size.batch_size, sequence_length=size.sequence_length)
    strategy = Strategy(name=policy, half=half, checkpointing=policy)
    fewer, more = (
        sum(part.num_bytes for part in activation_parts(model_config(depth), shape, strategy)) for depth in (8, 9)
    )
    return more - fewer


def table(document: dict[str, Any]) -> str:
    """What each strategy needs and costs, as Markdown."""
    parts = ("weights", "gradients (most)", "moments", "activations")
    lines = [
        "| training | on the device, MB | " + " | ".join(parts) + " | on the host | planner | time of a step | loss |",
        "| --- " * 10 + "|",
    ]
    plain = document["strategies"][0]
    for row in document["strategies"]:
        found = row["bytes"]
        slower, busier = (ratio(row[samples], plain[samples]) for samples in ("samples", "cpu_samples"))
        host = "" if row["planner_host_error"] is None else f" ({row['planner_host_error']:+.0%})"
        cells = [
            row["name"],
            *(f"{found[part] / 1e6:.1f}" for part in ("peak", "weights")),
            f"{found['gradients'] / 1e6:.1f} ({found['most_gradients'] / 1e6:.1f})",
            *(f"{found[part] / 1e6:.1f}" for part in ("moments", "activations", "host")),
            f"{row['planner_error']:+.0%}{host}",
            f"{slower:.2f} ({busier:.2f})",
            f"{row['losses'][-1]:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    model, shown = document["model"], "\n".join(lines)
    shape = f"{document['batch_size']} x {document['sequence_length']}"
    return (
        f"{shown}\n\n<sub>[strategies](benchmarks/results/cpu/frugal.json): {document['parameters']:,} parameters, "
        f"{model['num_layers']} layers of {model['hidden_size']}, vocabulary {model['vocab_size']:,}, batch {shape}; "
        "parts at the peak; the planner's error for the device (and the host); time in plain training's (and the "
        f"processor's); loss of step {document['steps']}; {source(document)}</sub>"
    )


def ratio(samples: list[float], plain: list[float]) -> float:
    """The median over rounds."""
    return statistics.median(ours / theirs for ours, theirs in zip(samples, plain, strict=True))


def depth_table(document: dict[str, Any]) -> str:
    """What checkpointing saves of the activations, as Markdown."""
    policies = POLICIES[1:]
    lines = [
        "| layers | activations, MB: kept, peak | " + " | ".join(f"{name} saves" for name in policies) + " |",
        "| --- " * (2 + len(policies)) + "|",
    ]
    more = [{**row, "num_layers": "each more"} for row in document["layer"]]
    for row in sorted([*document["depths"], *more], key=lambda row: row["precision"], reverse=True):
        whole = row["bytes"]["none"]
        saved = (
            f"{row['saved'][name]['kept']:.0%} kept, {row['saved'][name]['peak']:.0%} of the peak" for name in policies
        )
        sizes = f"{whole['kept'] / 1e6:.1f}, {whole['peak'] / 1e6:.1f}"
        lines.append(f"| {row['num_layers']}, {row['precision']} | {sizes} | {' | '.join(saved)} |")
        if "planned" in row:
            saved = (f"{row['planned_saved'][name]:.0%} kept" for name in policies)
            whole = f"{row['planned']['none'] / 1e6:.1f}"
            lines.append(f"| each more, {row['precision']}, planned for a GPU | {whole} | {' | '.join(saved)} |")
    shown = "\n".join(lines)
    return (
        f"{shown}\n\n<sub>[depths](benchmarks/results/cpu/frugal.json): kept for backward when the forward pass has "
        "ended, and the peak with logits and what is computed again, both without weights and their gradients; on a "
        f"CPU selective checkpointing computes the experts' products again, which a GPU keeps; {source(document)}</sub>"
    )


def source(document: dict[str, Any]) -> str:
    """Machine, commit and torch of a result."""
    environment = document["environment"]
    name = f"{environment['hardware']['cpu']}, {document['threads']} threads"
    return f"{name}, commit {environment['commit']}, torch {environment['packages']['torch']}"


if __name__ == "__main__":
    main()
