"""The benchmark from Python, on any ``nn.Module`` with a loss: the same counting, timing and watching as the suite's.

A batch is a pair of tensors (x, y). A criterion is called as ``criterion(model(x), y)``, a model's ``.logits`` taken if
it has them; where a row of logits belongs to each of several class numbers in y, as in a language model, both are
flattened first. Without a criterion the loss is that of next tokens. Everything is measured where the model is asked to
be, on a CPU too. Times are in seconds, memory in bytes, FLOPs are 2 x multiply-adds.

>>> import torch
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
>>> counter = FLOPsCounter(model)
>>> counter.count(torch.randn(4, 8), torch.randn(4, 1), torch.nn.MSELoss()).forward
1152
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resnet_bk.bench import flops, memory, seeds, timing
from resnet_bk.bench.profiles import PROFILES
from resnet_bk.bench.statistics import summarize
from resnet_bk.bench.subject import Loss, Subject, language_model_loss, logits_of, synchronizer
from resnet_bk.heap import keep_freed_memory
from resnet_bk.memory.limits import is_out_of_memory
from resnet_bk.memory.tracking import training_tensors
from resnet_bk.schema import (
    Comparison,
    CurvePoint,
    Failure,
    FailureKind,
    FlopsResult,
    MemoryResult,
    Summary,
    TimingResult,
)
from resnet_bk.training.config import Precision, TrainingConfig
from resnet_bk.training.step import choose_device

Criterion = Callable[[Tensor, Tensor], Tensor]
OptimizerFunction = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Loader = Iterable[Any]
"""Batches (x, y), as a DataLoader or a list has them."""
Batch = tuple[Tensor, Tensor]

MODEL, BASELINE = "model", "baseline"
RESAMPLES = 2000
LONGEST_MESSAGE = 300


@dataclass(frozen=True, kw_only=True)
class FlopCount:
    """FLOPs of one batch; ``by_module`` of both passes, by the module's name, its parts' included."""

    forward: int
    backward: int
    by_module: dict[str, int]

    @property
    def total(self) -> int:
        """Of both passes."""
        return self.forward + self.backward


class FLOPsCounter:
    """Counts a model's FLOPs while it runs. Each count replaces the one before."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.reset()

    def reset(self) -> None:
        """Forgets what was counted."""
        self.forward_flops = self.backward_flops = 0
        self.by_module: dict[str, int] = {}

    def count(self, inputs: Tensor, targets: Tensor | None = None, criterion: Criterion | None = None) -> FlopCount:
        """Counts forward and backward of one batch, in training mode, where ``inputs`` are; leaves no gradients.

        Without targets backward is that of the output's sum.

        Raises:
            UncountedOperatorError: an operator has no formula, and may do products.
        """
        loss = _sum_of_output if targets is None else loss_of(criterion)
        batch = inputs, inputs if targets is None else targets
        with _as_before(self.model):
            subject = Subject.of(self.model, _training(batch), batch, loss, _no_optimizer(self.model))
            counted = flops.count_passes(subject)
            with flops.flop_counter() as counter:
                subject.forward().backward()  # type: ignore[no-untyped-call]
        self.forward_flops, self.backward_flops = counted.forward, counted.backward
        root = type(self.model).__name__
        self.by_module = {
            name.removeprefix(f"{root}."): sum(counts.values())
            for name, counts in counter.get_flop_counts().items()
            if name not in ("Global", root)
        }
        return FlopCount(forward=counted.forward, backward=counted.backward, by_module=self.by_module)

    def get_total_flops(self) -> int:
        """Of both passes of the last count."""
        return self.forward_flops + self.backward_flops

    def get_report(self) -> dict[str, float]:
        """The last count, and in units of 10^9."""
        found = {
            "forward": self.forward_flops,
            "backward": self.backward_flops,
            "total": self.get_total_flops(),
        }
        return {f"{name}_flops": value for name, value in found.items()} | {
            f"{name}_gflops": value / 1e9 for name, value in found.items()
        }


