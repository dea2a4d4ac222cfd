"""Models of all sizes side by side: what each strategy takes of a GPU, and where one GPU ends."""

from dataclasses import dataclass

from resnet_bk.memory.activations import TrainingShape
from resnet_bk.memory.parameters import count_parameters
from resnet_bk.memory.plan import Budget, make_plan
from resnet_bk.memory.strategy import STRATEGIES
from resnet_bk.models import ResNetBKConfig
from resnet_bk.planner.devices import Device
from resnet_bk.planner.sharded import gpus_needed

# The seed's 4M, 100M and 1B, and on.
LADDER = ("seed", "100m", "1b", "7b", "70b")
SHARED_OUT = next(strategy for strategy in STRATEGIES if strategy.name == "full checkpointing")


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A preset: parameters, what each strategy needs on the GPU and on the host by formula, and GPUs under FSDP2."""

    preset: str
    parameters: int
    sequence_length: int
    gpu_bytes: dict[str, int]
    gpu_parts: dict[str, dict[str, int]]
    host_bytes: dict[str, int]
    gpus_with_fsdp: int | None


def ladder(batch_size: int, sequence_length: int, device: Device) -> list[Rung]:
    """Every rung for one micro-batch; a preset with a position table has its own length where that is shorter."""
    return [_rung(preset, batch_size, sequence_length, device) for preset in LADDER]


def _rung(preset: str, batch_size: int, sequence_length: int, device: Device) -> Rung:
    config = ResNetBKConfig.from_preset(preset)
    length = min(sequence_length, config.max_position_embeddings or sequence_length)
    shape = TrainingShape(batch_size=batch_size, sequence_length=length)
    counts, plans = count_parameters(config), make_plan(config, shape, Budget()).strategies
    return Rung(
        preset=preset,
        parameters=counts.total,
        sequence_length=length,
        gpu_bytes={plan.strategy.name: device.context_bytes + plan.gpu_bytes for plan in plans},
        gpu_parts={
            plan.strategy.name: {
                "context": device.context_bytes,
                **{part.name: part.num_bytes for part in plan.gpu_parts},
            }
            for plan in plans
        },
        host_bytes={plan.strategy.name: plan.host_bytes for plan in plans},
        gpus_with_fsdp=gpus_needed(SHARED_OUT, config, shape, counts, device),
    )
