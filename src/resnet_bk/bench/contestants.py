"""The models that are compared: ours, the baseline, and beside a resolvent mixer the seed's."""

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from resnet_bk.errors import UserError
from resnet_bk.memory.parameters import count_parameters
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.models.foreign import PREFIX, build_foreign, foreign_config
from resnet_bk.models.matching import match_total_parameters, total_parameters
from resnet_bk.models.presets import PRESETS
from resnet_bk.schema import Contestant

OURS, BASELINE, SEED_MIXER = "resnet-bk", "transformer", "seed-mixer"
LABELS = {OURS: "ResNet-BK", BASELINE: "Transformer", SEED_MIXER: "Seed's mixer"}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model that can be built: ``config`` is None unless it is one of ours."""

    key: str
    label: str
    source: str
    config: ResNetBKConfig | None
    build: Callable[[], nn.Module]

    def with_seed(self, seed: int) -> nn.Module:
        """Fresh weights."""
        torch.manual_seed(seed)
        return self.build()


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


def contenders(preset: str, overrides: dict[str, Any], baseline: str | None, vocab_size: int) -> dict[str, Contender]:
    """Ours first, then the baseline: the same with attention unless ``baseline`` names a preset, ``hf:`` and a
    configuration of transformers, or ``module:function`` that returns an nn.Module for a vocab_size.

    Raises:
        UserError: there is no such baseline, or a field does not fit.
    """
    try:
        configs = contestant_configs(preset, {"vocab_size": vocab_size, **overrides})
    except ValueError as error:
        raise UserError(str(error)) from None
    found = {key: _ours(key, LABELS[key], f"preset {preset}", config) for key, config in configs.items()}
    if baseline is not None:
        found[BASELINE] = _baseline(baseline, vocab_size)
    return found


def bk_contestant(configs: Mapping[str, ResNetBKConfig]) -> str | None:
    """The contestant whose mixer is the seed's: it has an analytic gradient, and a form that reads the future."""
    return next((key for key, config in configs.items() if config.mixer == "bk"), None)


def describe_contestant(contender: Contender) -> Contestant:
    """What a report says of a model."""
    if contender.config is not None:
        counts = count_parameters(contender.config)
        total, active, config = counts.total, counts.active, contender.config.own_fields()
    else:
        # There is no other way to count a model that is not ours.
        model = contender.with_seed(0)
        to_dict = getattr(getattr(model, "config", None), "to_dict", dict)
        total, active, config = sum(parameter.numel() for parameter in model.parameters()), None, to_dict()
    return Contestant(
        key=contender.key,
        label=contender.label,
        source=contender.source,
        parameters=total,
        active_parameters=active,
        config=config,
    )


def without_position_table(config: ResNetBKConfig) -> ResNetBKConfig:
    """The same model for any length."""
    return ResNetBKConfig(**{**config.own_fields(), "max_position_embeddings": None})


def build_model(config: ResNetBKConfig, seed: int) -> ResNetBKForCausalLM:
    """Fresh weights. A bidirectional model does not warn here: the report says what it is."""
    torch.manual_seed(seed)
    return _quietly(config)


def _quietly(config: ResNetBKConfig) -> ResNetBKForCausalLM:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="causal=False", category=UserWarning)
        return ResNetBKForCausalLM(config)


def _ours(key: str, label: str, source: str, config: ResNetBKConfig) -> Contender:
    return Contender(key=key, label=label, source=source, config=config, build=lambda: _quietly(config))


def _baseline(name: str, vocab_size: int) -> Contender:
    if name in PRESETS:
        try:
            config = ResNetBKConfig.from_preset(name, vocab_size=vocab_size)
        except ValueError as error:
            raise UserError(f"--baseline {name}: {error}") from None
        return _ours(BASELINE, f"Preset {name}", f"preset {name}", config)
    if name.startswith(PREFIX):
        return _hugging_face(name, vocab_size)
    if ":" in name:
        return _from_function(name, vocab_size)
    raise UserError(
        f"--baseline {name!r} is not known; choose a preset ({', '.join(PRESETS)}), hf:NAME_OR_PATH or module:function"
    )


def _hugging_face(name: str, vocab_size: int) -> Contender:
    config = foreign_config(name)
    config.vocab_size = vocab_size
    return Contender(
        key=BASELINE,
        label=config.model_type,
        source=name,
        config=config if isinstance(config, ResNetBKConfig) else None,
        build=partial(build_foreign, config, name),
    )


def _takes_one(function: object) -> bool:
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(0)
    except TypeError:
        return False
    except ValueError:  # some of what is written in C does not say what it takes
        return True
    return True


def _from_function(name: str, vocab_size: int) -> Contender:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--baseline {name} cannot be had ({error}); is the module on PYTHONPATH?") from None
    if not _takes_one(function):
        raise UserError(f"--baseline {name} is called with a vocab_size and nothing else, and does not take that")

    def build() -> nn.Module:
        model = function(vocab_size)
        if not isinstance(model, nn.Module):
            raise UserError(f"--baseline {name} makes a {type(model).__name__}; it has to make an nn.Module")
        return model

    return Contender(key=BASELINE, label=function_name, source=name, config=None, build=build)
