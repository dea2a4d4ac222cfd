"""What training a model in a certain way takes of a certain machine: memory, part by part, and time."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from resnet_bk.errors import UserError
from resnet_bk.memory import plan
from resnet_bk.memory.limits import available_bytes, check_training_fits
from resnet_bk.memory.parameters import ParameterCounts, count_parameters
from resnet_bk.memory.plan import PROCESS_BYTES, Budget, plan_strategy
from resnet_bk.memory.units import format_bytes
from resnet_bk.models import ResNetBKConfig
from resnet_bk.planner.cost import Cost, step_cost
from resnet_bk.planner.devices import NCCL_BYTES, Device
from resnet_bk.planner.footprint import Footprint, footprint, larger
from resnet_bk.planner.ranks import of_one_rank
from resnet_bk.planner.trace import Trace, TracedPart, trace_training
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.distributed import World
from resnet_bk.training.start import check_ranks
from resnet_bk.training.strategy import strategy_of, training_shape

# Which memory is free at the moment of a request depends on what copies have ended by then: of five runs on an H100
# one reserved 2.3% more than the replay, the others less (benchmarks/results/gpu/frugal.json).
TIMING = 0.03
# What malloc keeps of freed tensors on a CPU: up to half as much again of a small step, and never more than this
# (benchmarks/results/cpu/planner.json).
MALLOC_SHARE, MALLOC_BYTES = 0.5, 400_000_000
# A step on a CPU, which keeps more inside its operators, took at most twice what formulas say of one on a GPU.
WITHOUT_A_DOUBT = 2.5
MADE_ON_HOST = "weights, before they move"  # name of a part


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Bytes and seconds of a training step.

    ``gpu_bytes`` is what the driver will say of the process: context and reserved memory. ``host_bytes`` is the most
    resident memory; without a GPU everything is there. ``parts`` are the tensors at the worst moment of the step.

    With several ``ranks`` under FSDP2, ``training`` is that of all of them, footprint, parts and ``gpu_bytes`` are each
    one's own (``nccl_bytes`` among them), and ``host_bytes`` is that of all, on one host.
    """

    device: Device
    training: TrainingConfig
    footprint: Footprint
    parts: list[TracedPart]
    gpu_bytes: int
    host_parts: dict[str, int]
    cost: Cost
    ranks: int = 1

    @property
    def nccl_bytes(self) -> int:
        """What ranks take of each GPU to speak to others."""
        return nccl_bytes(self.device, self.ranks)

    @property
    def host_bytes(self) -> int:
        """The sum of the host's parts."""
        return sum(self.host_parts.values())

    @property
    def bound_by(self) -> str:
        """What a step waits for; a machine without a GPU has one processor for all of it."""
        return "the processor" if self.device.machine.kind == "cpu" else self.cost.bound_by

    def missing(self, budget: Budget) -> int:
        """Bytes by which this exceeds a budget, of the two memories the one that misses more; 0 or less if it fits."""
        on_device = self.gpu_bytes if self.device.machine.kind == "cuda" else self.footprint.tensor_bytes
        return budget.missing(on_device, self.host_bytes)


def nccl_bytes(device: Device, ranks: int) -> int:
    """Of each GPU, beside torch's allocator."""
    return NCCL_BYTES if ranks > 1 and device.machine.kind == "cuda" else 0


def predict(
    config: ResNetBKConfig, training: TrainingConfig, device: Device, *, held: bool = False, ranks: int = 1
) -> Prediction:
    """Predicts ``train_step``; ``held`` is whether the allocator is held to a budget, which has its segments grow.

    Of several ``ranks`` under FSDP2, which share the batch, the first one's step is traced; all are alike.

    Raises:
        UserError: they cannot share it evenly, or ``training`` is for one process.
    """
    if ranks > 1:
        check_ranks(training, World(size=ranks))
    trace = trace_of(config, training, device, ranks)
    counts = count_parameters(config)
    on_gpu = device.machine.kind == "cuda"
    found = footprint(trace, expandable=held, small_workspaces=device.small_workspaces)
    if training.cuda_graphs:
        # The first step is not replayed.
        first = trace_of(config, replace(training, cuda_graphs=False), device, ranks)
        found = larger(found, footprint(first, expandable=held, small_workspaces=device.small_workspaces))
    return Prediction(
        device=device,
        training=training,
        footprint=found,
        parts=trace.parts(),
        gpu_bytes=device.context_bytes + nccl_bytes(device, ranks) + int((1 + TIMING) * found.most_reserved_bytes)
        if on_gpu
        else 0,
        host_parts=host_parts(config, training, device, counts, 0 if on_gpu else trace.peak_bytes, ranks=ranks),
        cost=step_cost(
            strategy_of(training),
            config,
            training_shape(of_one_rank(training, ranks)),
            counts,
            device,
            clips=training.max_grad_norm is not None,
            ranks=ranks,
        ),
        ranks=ranks,
    )


