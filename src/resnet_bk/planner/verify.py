"""The proof of a prediction: one real training step on the present device, measured."""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from resnet_bk.environment import peak_resident_bytes
from resnet_bk.frugal.gradients import HostGradient
from resnet_bk.frugal.micro_batches import MicroBatches
from resnet_bk.memory.tracking import TensorTracker, training_tensors
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.planner.predict import Prediction
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.step import train_step
from resnet_bk.training.strategy import prepare_training

Step = Callable[[], object]
Job = Callable[[], tuple[nn.Module, torch.optim.Optimizer, Step, list[Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Bytes of a real step. ``host_bytes`` is the most resident memory, less what the process had after training a tiny
    model, with libraries loaded and kernels compiled.

    Without a GPU the tensors are those of the CPU, each one watched; ``allocated_bytes`` and ``reserved_bytes``, of
    torch's allocator on a GPU, are None then.
    """

    parts: dict[str, int]
    tensor_bytes: int | None
    allocated_bytes: int | None
    reserved_bytes: int | None
    host_bytes: int


def verify_training(config: ResNetBKConfig, training: TrainingConfig, device: torch.device) -> Measured:
    """Runs two steps of ``train_step`` on random tokens; the second is measured, which is the first with moments."""
    tiny = ResNetBKConfig.from_preset("tiny", mixer=config.mixer, vocab_size=64)
    small = replace(training, batch_size=2, micro_batch_size=1, sequence_length=8)
    _, _, step, _ = _job(tiny, small, device)()
    step()
    step()
    del step
    return verify_step(_job(config, training, device), device)


def _job(config: ResNetBKConfig, training: TrainingConfig, device: torch.device) -> Job:
    def prepare() -> tuple[nn.Module, torch.optim.Optimizer, Step, list[Tensor]]:
        torch.manual_seed(training.seed)
        prepared = prepare_training(ResNetBKForCausalLM(config).train(), training, device)
        batches = [_batch(config, training) for _ in range(training.gradient_accumulation_steps)]
        count = iter(range(2))
        rows = training.micro_batch_size or training.batch_size

        def step() -> None:
            train_step(
                prepared.model,
                prepared.optimizer,
                prepared.scaler,
                batches,
                training,
                next(count),
                device=device,
                micro_batches=MicroBatches(rows, smallest=rows),  # what does not fit is to be seen, and not mended
                by_block=prepared.by_block,
            )

        return prepared.model, prepared.optimizer, step, [tokens for batch in batches for tokens in batch]

    return prepare


def verify_step(prepare: Job, device: torch.device) -> Measured:
    """The same for any training step; ``prepare`` is as for ``trace_step``, with real tensors."""
    before = psutil.Process().memory_info().rss
    model, optimizer, step, batch = prepare()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        figures: dict[str, Any] = {
            "tensor_bytes": None,
            "allocated_bytes": torch.cuda.max_memory_allocated(device),
            "reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    else:
        gc.collect()
        with TensorTracker() as tracker:
            tracker.include(_on_device(training_tensors(model, optimizer)))
            tracker.include(batch)
            step()
        figures = {"tensor_bytes": tracker.peak_bytes, "allocated_bytes": None, "reserved_bytes": None}
    return Measured(parts=_parts(model, optimizer), host_bytes=peak_resident_bytes() - before, **figures)


def rows(prediction: Prediction, measured: Measured) -> list[tuple[str, int, int]]:
    """What was predicted beside what was measured: name, predicted, measured bytes."""
    found = prediction.footprint
    table = [
        (kind, sum(part.num_bytes for part in prediction.parts if part.kind == kind), size)
        for kind, size in measured.parts.items()
    ]
    if measured.tensor_bytes is not None:
        table.append(("all tensors at the peak", found.tensor_bytes, measured.tensor_bytes))
    if measured.allocated_bytes is not None and measured.reserved_bytes is not None:
        table.append(("allocated at the peak", found.allocated_bytes, measured.allocated_bytes))
        table.append(("reserved", found.reserved_bytes, measured.reserved_bytes))
    over_bare = prediction.host_bytes - prediction.host_parts["process"]
    return [*table, ("resident memory beyond a bare process", over_bare, measured.host_bytes)]


def _batch(config: ResNetBKConfig, training: TrainingConfig) -> tuple[Tensor, Tensor]:
    size = (training.batch_size, training.sequence_length)
    return torch.randint(config.vocab_size, size), torch.randint(config.vocab_size, size)


def _on_device(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    # One after the other, and not by a name of their own: that would keep old gradients alive.
    return (tensor for tensor in tensors if not isinstance(tensor, HostGradient))


def _parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """What is there at any moment, on the device; gradients come and go."""
    state = (value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor))
    return {"weights": _bytes([*model.parameters(), *model.buffers()]), "optimizer": _bytes(state)}


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
