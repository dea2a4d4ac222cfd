"""Where one GPU ends: how many are needed when FSDP2 shares weights, gradients and moments out among them.

By formula, not by a trace. Of each rank: a share of 16 bytes a parameter (weights, gradients, two moments); what is
outside of blocks and two blocks' weights gathered in float32 (one that computes, one that is fetched); one block's and
the outside's gradients before they are added up; and the activations of its share of the batch.
"""

from dataclasses import replace

from resnet_bk.memory.activations import TrainingShape
from resnet_bk.memory.parameters import ParameterCounts
from resnet_bk.memory.plan import STATES, Budget, plan_strategy
from resnet_bk.memory.strategy import Strategy
from resnet_bk.models import ResNetBKConfig
from resnet_bk.planner.devices import Device

MOST_GPUS = 4096
STATE_BYTES = 16  # a weight, its gradient, two moments


def bytes_of_a_rank(
    strategy: Strategy,
    config: ResNetBKConfig,
    shape: TrainingShape,
    counts: ParameterCounts,
    device: Device,
    num_gpus: int,
) -> int:
    """What each of ``num_gpus`` needs of its own GPU, the context included; ``shape`` is one rank's micro-batch."""
    alone = plan_strategy(strategy, config, shape, counts, Budget())
    if num_gpus == 1:
        return device.context_bytes + alone.gpu_bytes
    gathered = 4 * (2 * counts.block.total + counts.outside.total)
    before_sums = 4 * (counts.block.total + counts.outside.total)
    activations = sum(part.num_bytes for part in alone.gpu_parts if part.name not in STATES)
    return device.context_bytes + STATE_BYTES * counts.total // num_gpus + gathered + before_sums + activations


def gpus_needed(
    strategy: Strategy, config: ResNetBKConfig, shape: TrainingShape, counts: ParameterCounts, device: Device
) -> int | None:
    """The least power of two of GPUs whose memory suffices, each with one sequence at a time; None if none does."""
    one_row = replace(shape, batch_size=1)
    num_gpus = 1
    while num_gpus <= MOST_GPUS:
        if bytes_of_a_rank(strategy, config, one_row, counts, device, num_gpus) <= device.memory_bytes:
            return num_gpus
        num_gpus *= 2
    return None
