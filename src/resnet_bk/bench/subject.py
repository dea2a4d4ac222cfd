"""A model ready to train, one batch for it, and the phases of a step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from resnet_bk.bench.contestants import build_model
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.ops.loss import IGNORE_INDEX
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.micro_step import autocast
from resnet_bk.training.optimizer import build_optimizer

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def language_model_loss(model: nn.Module, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of next tokens, ``(B, N)`` and ``(B, N)``. Ours never has all logits at once; others have."""
    if isinstance(model, ResNetBKForCausalLM):
        loss = model(input_ids, shift_labels=targets, use_cache=False, return_logits=False).loss
        assert isinstance(loss, Tensor)
        return loss
    logits = logits_of(model, input_ids)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)


def logits_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    """``(B, N, V)`` of any causal language model."""
    if isinstance(model, ResNetBKForCausalLM):
        output = model(input_ids, use_cache=False, return_logits=True)
    else:
        output = model(input_ids, use_cache=False) if isinstance(model, PreTrainedModel) else model(input_ids)
    if isinstance(output, tuple):
        output = output[0]
    logits = output if isinstance(output, Tensor) else output.logits
    assert isinstance(logits, Tensor)
    return logits


def position_limit(model: nn.Module, config: ResNetBKConfig | None = None) -> int | None:
    """Tokens of the longest text that a model takes, None where its configuration, its own or this, sets no limit."""
    limit = getattr(config or getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


@dataclass(kw_only=True)
class Subject:
    """``inputs`` and ``targets`` are what ``loss`` takes; of a language model token ids ``(B, N)``."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: Tensor
    targets: Tensor
    training: TrainingConfig
    loss: Loss = language_model_loss

    @classmethod
    def build(cls, config: ResNetBKConfig, training: TrainingConfig, batch: tuple[Tensor, Tensor]) -> "Subject":
        """One of our models, with fresh weights from the training seed, on the device of ``batch``."""
        return cls.of(build_model(config, training.seed), training, batch)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        training: TrainingConfig,
        batch: tuple[Tensor, Tensor],
        loss: Loss = language_model_loss,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> "Subject":
        """Any model, moved to the device of ``batch``."""
        model = model.to(batch[0].device).train()
        return cls(
            model=model,
            optimizer=optimizer or build_optimizer(model, training),
            inputs=batch[0],
            targets=batch[1],
            training=training,
            loss=loss,
        )

    @property
    def device(self) -> torch.device:
        """Where the batch is, and the model."""
        return self.inputs.device

    @property
    def generates(self) -> bool:
        """Whether it reads a prompt and goes on from a cache."""
        is_text = self.inputs.ndim == 2 and not self.inputs.is_floating_point()
        return isinstance(self.model, PreTrainedModel) and self.model.can_generate() and is_text

    def forward(self) -> Tensor:
        """The loss of the batch."""
        with autocast(self.device, self.training.precision):
            return self.loss(self.model, self.inputs, self.targets)

    def update(self) -> None:
        """Clips, steps, and drops the gradients."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One training step."""
        self.forward().backward()  # type: ignore[no-untyped-call]
        self.update()

    def read(self, length: int) -> Any:
        """The first tokens of the batch; what it returns has ``past_key_values``."""
        return self.model(self.inputs[:, :length], use_cache=True, logits_to_keep=1)

    def decode(self, position: int, past_key_values: Any) -> Any:
        """One token of each row after those before it."""
        return self.model(self.inputs[:, position : position + 1], past_key_values=past_key_values, use_cache=True)


def random_batch(config: Any, batch_size: int, sequence_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and targets ``(B, N)`` without meaning, always the same; ``config`` has a ``vocab_size``."""
    return random_tokens(config.vocab_size, batch_size, sequence_length, device)


def random_tokens(
    vocab_size: int, batch_size: int, sequence_length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The same for a number of tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (batch_size, sequence_length + 1), generator=generator)
    return tokens[:, :-1].contiguous().to(device), tokens[:, 1:].contiguous().to(device)


def synchronizer(device: torch.device) -> Callable[[], None]:
    """What waits until the device has done what was asked of it."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None
