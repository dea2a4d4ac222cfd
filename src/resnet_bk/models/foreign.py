"""Causal language models of transformers, by their configurations alone."""

import re
from pathlib import Path
from typing import Any

from torch import nn

from resnet_bk.errors import UserError
from resnet_bk.files import from_home
from resnet_bk.hub import hub_file

PREFIX = "hf:"
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def foreign_config(spec: str) -> Any:
    """A transformers configuration: ``spec`` is ``hf:`` and a folder with a config.json, or a repository of the Hub.

    Raises:
        UserError: there is none, it is damaged, or it is of another kind of model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    folder = _folder(spec.removeprefix(PREFIX), spec)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a class of configurations checks, or does not
        raise UserError(f"{spec} has no configuration that can be read ({_first_lines(error)}); mend it") from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{spec} is of type {config.model_type}, no causal language model; choose one, like hf:gpt2")
    for name in SIZES:
        if isinstance(size := getattr(config, name, None), int) and size < 1:
            raise UserError(f"{spec} has {name} {size}, which has to be at least 1; mend its config.json")
    return config


def build_foreign(config: Any, spec: str) -> nn.Module:
    """The model, with fresh weights.

    Raises:
        UserError: the configuration describes none.
    """
    from transformers import AutoModelForCausalLM

    try:
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    except (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{spec} cannot be built from its configuration ({_first_lines(error)}); mend it") from None
    return model


def _folder(name: str, spec: str) -> Path:
    path = from_home(name)
    if (path / "config.json").is_file():
        return path
    if path.exists():
        raise UserError(f"{spec} has no config.json; give the folder of a model of transformers")
    if not REPOSITORY.fullmatch(name):
        raise UserError(f"there is no folder {path}; give one, or a repository of the Hub like hf:gpt2")
    return hub_file(name, "config.json").parent


def _first_lines(error: Exception) -> str:
    """The first two: one may be but a heading."""
    return " ".join(" ".join(str(error).strip().splitlines()[:2]).split()) or type(error).__name__
