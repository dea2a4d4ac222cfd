"""A model made ready to train under a memory budget: where its weights, moments and activations are."""

from dataclasses import dataclass
from typing import Any

import torch

from resnet_bk.frugal.checkpointing import checkpoint_blocks
from resnet_bk.frugal.optimizer import OffloadedAdamW
from resnet_bk.frugal.precision import half_weights
from resnet_bk.frugal.streaming import stream_blocks
from resnet_bk.memory.parameters import stays_float32
from resnet_bk.memory.strategy import Strategy
from resnet_bk.models import ResNetBKForCausalLM
from resnet_bk.training.config import Precision, TrainingConfig
from resnet_bk.training.optimizer import build_offloaded_optimizer, build_optimizer
from resnet_bk.training.step import AUTOCAST_DTYPES, build_scaler


@dataclass(frozen=True, kw_only=True)
class PreparedTraining:
    """What ``train_step`` takes."""

    model: ResNetBKForCausalLM
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def prepare_training(model: ResNetBKForCausalLM, config: TrainingConfig, device: torch.device) -> PreparedTraining:
    """Puts ``model``, in float32 on the CPU, where the configuration's strategy wants it, and builds its optimizer."""
    blocks = list(model.model.layers)
    optimizer: torch.optim.Optimizer
    if config.offload_optimizer:
        # First, while the weights are float32: they become the masters.
        optimizer = build_offloaded_optimizer(model, config, device, blocks=blocks)
        if config.half_weights:
            half_weights(model, AUTOCAST_DTYPES[config.precision], keep=stays_float32)
        _place(model, optimizer, config, device)
    else:
        model.to(device)
        optimizer = build_optimizer(model, config)
    if config.checkpointing != "none":
        checkpoint_blocks(blocks, config.checkpointing)
    return PreparedTraining(model=model, optimizer=optimizer, scaler=build_scaler(device, config.precision))


def describe_strategy(config: TrainingConfig) -> str:
    """The strategy in words, for people; empty if everything is on the device."""
    words = [f"micro-batches of {config.micro_batch_size}"] if config.micro_batch_size else []
    if config.checkpointing != "none":
        words.append(f"{config.checkpointing} checkpointing")
    if config.offload_optimizer:
        words.append("AdamW on the host" + (", its moments in bf16" if config.moments == "bf16" else ""))
    if config.half_weights:
        words.append(f"{config.precision} weights")
    if config.stream_weights:
        words.append("blocks streamed from the host")
    return ", ".join(words)


def _place(model: ResNetBKForCausalLM, optimizer: OffloadedAdamW, config: TrainingConfig, device: torch.device) -> None:
    if not config.stream_weights:
        model.to(device)
        return
    streamed = stream_blocks(list(model.model.layers), device)
    streamed.before_load.append(optimizer.synchronize)
    for name, module in model.model.named_children():
        if name != "layers":
            module.to(device)
    model.lm_head.to(device)


def strategy_of(config: TrainingConfig) -> Strategy:
    """What the planner is to plan."""
    return Strategy(
        name=describe_strategy(config) or config.precision,
        half=config.precision != "fp32",
        checkpointing=config.checkpointing,
        offload_optimizer=config.offload_optimizer,
        half_weights=config.half_weights,
        stream_weights=config.stream_weights,
        half_moments=config.moments == "bf16",
    )


def training_fields(strategy: Strategy, half_type: Precision) -> dict[str, Any]:
    """The fields of a ``TrainingConfig`` that make it this strategy; ``half_type`` is what half is on the device."""
    return {
        "precision": half_type if strategy.half else "fp32",
        "checkpointing": strategy.checkpointing,
        "offload_optimizer": strategy.offload_optimizer,
        "half_weights": strategy.half_weights,
        "stream_weights": strategy.stream_weights,
        "moments": "bf16" if strategy.half_moments else "fp32",
    }
