"""A model made ready to train under a memory budget: where its weights, moments and activations are."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from resnet_bk.frugal.checkpointing import checkpoint_blocks
from resnet_bk.frugal.precision import half_weights
from resnet_bk.frugal.streaming import StreamedBlocks, stream_blocks
from resnet_bk.memory.activations import TrainingShape
from resnet_bk.memory.parameters import stays_float32
from resnet_bk.memory.strategy import Strategy
from resnet_bk.models import ResNetBKForCausalLM
from resnet_bk.training.by_block import ByBlock
from resnet_bk.training.config import Precision, TrainingConfig
from resnet_bk.training.micro_step import AUTOCAST_DTYPES
from resnet_bk.training.optimizer import build_offloaded_optimizer, build_optimizer
from resnet_bk.training.step import build_scaler


@dataclass(frozen=True, kw_only=True)
class PreparedTraining:
    """What ``train_step`` takes."""

    model: ResNetBKForCausalLM
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    by_block: ByBlock | None = None


def prepare_training(model: ResNetBKForCausalLM, config: TrainingConfig, device: torch.device) -> PreparedTraining:
    """Puts ``model``, in float32 on the CPU, where the configuration's strategy wants it, and builds its optimizer."""
    blocks = list(model.model.layers)
    model.loss_chunk_tokens = config.loss_chunk_tokens
    optimizer: torch.optim.Optimizer
    by_block = None
    if config.offload_optimizer:
        # First, while the weights are float32: they become the masters.
        optimizer = build_offloaded_optimizer(model, config, device, blocks=blocks)
        if config.half_weights:
            half_weights(model, AUTOCAST_DTYPES[config.precision], keep=stays_float32)
        streamed = _place(model, config, device)
        if config.goes_by_block:
            by_block = ByBlock(optimizer, streamed, device)
    else:
        _move(model, device)
        optimizer = build_optimizer(model, config)
    if config.checkpointing != "none" and by_block is None:
        checkpoint_blocks(blocks, config.checkpointing)
    scaler = build_scaler(device, config.precision)
    return PreparedTraining(model=model, optimizer=optimizer, scaler=scaler, by_block=by_block)


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
    if config.goes_by_block:
        words.append("a step block by block" + (", replayed from CUDA graphs" if config.cuda_graphs else ""))
    if config.loss_chunk_tokens:
        words.append(f"logits of {config.loss_chunk_tokens:,} tokens at once")
    return ", ".join(words)


def _place(model: ResNetBKForCausalLM, config: TrainingConfig, device: torch.device) -> StreamedBlocks | None:
    if not config.stream_weights:
        _move(model, device)
        return None
    streamed = stream_blocks(list(model.model.layers), device)
    for name, module in model.model.named_children():
        if name != "layers":
            _move(module, device)
    _move(model.lm_head, device)
    return streamed


def _move(module: nn.Module, device: torch.device) -> None:
    """As ``module.to``, which also exchanges what is there already, if it is fake."""
    if any(tensor.device != device for tensor in (*module.parameters(), *module.buffers())):
        module.to(device)


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
        replayed=config.cuda_graphs,
    )


def training_shape(training: TrainingConfig, rows: int | None = None) -> TrainingShape:
    """What the planner is to plan for, with micro-batches of ``rows`` instead of the configuration's."""
    rows = min(rows or training.micro_batch_size or training.batch_size, training.batch_size)
    return TrainingShape(
        batch_size=rows,
        sequence_length=training.sequence_length,
        micro_batches=training.gradient_accumulation_steps * -(-training.batch_size // rows),
        loss_chunk_tokens=training.loss_chunk_tokens,
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
        "cuda_graphs": strategy.replayed,
    }
