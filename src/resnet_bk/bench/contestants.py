"""The models that are compared, and what one training step of them is made of."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_bk.memory.parameters import count_parameters
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.models.matching import match_total_parameters, total_parameters
from resnet_bk.schema import SEED_MIXER, Contestant
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.micro_step import autocast
from resnet_bk.training.optimizer import build_optimizer

OURS, BASELINE = "resnet-bk", "transformer"
LABELS = {OURS: "ResNet-BK", BASELINE: "Transformer", SEED_MIXER: "Seed's mixer"}


def contestant_configs(preset: str, overrides: dict[str, Any]) -> dict[str, ResNetBKConfig]:
    """Ours, and the same model with its mixer exchanged for attention at equal total parameters.

    Beside a resolvent mixer the seed's stands too, as the seed has it: without a convolution.

    Raises:
        ValueError: a field does not fit.
    """
    ours = ResNetBKConfig.from_preset(preset, **overrides)
    configs = {OURS: ours, BASELINE: ResNetBKConfig.from_preset(preset, **{**overrides, "mixer": "attention"})}
    if ours.mixer == "resolvent":
        seeds = ResNetBKConfig(**{**ours.own_fields(), "mixer": "bk", "conv_size": 0})
        if "intermediate_size" not in overrides:
            seeds.intermediate_size = match_total_parameters(seeds, total_parameters(ours))
        configs[SEED_MIXER] = seeds
    return configs


def bk_contestant(configs: Mapping[str, ResNetBKConfig]) -> str | None:
    """The contestant whose mixer is the seed's: it has an analytic gradient, and a form that reads the future."""
    return next((key for key, config in configs.items() if config.mixer == "bk"), None)


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
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.max_grad_norm or math.inf)
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
