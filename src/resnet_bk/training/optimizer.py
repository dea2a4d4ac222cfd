"""AdamW with decay where it belongs, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from resnet_bk.layers import ShortConvolution
from resnet_bk.training.config import SHORTEST_DEFAULT_DECAY, TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Fused AdamW over two groups: matrices decay; embeddings, norms, filters, biases and energies do not.

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
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


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
