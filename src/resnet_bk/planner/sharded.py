"""What a rank needs when FSDP2 shares weights, gradients and moments out among GPUs: by formula, for what has a chance.

A trace of the sharded step judges what is chosen (``trace_training`` with ``ranks``); this says in microseconds which
ways are worth one, and the ladder how many GPUs it takes. Of each rank: a share of 12 bytes a parameter (weights and
two moments), and of 4 more once there are gradients; what is outside of blocks gathered in float32 from the forward
pass to the end of backward; in a block's backward pass that block gathered, the next one on its way, its gradients, and
their copy that is being added up; and the activations of its share of the batch. Fitted to traces of presets from 100m
to 70b (tests/planner/test_ranks.py).
"""

from dataclasses import replace

from resnet_bk.memory.activations import TrainingShape
from resnet_bk.memory.parameters import ParameterCounts
from resnet_bk.memory.plan import (
    AT_THE_EMBEDDING,
    AT_THE_LOSS,
    CUBLAS_BYTES,
    STATES,
    WHERE_BACKWARD_BEGINS,
    Budget,
    plan_strategy,
    step_moments,
)
from resnet_bk.memory.strategy import Strategy
from resnet_bk.models import ResNetBKConfig
from resnet_bk.planner.devices import NCCL_BYTES, Device
from resnet_bk.planner.ranks import MOST_RANKS

RESIDENT_BYTES, GRADIENT_BYTES = 12, 4  # a weight and two moments; a gradient
BLOCKS_IN_BACKWARD = 3.4  # its copy in a half type is among the activations


def tensors_of_a_rank(
    strategy: Strategy, config: ResNetBKConfig, shape: TrainingShape, counts: ParameterCounts, ranks: int
) -> int:
    """Bytes of the tensors of each of ``ranks``; ``shape`` is one rank's micro-batches."""
    return max(moment_sizes_of_a_rank(strategy, config, shape, counts, ranks).values())


def moment_sizes_of_a_rank(
    strategy: Strategy, config: ResNetBKConfig, shape: TrainingShape, counts: ParameterCounts, ranks: int
) -> dict[str, int]:
    """The same at each moment of a step at which memory may be largest."""
    moments = step_moments(strategy, config, shape, counts)
    if ranks == 1:
        return {name: sum(part.num_bytes for part in parts) for name, parts in moments.items()}
    resident = RESIDENT_BYTES * counts.total // ranks
    gradients = GRADIENT_BYTES * counts.total // ranks
    outside, block = 4 * counts.outside.total, 4 * counts.block.total
    head = 4 * config.vocab_size * config.hidden_size
    gathered = {
        AT_THE_LOSS: outside + (gradients if shape.micro_batches > 1 else 0),
        WHERE_BACKWARD_BEGINS: outside + block + (gradients if shape.micro_batches > 1 else 0),
        AT_THE_EMBEDDING: 3 * outside + block + gradients,
    }
    in_a_block = outside + int(BLOCKS_IN_BACKWARD * block) + head + gradients
    return {
        name: resident
        + gathered.get(name, in_a_block)
        + sum(part.num_bytes for part in parts if part.name not in STATES)
        for name, parts in moments.items()
    }


def bytes_of_a_rank(
    strategy: Strategy,
    config: ResNetBKConfig,
    shape: TrainingShape,
    counts: ParameterCounts,
    device: Device,
    num_gpus: int,
) -> int:
    """What each of ``num_gpus`` needs of its own GPU, context and NCCL's buffers included."""
    if num_gpus == 1:
        return device.context_bytes + plan_strategy(strategy, config, shape, counts, Budget()).gpu_bytes
    tensors = tensors_of_a_rank(strategy, config, shape, counts, num_gpus)
    return device.context_bytes + NCCL_BYTES + CUBLAS_BYTES + tensors


def gpus_needed(
    strategy: Strategy, config: ResNetBKConfig, shape: TrainingShape, counts: ParameterCounts, device: Device
) -> int | None:
    """The least power of two of GPUs whose memory suffices, each with one sequence at a time; None if none does."""
    one_row = replace(shape, batch_size=1)
    num_gpus = 1
    while num_gpus <= MOST_RANKS:
        if bytes_of_a_rank(strategy, config, one_row, counts, device, num_gpus) <= device.memory_bytes:
            return num_gpus
        num_gpus *= 2
    return None
