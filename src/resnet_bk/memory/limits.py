"""What fits in memory, asked before anything is allocated: to a request that is too large the kernel may answer by
killing the process."""

from pathlib import Path

import psutil
import torch

from resnet_bk.errors import UserError
from resnet_bk.memory.activations import TrainingShape
from resnet_bk.memory.plan import Budget, make_plan
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


def check_training_fits(config: ResNetBKConfig, shape: TrainingShape, *, half: bool, device: torch.device) -> None:
    """Raises a UserError if training would need more host memory than there is.

    On a GPU, whose allocator answers in words, only the weights are checked, which are made on the host.
    """
    available = available_bytes()
    # Weights, gradients and two moments of 4 bytes; checked first, because planning walks through the layers.
    needed = total_parameters(config) * (16 if device.type == "cpu" else 4)
    if needed <= available and device.type == "cpu":
        needed = make_plan(config, shape, Budget()).strategies[1 if half else 0].tensor_bytes
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
