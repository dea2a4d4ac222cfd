"""AdamW with decay where it belongs, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from resnet_bk.frugal.optimizer import OffloadedAdamW
from resnet_bk.layers import ShortConvolution
from resnet_bk.training.config import SHORTEST_DEFAULT_DECAY, TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """torch's fused AdamW over the groups of ``parameter_groups``."""
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.learning_rate, betas=betas, fused=True)


def build_offloaded_optimizer(
    model: nn.Module, config: TrainingConfig, device: torch.device, *, blocks: Iterable[nn.Module] = ()
) -> OffloadedAdamW:
    """The same with masters, moments and update on the host; gradients will come from ``device``."""
    return OffloadedAdamW(
        parameter_groups(model, config),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        moments_dtype=torch.bfloat16 if config.moments == "bf16" else torch.float32,
        blocks=blocks,
        device=device,
        seed=config.seed,
    )


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Two groups: matrices decay; embeddings, norms, filters, biases and energies do not.

    An embedding row is only touched by its own token, so decay would shrink rare tokens for being rare; a head tied
    to it follows it. Vectors (norms, energies, a channel's filter) set scales that decay would pull away from their
    meaning.
    """
    spared = (nn.Embedding, ShortConvolution)
    undecayed = {id(module.weight) for module in model.modules() if isinstance(module, spared)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.dim() >= 2 and id(parameter) not in undecayed
            (decayed if decays else kept).append(parameter)
    return [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Rate of the step with this number, counted from 0: linear warm-up, then half a cosine, then its end."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    horizon = config.decay_steps or max(config.steps, SHORTEST_DEFAULT_DECAY)
    progress = min(1.0, (step - config.warmup_steps) / max(1, horizon - config.warmup_steps))
    ratio = config.min_learning_rate_ratio
    return config.learning_rate * (ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The same rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
