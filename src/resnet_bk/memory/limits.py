"""What fits in memory, asked before anything is allocated: to a request that is too large the kernel may answer by
killing the process."""

from pathlib import Path

import psutil
import torch

from resnet_bk.errors import UserError
from resnet_bk.memory.activations import TrainingShape
from resnet_bk.memory.parameters import count_parameters
from resnet_bk.memory.plan import PROCESS_BYTES, Budget, plan_strategy
from resnet_bk.memory.strategy import Strategy
from resnet_bk.memory.units import format_bytes
from resnet_bk.models import ResNetBKConfig
from resnet_bk.models.matching import total_parameters

CGROUP = Path("/sys/fs/cgroup")
# What torch says when an allocation fails, or when a tensor's size does not fit in 64 bits.
COMPLAINTS = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")


def available_bytes() -> int:
    """Host memory that a new allocation could still get, swap and the container's limit included."""
    machine = psutil.virtual_memory().available + psutil.swap_memory().free
    container = _container_bytes()
    return int(machine if container is None else min(machine, container))


def check_training_fits(
    config: ResNetBKConfig, shape: TrainingShape, strategy: Strategy, *, device: torch.device
) -> None:
    """Raises a UserError if training would need more host memory than there is.

    For a GPU, whose allocator answers in words, that is what the strategy keeps on the host, and the weights, which are
    made there. On a CPU it is the least that a step takes, by formulas that are a GPU's; what it takes to the byte, a
    trace says (``planner.predict.check_traced``).
    """
    available = available_bytes()
    # Weights, gradients and two moments of 4 bytes; checked first, because planning walks through the layers.
    total = total_parameters(config)
    needed = total * (16 if device.type == "cpu" else 4)
    if needed <= available:
        plan = plan_strategy(strategy, config, shape, count_parameters(config), Budget())
        on_host = plan.host_bytes - PROCESS_BYTES
        needed = on_host + (plan.tensor_bytes if device.type == "cpu" else 4 * total)
    if needed > available:
        raise UserError(
            f"training would need {format_bytes(needed)} of memory and {format_bytes(available)} are free; take a "
            "smaller --batch-size, --sequence-length or model (`resnet-bk plan` shows what needs how much)"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or on the GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in COMPLAINTS)


def _container_bytes() -> int | None:
    """What a control group leaves to this process; None without a limit. Cached files are given back on demand."""
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="utf-8").strip()
        used = int((CGROUP / "memory.current").read_text(encoding="utf-8"))
        rows = [row.split() for row in (CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines()]
        return None if limit == "max" else max(0, int(limit) - used + int(dict(rows)["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return None