def check_traced(config: ResNetBKConfig, training: TrainingConfig, device: Device) -> None:
    """Raises a UserError if a step on a CPU would need more memory than is free.

    A trace takes a moment: it is asked only where formulas leave a doubt.
    """
    if device.machine.kind != "cpu":
        return
    strategy, shape = strategy_of(training), training_shape(training)
    check_training_fits(config, shape, strategy, device=torch.device("cpu"))
    planned = plan_strategy(strategy, config, shape, count_parameters(config), Budget())
    available = available_bytes()
    if WITHOUT_A_DOUBT * (planned.tensor_bytes + planned.host_bytes - PROCESS_BYTES) <= available:
        return
    prediction = predict(config, training, device)
    needed = prediction.host_bytes - device.process_bytes
    if needed > available:
        raise UserError(
            f"training would need {format_bytes(needed)} of memory and {format_bytes(available)} are free; take a "
            "smaller --batch-size, --sequence-length or model, or --strategy auto (see `resnet-bk plan`)"
        )


def host_parts(
    config: ResNetBKConfig,
    training: TrainingConfig,
    device: Device,
    counts: ParameterCounts,
    tensor_bytes: int,
    *,
    ranks: int = 1,
) -> dict[str, int]:
    """Host memory by part; ``tensor_bytes`` are those of a step without a GPU, of each of the ``ranks`` on the host."""
    if ranks > 1:
        return _of_several(config, training, device, counts, tensor_bytes, ranks)
    planned = plan.host_parts(strategy_of(training), config, training_shape(training), counts)
    parts = {name: size for name, size in planned.items() if size and size != PROCESS_BYTES}
    # A head that is tied is made, and then exchanged for the embedding.
    spare_head = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    made = {MADE_ON_HOST: 4 * (counts.total + spare_head)}
    made_here = {} if training.offload_optimizer or tensor_bytes else made
    return {
        "process": device.process_bytes,
        **({"tensors of the step": tensor_bytes} if tensor_bytes else {}),
        **({"freed, and kept by malloc": kept_by_malloc(tensor_bytes)} if tensor_bytes else {}),
        **made_here,
        **parts,
    }


def _of_several(
    config: ResNetBKConfig,
    training: TrainingConfig,
    device: Device,
    counts: ParameterCounts,
    tensor_bytes: int,
    ranks: int,
) -> dict[str, int]:
    """Every rank's, and what rank 0 gathers for a checkpoint: weights and moments."""
    own = host_parts(config, of_one_rank(training, ranks), device, counts, tensor_bytes)
    own.pop(MADE_ON_HOST, None)
    parts = {f"{ranks} processes" if name == "process" else name: ranks * size for name, size in own.items()}
    return {**parts, "a checkpoint, gathered by rank 0": 12 * counts.total}


def kept_by_malloc(tensor_bytes: int) -> int:
    """Memory of the CPU that tensors have had and a process has still."""
    return min(int(MALLOC_SHARE * tensor_bytes), MALLOC_BYTES)


def trace_of(config: ResNetBKConfig, training: TrainingConfig, device: Device, ranks: int = 1) -> Trace:
    """The trace of a step; the last few are kept."""
    return _traced(_Key(config, training, device, ranks))


class _Key:
    """Configurations that compare by their fields."""

    def __init__(self, config: ResNetBKConfig, training: TrainingConfig, device: Device, ranks: int) -> None:
        self.config, self.training, self.machine, self.ranks = config, training, device.machine, ranks
        self._fields = (repr(sorted(config.own_fields().items(), key=str)), training, device.machine, ranks)

    def __hash__(self) -> int:
        return hash(self._fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other._fields == self._fields


@lru_cache(maxsize=8)
def _traced(key: _Key) -> Trace:
    return trace_training(key.config, key.training, key.machine, ranks=key.ranks)
