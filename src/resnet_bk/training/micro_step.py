"""What every piece of a batch needs on its way through a model: precision, random numbers, a place."""

import numpy as np
import torch
from torch import Tensor

from resnet_bk.training.config import Precision

AUTOCAST_DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Mixed precision: matrix products in the half type, weights and reductions in float32. Off for fp32.

    Without autocast's cache: no weight is used twice, and what is in it lives as long as the forward pass.
    """
    enabled = precision != "fp32"
    return torch.autocast(device.type, dtype=AUTOCAST_DTYPES.get(precision), enabled=enabled, cache_enabled=False)


def seed_micro_step(seed: int, step: int, micro_step: int) -> None:
    """Makes routing noise a function of its place in training and not of history, so that resuming changes nothing."""
    state = np.random.SeedSequence([seed, step, micro_step]).generate_state(1, np.uint64)
    # For a GPU that nobody uses torch would keep each seed and, in words, the stack: that takes as long as operators.
    is_gpu_in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    seed_all = torch.manual_seed if is_gpu_in_use else torch.default_generator.manual_seed
    seed_all(int(state[0]) >> 1)


def share_of_step(start: int, stop: int, batch_rows: int, gradient_accumulation_steps: int) -> float:
    """What rows of a batch count in the loss of a step."""
    return (stop - start) / (batch_rows * gradient_accumulation_steps)


def moved(tokens: Tensor, device: torch.device) -> Tensor:
    """Tokens on the device. To a GPU they go from pinned memory, so that nobody waits for those before them."""
    if device.type == "cuda" and tokens.device.type == "cpu":
        return tokens.pin_memory().to(device, non_blocking=True)
    return tokens.to(device)
