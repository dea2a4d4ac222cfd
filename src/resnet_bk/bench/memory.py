"""Section 3: bytes through one training step, beside what the planner says of it.

Each contestant has a process of its own. The step whose moments are told is a second one, when the optimizer's state is
there; three more follow, to see whether a step leaves more behind than the one before. On a GPU the CUDA allocator
counts; on a CPU every tensor is watched, so that the figures are the tensors' own and not the process's, which never
gives back. What the process holds is told apart: with the libraries and compiled kernels that a model loads when it
first runs, and with what watching takes.
"""

import contextlib
import copy
import gc
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import psutil
import torch
from torch import Tensor, nn

from resnet_bk.bench.cells import Cell, Outcomes, result_of
from resnet_bk.bench.contestants import BASELINE, OURS
from resnet_bk.bench.setup import Setup
from resnet_bk.bench.subject import Subject, language_model_loss
from resnet_bk.environment import peak_resident_bytes
from resnet_bk.heap import give_back_freed_memory
from resnet_bk.memory.strategy import Strategy
from resnet_bk.memory.tracking import TensorTracker, training_tensors
from resnet_bk.models import ResNetBKForCausalLM
from resnet_bk.planner import module
from resnet_bk.planner.devices import device_for
from resnet_bk.planner.footprint import Footprint
from resnet_bk.planner.predict import predict
from resnet_bk.planner.trace import TracedPart
from resnet_bk.schema import MemoryPart, MemoryResult, ModelMemory
from resnet_bk.training.micro_step import AUTOCAST_DTYPES

NAME = "memory"
RESULT = ModelMemory
# Steps between the two looks at what is live. The first follows the step that is told, which is the second.
STEPS_OF_GROWTH = 2
# Written to clear_refs, it has Linux begin the mark of the most resident memory anew.
FORGET_PEAK = "5"


def cells(setup: Setup, _: Outcomes) -> list[Cell]:
    """One for each contestant."""
    return [Cell(section=NAME, name=key, weight=4) for key in setup.contenders]


def measure(setup: Setup, cell: Cell) -> ModelMemory:
    """One contestant."""
    batch = setup.batch()  # and with it the text, and on a GPU what the driver takes: none of them are the model's
    resident = begin_peak_resident()
    model = setup.contenders[cell.name].with_seed(setup.training.seed)
    return measure_model_memory(cell.name, Subject.of(model, setup.training, batch), resident)


def assemble(setup: Setup, outcomes: Outcomes) -> MemoryResult | None:
    """Those that were measured."""
    found = [result_of(outcomes, key) for key in setup.contenders]
    return memory_result([model for model in found if model is not None], setup.device)


def memory_result(
    models: list[ModelMemory], device: torch.device, *, compared: tuple[str, str] = (OURS, BASELINE)
) -> MemoryResult | None:
    """The section of these models; None without any. ``compared`` are ours and the baseline."""
    if not models:
        return None
    peaks = {model.contestant: model.peak_step for model in models}
    on_gpu = device.type == "cuda"
    ours, baseline = (peaks.get(key) for key in compared)
    return MemoryResult(
        counter="bytes allocated by CUDA's caching allocator" if on_gpu else "bytes of live tensors, each one watched",
        models=models,
        ratio=baseline / ours if ours and baseline else None,
    )


class Counter(Protocol):
    """What knows how many bytes are allocated, and the most that were since ``reset_peak``."""

    @property
    def current_bytes(self) -> int:
        """Now."""

    @property
    def peak_bytes(self) -> int:
        """The most."""

    def reset_peak(self) -> None:
        """Begins anew from what there is now."""


@contextlib.contextmanager
def counting(device: torch.device, resident: Iterable[Tensor]) -> Iterator[Counter]:
    """Counts a device's bytes; ``resident`` are the tensors that exist already, which only a CPU must be told of."""
    if device.type == "cuda":
        yield _CudaCounter(device)
        return
    with TensorTracker() as tracker:
        tracker.include(resident)
        yield tracker


def peak_bytes(subject: Subject) -> int:
    """The most that one training step holds at once, the model and its moments included."""
    subject.step()
    with counting(subject.device, _resident(subject)) as counter:
        subject.step()
        return counter.peak_bytes


def measure_model_memory(key: str, subject: Subject, resident: int | None = None) -> ModelMemory:
    """One contestant: bytes at each moment of its second step, and by how much later ones grow.

    ``resident`` is what the process held before it had the model, by default what it holds now.
    """
    resident = begin_peak_resident() if resident is None else resident
    template = _template(subject.model)
    with counting(subject.device, _resident(subject)) as counter:
        after_load = counter.current_bytes
        subject.step()
        moments = _moments_of_a_step(subject, counter)
        optimizer = _state_bytes(subject.optimizer)
        reserved = torch.cuda.max_memory_reserved(subject.device) if subject.device.type == "cuda" else None
        grown = _growth(subject, counter)
    process = peak_resident_bytes() - resident
    prediction = _prediction(subject, template)
    return ModelMemory(
        contestant=key,
        after_load=after_load,
        optimizer=optimizer,
        after_forward=moments.after_forward,
        peak_forward=moments.peak_forward,
        peak_backward=moments.peak_backward,
        peak_step=moments.peak_step,
        reserved=reserved,
        process=max(0, process),
        grown_per_step=grown,
        predicted_peak=prediction.peak if prediction else None,
        predicted_reserved=prediction.reserved if prediction else None,
        parts=prediction.parts if prediction else [],
    )


