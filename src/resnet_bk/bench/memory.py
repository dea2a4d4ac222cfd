"""Section 3: bytes of tensors through one training step, beside what the planner says of it.

The step measured is a second one, when the optimizer's moments are there. On a GPU the CUDA allocator counts; on a CPU
every tensor is watched, so that the figures are the tensors' own and not the process's, which never gives back.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Protocol

import psutil
import torch
from torch import Tensor

from resnet_bk.bench.contestants import BASELINE, OURS, Subject
from resnet_bk.memory.tracking import TensorTracker, training_tensors
from resnet_bk.planner.devices import device_for
from resnet_bk.planner.predict import predict
from resnet_bk.schema import MemoryResult, ModelMemory


class _Counter(Protocol):
    @property
    def current_bytes(self) -> int: ...

    @property
    def peak_bytes(self) -> int: ...

    def reset_peak(self) -> None: ...


def measure_memory(subjects: Mapping[str, Subject]) -> MemoryResult:
    """Every contestant in turn."""
    models = [measure_model_memory(key, subject) for key, subject in subjects.items()]
    peaks = {model.contestant: model.peak_step for model in models}
    on_gpu = next(iter(subjects.values())).model.device.type == "cuda"
    return MemoryResult(
        counter="bytes allocated by CUDA's caching allocator" if on_gpu else "bytes of live tensors, each one watched",
        models=models,
        ratio=peaks[BASELINE] / peaks[OURS],
        process=psutil.Process().memory_info().rss,
    )


def peak_bytes(subject: Subject) -> int:
    """The most that one training step holds at once, the model and its moments included."""
    subject.step()
    if subject.model.device.type == "cuda":
        counter = _CudaCounter(subject.model.device)
        subject.step()
        return int(counter.peak_bytes)
    with TensorTracker() as tracker:
        tracker.include(_resident(subject))
        subject.step()
    return int(tracker.peak_bytes)


def measure_model_memory(key: str, subject: Subject) -> ModelMemory:
    """One contestant: bytes at each moment of its second step."""
    subject.step()
    if subject.model.device.type == "cuda":
        figures = _phases(subject, _CudaCounter(subject.model.device))
    else:
        with TensorTracker() as tracker:
            tracker.include(_resident(subject))
            figures = _phases(subject, tracker)
    batch_size, sequence_length = subject.input_ids.shape
    on_gpu = subject.model.device.type == "cuda"
    training = replace(subject.training, batch_size=batch_size, sequence_length=sequence_length, micro_batch_size=None)
    prediction = predict(subject.model.config, training, device_for(subject.model.device))
    found = prediction.footprint
    parts: dict[str, int] = {}
    for part in prediction.parts:
        parts[part.kind] = parts.get(part.kind, 0) + part.num_bytes
    largest = max(parts, key=lambda name: parts[name])
    state = [value for entry in subject.optimizer.state.values() for value in entry.values()]
    return ModelMemory(
        contestant=key,
        parameters=_bytes(subject.model.parameters()),
        optimizer=_bytes(value for value in state if isinstance(value, Tensor)),
        **figures,
        predicted_peak=found.allocated_bytes if on_gpu else found.tensor_bytes,
        largest_part=largest,
        largest_part_bytes=parts[largest],
    )


def _phases(subject: Subject, counter: _Counter) -> dict[str, int]:
    counter.reset_peak()
    loss = subject.forward()
    after_forward, peak_forward = counter.current_bytes, counter.peak_bytes
    counter.reset_peak()
    loss.backward()  # type: ignore[no-untyped-call]
    peak_backward = counter.peak_bytes
    del loss
    counter.reset_peak()
    subject.update()
    return {
        "after_forward": after_forward,
        "peak_forward": peak_forward,
        "peak_backward": peak_backward,
        "peak_step": max(peak_forward, peak_backward, counter.peak_bytes),
    }


def _resident(subject: Subject) -> list[Tensor]:
    return [*training_tensors(subject.model, subject.optimizer), subject.input_ids, subject.targets]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


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
