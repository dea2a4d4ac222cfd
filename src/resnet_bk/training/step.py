"""One optimizer step: forward, backward, clipping, update, in the chosen precision."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from resnet_bk.errors import UserError
from resnet_bk.models import ResNetBKForCausalLM
from resnet_bk.training.config import Precision, TrainingConfig
from resnet_bk.training.optimizer import learning_rate, set_learning_rate

AUTOCAST_DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step saw; tensors on the device, so that reading them is the caller's choice.

    ``cross_entropy`` in nats a token and ``grad_norm`` (before clipping) are scalars; ``expert_load`` is
    (layers, experts).
    """

    cross_entropy: Tensor
    grad_norm: Tensor
    expert_load: Tensor
    learning_rate: float


def choose_device(name: str) -> torch.device:
    """The device that ``name`` asks for; ``auto`` is the GPU where there is one.

    Raises:
        UserError: it is not there, or nothing can be trained on it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"device {name} is not available here; use --device auto or cpu") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"nothing can be trained on device {name}; use --device auto or cpu")
    return device


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Mixed precision: matrix products in the half type, weights and reductions in float32. Off for fp32."""
    return torch.autocast(device.type, dtype=AUTOCAST_DTYPES.get(precision), enabled=precision != "fp32")


def build_scaler(device: torch.device, precision: Precision) -> torch.amp.GradScaler:
    """Dynamic loss scaling, which fp16's small exponent needs; it does nothing otherwise."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def seed_micro_step(seed: int, step: int, micro_step: int) -> None:
    """Makes routing noise a function of its place in training and not of history, so that resuming changes nothing."""
    state = np.random.SeedSequence([seed, step, micro_step]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)


def train_step(
    model: ResNetBKForCausalLM,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Iterable[tuple[Tensor, Tensor]],
    config: TrainingConfig,
    step: int,
) -> StepResult:
    """Learns from ``gradient_accumulation_steps`` batches of (token ids, targets), each int64 ``(B, N)``.

    Under fp16 a step whose gradients overflow is skipped and the scale lowered, as torch's GradScaler does.
    """
    device = model.device
    optimizer.zero_grad(set_to_none=True)
    nats, loads = [], []
    for micro_step, (input_ids, targets) in enumerate(batches):
        seed_micro_step(config.seed, step, micro_step)
        with autocast(device, config.precision):
            output = model(_moved(input_ids, device), shift_labels=_moved(targets, device), use_cache=False)
        loss = output.loss / config.gradient_accumulation_steps
        nats.append(output.cross_entropy)
        loads.append(output.expert_load)
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    rate = learning_rate(config, step)
    set_learning_rate(optimizer, rate)
    scaler.step(optimizer)
    scaler.update()
    expert_load = torch.stack(loads).mean(0)
    model.balance_experts(expert_load)
    return StepResult(
        cross_entropy=torch.stack(nats).mean(),
        grad_norm=grad_norm,
        expert_load=expert_load,
        learning_rate=rate,
    )


def _moved(tokens: Tensor, device: torch.device) -> Tensor:
    """Tokens on the device. To a GPU they go from pinned memory, so that nobody waits for those before them."""
    if device.type == "cuda" and tokens.device.type == "cpu":
        return tokens.pin_memory().to(device, non_blocking=True)
    return tokens.to(device)
