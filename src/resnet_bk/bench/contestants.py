"""The models that are compared, and what one training step of them is made of."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_bk.memory.parameters import count_parameters
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.schema import Contestant
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.optimizer import build_optimizer
from resnet_bk.training.step import autocast

OURS, BASELINE = "resnet-bk", "transformer"
LABELS = {OURS: "ResNet-BK", BASELINE: "Transformer"}


def contestant_configs(preset: str, overrides: dict[str, Any]) -> dict[str, ResNetBKConfig]:
    """Ours, and the same model with its mixer exchanged for attention at equal total parameters.

    Raises:
        ValueError: a field does not fit.
    """
    return {
        OURS: ResNetBKConfig.from_preset(preset, **overrides),
        BASELINE: ResNetBKConfig.from_preset(preset, **{**overrides, "mixer": "attention"}),
    }


def describe_contestant(key: str, config: ResNetBKConfig) -> Contestant:
    """What a report says of a model."""
    counts = count_parameters(config)
    return Contestant(
        key=key,
        label=LABELS[key],
        parameters=counts.total,
        active_parameters=counts.active,
        config=config.own_fields(),
    )


def without_position_table(config: ResNetBKConfig) -> ResNetBKConfig:
    """The same model for any length."""
    return ResNetBKConfig(**{**config.own_fields(), "max_position_embeddings": None})


def build_model(config: ResNetBKConfig, seed: int) -> ResNetBKForCausalLM:
    """Fresh weights. A bidirectional model does not warn here: the report says what it is."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="causal=False", category=UserWarning)
        return ResNetBKForCausalLM(config)


@dataclass(kw_only=True)
class Subject:
    """A model ready to train, one batch for it, and the phases of a step."""

    model: ResNetBKForCausalLM
    optimizer: torch.optim.Optimizer
    input_ids: Tensor
    targets: Tensor
    training: TrainingConfig

    @classmethod
    def build(cls, config: ResNetBKConfig, training: TrainingConfig, batch: tuple[Tensor, Tensor]) -> "Subject":
        """Fresh weights from the training seed, on the device of ``batch``."""
        input_ids, targets = batch
        model = build_model(config, training.seed).to(input_ids.device).train()
        return cls(
            model=model,
            optimizer=build_optimizer(model, training),
            input_ids=input_ids,
            targets=targets,
            training=training,
        )

    def forward(self) -> Tensor:
        """The loss of the batch."""
        with autocast(self.model.device, self.training.precision):
            loss = self.model(self.input_ids, shift_labels=self.targets, use_cache=False, return_logits=False).loss
        assert isinstance(loss, Tensor)
        return loss

    def update(self) -> None:
        """Clips, steps, and drops the gradients."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One training step."""
        self.forward().backward()  # type: ignore[no-untyped-call]
        self.update()


def random_batch(
    config: ResNetBKConfig, batch_size: int, sequence_length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and targets ``(B, N)`` without meaning, always the same."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (batch_size, sequence_length + 1), generator=generator)
    return tokens[:, :-1].contiguous().to(device), tokens[:, 1:].contiguous().to(device)


def synchronizer(device: torch.device) -> Callable[[], None]:
    """What waits until the device has done what was asked of it."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None