class TimingBenchmark:
    """Wall-clock seconds of one model's phases, the device's work included.

    Two models that are timed one after the other met different moments of the machine: to compare them take
    :class:`ComprehensiveBenchmark`, which has them take turns.
    """

    def __init__(self, device: str = "auto", warmup_iters: int = 10, measure_iters: int = 100) -> None:
        """
        Args:
            device: where models and batches are moved to: ``auto``, ``cpu`` or ``cuda``.
            warmup_iters: runs that do not count.
            measure_iters: runs that do.

        Raises:
            ValueError: no run would count.
        """
        if measure_iters < 1 or warmup_iters < 0:
            raise ValueError(f"warmup_iters {warmup_iters}, measure_iters {measure_iters}; give at least 0 and 1")
        self.device = choose_device(device)
        keep_freed_memory(self.device)
        self.warmup_iters, self.measure_iters = warmup_iters, measure_iters

    def benchmark_forward(self, model: nn.Module, x: Tensor) -> Summary:
        """The forward pass in evaluation mode, without gradients."""
        x = x.to(self.device)
        with _as_before(model), torch.no_grad():
            model.to(self.device).eval()
            return self._measure(lambda: None, lambda _: logits_of(model, x))

    def benchmark_backward(self, model: nn.Module, x: Tensor, y: Tensor, criterion: Criterion | None = None) -> Summary:
        """The backward pass alone, in training mode; leaves no gradients."""
        x, y = x.to(self.device), y.to(self.device)
        loss = loss_of(criterion)

        def forward() -> Tensor:
            model.zero_grad(set_to_none=True)
            return loss(model, x, y)

        with _as_before(model):
            model.to(self.device).train()
            return self._measure(forward, lambda found: found.backward())

    def benchmark_full_step(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        optimizer: torch.optim.Optimizer,
        criterion: Criterion | None = None,
    ) -> Summary:
        """Forward, backward and ``optimizer``, which is the model's own: its weights are trained on this batch."""
        x, y = x.to(self.device), y.to(self.device)
        loss = loss_of(criterion)

        def step(_: object) -> None:
            optimizer.zero_grad(set_to_none=True)
            loss(model, x, y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        with _as_before(model):
            model.to(self.device).train()
            return self._measure(lambda: None, step)

    def _measure(self, prepare: Callable[[], Any], timed: Callable[[Any], object]) -> Summary:
        synchronize = synchronizer(self.device)
        samples = []
        with timing.without_garbage_collection():
            for _ in range(self.warmup_iters + self.measure_iters):
                samples.append(timing.seconds_of(partial(timed, prepare()), synchronize))
        return summarize(samples[self.warmup_iters :], resamples=RESAMPLES)


@dataclass(frozen=True, kw_only=True)
class ForwardMemory:
    """Bytes before a forward pass, the most during it, and after it, its output let go."""

    initial: int
    peak: int
    final: int

    @property
    def activations(self) -> int:
        """What the pass took at its worst moment."""
        return self.peak - self.initial


@dataclass(frozen=True, kw_only=True)
class BackwardMemory:
    """Bytes after the forward pass, the most during backward, after it, and those of the gradients."""

    after_forward: int
    peak: int
    final: int
    gradients: int


class MemoryProfiler:
    """Bytes allocated on the device: on a GPU by CUDA's allocator, on a CPU those of live tensors, each one watched."""

    def __init__(self, device: str = "auto") -> None:
        self.device = choose_device(device)

    def profile_forward(self, model: nn.Module, x: Tensor) -> ForwardMemory:
        """A forward pass without gradients, in the mode in which the model is."""
        x = x.to(self.device)
        model.to(self.device)
        with torch.no_grad(), memory.counting(self.device, _resident(model, x)) as counter:
            counter.reset_peak()
            initial = counter.current_bytes
            logits_of(model, x)
            return ForwardMemory(initial=initial, peak=counter.peak_bytes, final=counter.current_bytes)

    def profile_backward(
        self, model: nn.Module, x: Tensor, y: Tensor, criterion: Criterion | None = None
    ) -> BackwardMemory:
        """Forward and backward in the mode in which the model is; leaves no gradients."""
        x, y = x.to(self.device), y.to(self.device)
        model.to(self.device).zero_grad(set_to_none=True)
        with memory.counting(self.device, _resident(model, x, y)) as counter:
            loss = loss_of(criterion)(model, x, y)
            after_forward = counter.current_bytes
            counter.reset_peak()
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
            peak, final = counter.peak_bytes, counter.current_bytes
        gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
        model.zero_grad(set_to_none=True)
        return BackwardMemory(after_forward=after_forward, peak=peak, final=final, gradients=gradients)


@dataclass(frozen=True, kw_only=True)
class ComprehensiveConfig:
    """How two models are compared.

    Without a ``criterion`` the loss is that of next tokens. ``optimizer`` makes one of parameters; the default is AdamW
    at ``learning_rate``. Gradients are clipped at ``max_grad_norm``, None does not. Times are of ``rounds`` rounds in
    turns, over ``builds`` fresh copies of both models. Both are trained for ``steps`` steps from the weights that they
    come with, once for each of ``seeds``, which are the order of a loader that shuffles, and evaluated ``evaluations``
    times.
    """

    criterion: Criterion | None = None
    optimizer: OptimizerFunction | None = None
    learning_rate: float = 1e-3
    max_grad_norm: float | None = 1.0
    precision: Precision = "fp32"
    device: str = "auto"
    warmup_rounds: int = 5
    rounds: int = 30
    builds: int = 3
    steps: int = 100
    evaluations: int = 5
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        for name in ("rounds", "builds", "steps", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number of at least 1")
        if self.builds > self.rounds:
            raise ValueError(f"{self.rounds} rounds are fewer than {self.builds} builds; give each a round at least")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}; give at least one, and none twice")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Losses of one training; those of validation begin with the weights as they came."""

    contestant: str
    seed: int
    train: list[CurvePoint]
    validation: list[CurvePoint]

    @property
    def final_loss(self) -> float | None:
        """The last validation loss; None if it is not a number."""
        return self.validation[-1].loss


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """All trainings. ``difference`` is the baseline's last validation loss less the model's, above 0 in the model's
    favour; None where seeds cannot carry a claim: one seed, or seeds that all gave the same."""

    curves: list[Curve]
    difference: Comparison | None


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """The baseline's figure over the model's, above 1 in the model's favour; None where one of both is missing."""

    flops: float | None = None
    forward: Comparison | None = None
    backward: Comparison | None = None
    step: Comparison | None = None
    memory: float | None = None


@dataclass(frozen=True, kw_only=True)
class ComprehensiveResult:
    """What was measured; a part that failed is None and has its reason in ``failures``."""

    flops: FlopsResult | None = None
    timing: TimingResult | None = None
    memory: MemoryResult | None = None
    convergence: Convergence | None = None
    failures: dict[str, Failure] = field(default_factory=dict)

    @property
    def ratios(self) -> Ratios:
        """The five figures that every report names."""
        phases = {} if self.timing is None else {row.phase: row.ratio for row in self.timing.ratios}
        return Ratios(
            flops=None if self.flops is None else self.flops.ratio,
            forward=phases.get("forward"),
            backward=phases.get("backward"),
            step=phases.get("step"),
            memory=None if self.memory is None else self.memory.ratio,
        )

    @property
    def findings(self) -> list[str]:
        """What may be claimed, in sentences; differences that may be chance are none."""
        return list(_findings(self))


class ComprehensiveBenchmark:
    """Compares two models on the same data. They are copied: neither is changed."""

    def __init__(self, model: nn.Module, baseline_model: nn.Module, config: ComprehensiveConfig | None = None) -> None:
        self.models = {MODEL: model, BASELINE: baseline_model}
        self.config = config or ComprehensiveConfig()
        self.device = choose_device(self.config.device)
        keep_freed_memory(self.device)

    def run_all_benchmarks(self, train_loader: Loader, val_loader: Loader) -> ComprehensiveResult:
        """FLOPs, times and memory of the first batch, then training on one loader and validating on the other.

        Raises:
            ValueError: a loader is empty, or has something else than pairs of tensors.
        """
        batch = self._on_device(next(_batches("train_loader", train_loader)))
        next(_batches("val_loader", val_loader))
        parts: dict[str, Callable[[], Any]] = {
            "flops": lambda: self.benchmark_flops(batch),
            "timing": lambda: self.benchmark_timing(batch),
            "memory": lambda: self.benchmark_memory(batch),
            "convergence": lambda: self.benchmark_convergence(train_loader, val_loader),
        }
        found: dict[str, Any] = {}
        failures: dict[str, Failure] = {}
        for name, measure in parts.items():
            try:
                found[name] = measure()
            except Exception as error:  # any model's; the other parts are still worth having
                text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST_MESSAGE]
                kind: FailureKind = "out of memory" if is_out_of_memory(error) else "error"
                failures[name] = Failure(kind=kind, message=text)
        return ComprehensiveResult(**found, failures=failures)

    def benchmark_flops(self, batch: Batch) -> FlopsResult:
        """FLOPs of a step of one batch."""
        models = [flops.model_flops(key, self._subject(key, batch)) for key in self.models]
        ours, baseline = models
        return FlopsResult(
            models=models, ratio=baseline.step / ours.step, forward_ratio=baseline.forward / ours.forward
        )

    def benchmark_timing(self, batch: Batch) -> TimingResult:
        """Seconds of each phase, the models in turns."""
        config = self.config
        profile = replace(
            PROFILES["quick"],
            warmup_rounds=config.warmup_rounds,
            rounds=config.rounds,
            builds=config.builds,
            decode_tokens=max(1, min(16, batch[0].shape[-1] // 2)),
        )
        builders = {key: partial(self._subject, key, batch) for key in self.models}
        return timing.measure_timing(builders, profile, compared=(MODEL, BASELINE))

    def benchmark_memory(self, batch: Batch) -> MemoryResult:
        """Bytes through a step, and what steps leave behind."""
        models = []
        for key in self.models:
            resident = memory.begin_peak_resident()
            models.append(memory.measure_model_memory(key, self._subject(key, batch), resident))
        found = memory.memory_result(models, self.device, compared=(MODEL, BASELINE))
        assert found is not None
        return found

    def benchmark_convergence(self, train_loader: Loader, val_loader: Loader) -> Convergence:
        """Both models on the very same batches."""
        curves: list[Curve] = []
        for seed in self.config.seeds:
            batches = _first_batches(train_loader, self.config.steps, seed)
            curves += [self._train(key, seed, batches, val_loader) for key in self.models]
        return Convergence(curves=curves, difference=_difference(curves))

    def _train(self, key: str, seed: int, batches: list[Batch], val_loader: Loader) -> Curve:
        steps = self.config.steps
        subject = self._subject(key, self._on_device(batches[0]))
        evaluated = {round(steps * part / self.config.evaluations) for part in range(self.config.evaluations + 1)}
        torch.manual_seed(seed)
        train: list[CurvePoint] = []
        validation = [_point(0, 0, 0.0, self._validate(subject, val_loader))]
        tokens, seconds = 0, 0.0
        for step, batch in enumerate(batches, start=1):
            clock = timing.Clock(synchronizer(self.device))
            subject.inputs, subject.targets = self._on_device(batch)
            loss = subject.forward()
            loss.backward()  # type: ignore[no-untyped-call]
            subject.update()
            seconds += clock.lap()
            tokens += flops.positions(subject)
            train.append(_point(step, tokens, seconds, loss.item()))
            if step in evaluated:
                validation.append(_point(step, tokens, seconds, self._validate(subject, val_loader)))
        return Curve(contestant=key, seed=seed, train=train, validation=validation)

    @torch.no_grad()
    def _validate(self, subject: Subject, val_loader: Loader) -> float:
        """Mean loss over the loader, each batch by the number of its rows."""
        subject.model.eval()
        total, rows = 0.0, 0
        for batch in _batches("val_loader", val_loader):
            other = replace(subject, inputs=batch[0].to(self.device), targets=batch[1].to(self.device))
            total += len(batch[0]) * other.forward().item()
            rows += len(batch[0])
        subject.model.train()
        return total / rows

    def _subject(self, key: str, batch: Batch) -> Subject:
        model = copy.deepcopy(self.models[key]).to(self.device)
        make = self.config.optimizer
        optimizer = None if make is None else make(list(model.parameters()))
        training = replace(
            _training(batch),
            learning_rate=self.config.learning_rate,
            max_grad_norm=self.config.max_grad_norm,
            precision=self.config.precision,
        )
        return Subject.of(model, training, batch, loss_of(self.config.criterion), optimizer)

    def _on_device(self, batch: Batch) -> Batch:
        return batch[0].to(self.device), batch[1].to(self.device)


def loss_of(criterion: Criterion | None) -> Loss:
    """What a subject's loss is with this criterion."""
    if criterion is None:
        return language_model_loss

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        output = logits_of(model, x)
        a_class_for_each_row = not y.is_floating_point() and output.ndim > 2 and output[..., 0].numel() == y.numel()
        return criterion(output.flatten(0, -2), y.flatten()) if a_class_for_each_row else criterion(output, y)

    return loss


def _sum_of_output(model: nn.Module, x: Tensor, _: Tensor) -> Tensor:
    return logits_of(model, x).sum()


def _training(batch: Batch) -> TrainingConfig:
    shape = batch[0].shape
    return TrainingConfig(batch_size=shape[0], sequence_length=shape[1] if len(shape) > 1 else 1)


def _no_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.0)


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Gives the mode of each module back, and leaves no gradients."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        model.zero_grad(set_to_none=True)


def _resident(model: nn.Module, *batch: Tensor) -> Iterator[Tensor]:
    yield from training_tensors(model, _no_optimizer(model))
    yield from batch


def _batches(name: str, loader: Loader) -> Iterator[Batch]:
    found = False
    for batch in loader:
        pair = isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
        if not pair:
            raise ValueError(f"{name} has a {type(batch).__name__} for a batch; give pairs of tensors (x, y)")
        found = True
        yield batch[0], batch[1]
    if not found:
        raise ValueError(f"{name} has no batch; give at least one (and no iterator, which is empty at the second pass)")


def _first_batches(loader: Loader, steps: int, seed: int) -> list[Batch]:
    """As many as there are steps, of as many passes as it takes; kept, so that both models have the same."""
    torch.manual_seed(seed)  # which a shuffling loader takes its order from
    passes = itertools.chain.from_iterable(_batches("train_loader", loader) for _ in itertools.count())
    return list(itertools.islice(passes, steps))


def _point(step: int, tokens: int, seconds: float, loss: float) -> CurvePoint:
    return CurvePoint(step=step, tokens=tokens, seconds=seconds, loss=loss if abs(loss) < float("inf") else None)


def _difference(curves: list[Curve]) -> Comparison | None:
    losses: dict[str, dict[int, float | None]] = {key: {} for key in (MODEL, BASELINE)}
    for curve in curves:
        losses[curve.contestant][curve.seed] = curve.final_loss
    repeated = all(len(set(found.values())) == 1 for found in losses.values())
    # Runs that are the same to the last bit are one run, however many seeds they were given.
    if repeated and losses[MODEL] != losses[BASELINE]:
        return None
    return seeds.compare({"loss": (losses[BASELINE], losses[MODEL])}).get("loss")


def _findings(result: ComprehensiveResult) -> Iterator[str]:
    ratios = result.ratios
    for name, ratio in (("forward", ratios.forward), ("backward", ratios.backward), ("a step", ratios.step)):
        if ratio is not None and ratio.claimed:
            slower, faster = (BASELINE, MODEL) if ratio.value > 1 else (MODEL, BASELINE)
            factors = sorted(1 / x if ratio.value < 1 else x for x in (ratio.value, ratio.low, ratio.high))
            low, value, high = factors
            yield f"In {name} the {slower} takes {value:.2f} ({low:.2f} to {high:.2f}) times as long as the {faster}."
    for name, exact in (("FLOPs in a step", ratios.flops), ("memory at the peak of a step", ratios.memory)):
        if exact is not None and exact != 1:
            more, less = (BASELINE, MODEL) if exact > 1 else (MODEL, BASELINE)
            yield f"The {more} needs {max(exact, 1 / exact):.2f} times the {less}'s {name}."
    for model in result.memory.models if result.memory else []:
        if model.grown_per_step > 0:
            grown = f"{model.grown_per_step:,.0f} bytes more"
            yield f"The {model.contestant} leaves {grown} behind with each step: it leaks."
    difference = result.convergence.difference if result.convergence else None
    if difference is not None and difference.claimed:
        better = MODEL if difference.value > 0 else BASELINE
        low, high = difference.low, difference.high
        sizes = f"{difference.value:+.4f} ({low:+.4f} to {high:+.4f})"
        yield f"The {better} ends with the lower validation loss; the baseline's less the model's is {sizes}."
    for name, failure in result.failures.items():
        yield f"There is no result of {name}: {failure.kind} ({failure.message})."
