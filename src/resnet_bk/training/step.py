"""One optimizer step: forward, backward, clipping, update, in the chosen precision."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_bk.errors import UserError
from resnet_bk.frugal.micro_batches import MicroBatches, split_rows
from resnet_bk.frugal.optimizer import OffloadedAdamW
from resnet_bk.imagined import is_imagined
from resnet_bk.memory.limits import is_out_of_memory
from resnet_bk.models import ResNetBKCausalLMOutput, ResNetBKForCausalLM
from resnet_bk.training.by_block import ByBlock
from resnet_bk.training.config import Precision, TrainingConfig
from resnet_bk.training.distributed import ALONE, World, whole
from resnet_bk.training.language_model import LanguageModel
from resnet_bk.training.micro_step import autocast, moved, seed_micro_step, share_of_step
from resnet_bk.training.optimizer import learning_rate, set_learning_rate


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step saw; tensors on the device, so that reading them is the caller's choice.

    ``cross_entropy`` in nats a token and ``grad_norm`` (before clipping) are scalars; ``expert_load`` is
    (layers, experts). Where weights are updated during backward there is no ``grad_norm`` yet: the optimizer has it.
    """

    cross_entropy: Tensor
    grad_norm: Tensor | None
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


def build_scaler(device: torch.device, precision: Precision) -> torch.amp.GradScaler:
    """Dynamic loss scaling, which fp16's small exponent needs; it does nothing otherwise."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def train_step(
    model: ResNetBKForCausalLM,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Iterable[tuple[Tensor, Tensor]],
    config: TrainingConfig,
    step: int,
    *,
    device: torch.device | None = None,
    micro_batches: MicroBatches | None = None,
    by_block: ByBlock | None = None,
    world: World = ALONE,
) -> StepResult:
    """Learns from ``gradient_accumulation_steps`` batches of (token ids, targets), each int64 ``(B, N)``.

    With several ranks they are this rank's rows of them; what it returns is that of all ranks.

    Each batch goes through the model in pieces of ``micro_batches.rows`` rows, which change nothing but rounding and
    the balancing loss (that of a piece is of its own tokens). A step that runs out of memory is tried again with
    smaller ones; so give the same ``micro_batches`` to every step, which also remember what has fitted. ``device`` is
    where the model computes, if not where its weights are. ``by_block`` is that of ``prepare_training``: with one, all
    pieces go through a block before the next, and weights and gradients cross once a step.

    Under fp16 a step whose gradients overflow is skipped and the scale lowered, as torch's GradScaler does. An
    ``OffloadedAdamW`` updates during backward where nothing must be known of all gradients first, from the second step
    with the same ``micro_batches`` on.
    """
    if config.goes_by_block != (by_block is not None):
        raise ValueError("by_block is not that of this configuration; give what prepare_training returned")
    batches, device = list(batches), device or model.device
    rate = learning_rate(config, step)
    set_learning_rate(optimizer, rate)
    micro_batches = micro_batches or MicroBatches(config.micro_batch_size or len(batches[0][0]))
    in_backward = False

    def forward_and_backward(rows: int) -> tuple[Tensor, Tensor]:
        nonlocal in_backward
        # What has begun to update weights cannot be tried again: only once a step has shown that memory suffices.
        in_backward = micro_batches.proven and updates_in_backward(optimizer, scaler, config)
        optimizer.zero_grad(set_to_none=True)
        pieces = [
            (number, rows_of_piece)
            for number, (input_ids, _) in enumerate(batches)
            for rows_of_piece in split_rows(len(input_ids), rows)
        ]
        if by_block is not None:
            with _updating(optimizer) if in_backward else nullcontext():
                # Of an imagined machine's steps, the second and all behind it.
                recorded = config.cuda_graphs and (micro_batches.proven or is_imagined())
                parts = LanguageModel(model, scaler, batches, pieces, config, step, device)
                return by_block.gradients(parts, recorded=recorded)
        nats: list[Tensor] = []
        loads: list[Tensor] = []
        for number, (start, stop) in pieces:
            seed_micro_step(config.seed, step, number)
            update_now = in_backward and (number, (start, stop)) == pieces[-1]
            share, output = _forward(model, batches[number], start, stop, config, device, world)
            assert output.loss is not None and output.cross_entropy is not None and output.expert_load is not None
            nats.append(share * output.cross_entropy)
            loads.append(share * output.expert_load)
            with _updating(optimizer) if update_now else nullcontext():
                scaler.scale(share * output.loss).backward()  # type: ignore[no-untyped-call]
        return torch.stack(nats).sum(0), torch.stack(loads).sum(0)

    cross_entropy, expert_load = micro_batches.run(forward_and_backward)
    grad_norm = None
    if not in_backward:
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
        grad_norm = whole(grad_norm)
    scaler.step(optimizer)
    scaler.update()
    model.balance_experts(expert_load)
    return StepResult(
        cross_entropy=world.mean(cross_entropy),
        grad_norm=grad_norm,
        expert_load=expert_load,
        learning_rate=rate,
    )


def updates_in_backward(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, config: TrainingConfig) -> bool:
    """Whether a weight can be updated as soon as its gradient is there: if neither a norm nor a scale must be known."""
    return isinstance(optimizer, OffloadedAdamW) and config.max_grad_norm is None and not scaler.is_enabled()


@contextmanager
def _updating(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    assert isinstance(optimizer, OffloadedAdamW)
    try:
        with optimizer.updating_in_backward():
            yield
    except RuntimeError as error:
        if is_out_of_memory(error) and optimizer.has_begun:
            raise UserError(
                "memory ran out while weights were being updated; go on from the last checkpoint with a smaller "
                "--micro-batch-size"
            ) from error
        raise


def _forward(
    model: ResNetBKForCausalLM,
    batch: tuple[Tensor, Tensor],
    start: int,
    stop: int,
    config: TrainingConfig,
    device: torch.device,
    world: World,
) -> tuple[float, ResNetBKCausalLMOutput]:
    """These rows' share of the step, and the model's output for them."""
    rows = len(batch[0])
    input_ids, targets = (moved(tokens[start:stop], device) for tokens in batch)
    with autocast(device, config.precision):
        place = (world.rank * rows + start, world.size * rows)
        output = model(input_ids, shift_labels=targets, use_cache=False, batch_rows=place)
    return share_of_step(start, stop, rows, config.gradient_accumulation_steps), output