def begin_peak_resident() -> int:
    """Bytes of this process in RAM; where Linux lets it, ``peak_resident_bytes`` counts from here on."""
    gc.collect()
    give_back_freed_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text(FORGET_PEAK, encoding="ascii")
    return int(psutil.Process().memory_info().rss)


@dataclass(frozen=True, kw_only=True)
class _Moments:
    after_forward: int
    peak_forward: int
    peak_backward: int
    peak_step: int


def _moments_of_a_step(subject: Subject, counter: Counter) -> _Moments:
    gc.collect()
    counter.reset_peak()
    loss = subject.forward()
    after_forward, peak_forward = counter.current_bytes, counter.peak_bytes
    counter.reset_peak()
    loss.backward()  # type: ignore[no-untyped-call]
    peak_backward = counter.peak_bytes
    del loss
    counter.reset_peak()
    subject.update()
    return _Moments(
        after_forward=after_forward,
        peak_forward=peak_forward,
        peak_backward=peak_backward,
        peak_step=max(peak_forward, peak_backward, counter.peak_bytes),
    )


def _growth(subject: Subject, counter: Counter) -> float:
    """Bytes that a step leaves behind beyond what the one before did."""

    def live_after(steps: int) -> int:
        for _ in range(steps):
            subject.step()
        gc.collect()  # what is only waiting to be collected is no leak
        return counter.current_bytes

    before = live_after(1)
    return (live_after(STEPS_OF_GROWTH) - before) / STEPS_OF_GROWTH


@dataclass(frozen=True, kw_only=True)
class _Prediction:
    peak: int
    reserved: int | None
    parts: list[MemoryPart]

    @classmethod
    def of(cls, footprint: Footprint, parts: Iterable[TracedPart], *, on_gpu: bool) -> "_Prediction":
        sums: dict[str, int] = {}
        for part in parts:
            sums[part.kind] = sums.get(part.kind, 0) + part.num_bytes
        return cls(
            peak=footprint.allocated_bytes if on_gpu else footprint.tensor_bytes,
            reserved=footprint.reserved_bytes if on_gpu else None,
            parts=[MemoryPart(kind=kind, num_bytes=size) for kind, size in sorted(sums.items(), key=lambda x: -x[1])],
        )


def _prediction(subject: Subject, template: nn.Module | None) -> _Prediction | None:
    on_gpu = subject.device.type == "cuda"
    if isinstance(subject.model, ResNetBKForCausalLM) and subject.loss is language_model_loss:
        batch_size, length = subject.inputs.shape
        training = replace(subject.training, batch_size=batch_size, sequence_length=length, micro_batch_size=None)
        found = predict(subject.model.config, training, device_for(subject.device))
        return _Prediction.of(found.footprint, found.parts, on_gpu=on_gpu)
    try:
        return None if template is None else _prediction_by_trace(subject, template, on_gpu=on_gpu)
    except Exception:
        # Whatever a model of somebody else's does with tensors that have no numbers: it is then not to be traced.
        return None


def _prediction_by_trace(subject: Subject, template: nn.Module, *, on_gpu: bool) -> _Prediction:
    machine, half_type = device_for(subject.device), AUTOCAST_DTYPES.get(subject.training.precision)
    job = module.Job.of(
        lambda: _without_numbers(template),
        (subject.inputs, subject.targets),
        lambda parameters: _optimizer_like(subject.optimizer, parameters),
        device=machine,
        loss=lambda model, batch: subject.loss(model, *batch),
        half_type=half_type,
    )
    way = Strategy(name="as it was measured", half=half_type is not None)
    found = module.predict_way(job, way, machine)
    return _Prediction.of(found.footprint, found.parts, on_gpu=on_gpu)


def _optimizer_like(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    accepted = inspect.signature(type(optimizer)).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    return type(optimizer)(list(parameters), **options)


def _template(model: nn.Module) -> nn.Module | None:
    """What the planner makes models from. Made before the first step, after which a model may hold what has no copy."""
    try:
        with torch.device("meta"):
            return _without_numbers(model)
    except (RuntimeError, TypeError):  # of modules that cannot be copied
        return None


def _without_numbers(model: nn.Module) -> nn.Module:
    """A copy whose tensors are new and empty ones, on the device or of the kind that is the default now."""
    memo: dict[int, object] = {}
    for part in model.modules():
        for value in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
            if isinstance(value, Tensor) and id(value) not in memo:
                empty = torch.empty(value.shape, dtype=value.dtype)
                learns = value.requires_grad
                memo[id(value)] = nn.Parameter(empty, learns) if isinstance(value, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _resident(subject: Subject) -> Iterator[Tensor]:
    # One after the other: a list would keep gradients alive.
    yield from training_tensors(subject.model, subject.optimizer)
    yield from (subject.inputs, subject.targets)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    state = (value for entry in optimizer.state.values() for value in entry.values())
    return sum(value.untyped_storage().nbytes() for value in state if isinstance(value, Tensor))


class _CudaCounter:
    """The caching allocator's figures under the tracker's names."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset_peak()

    @property
    def current_bytes(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    @property
    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
