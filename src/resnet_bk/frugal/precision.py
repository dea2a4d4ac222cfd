"""Weights in a half type, for what multiplies; the rest stays float32."""

from collections.abc import Callable

import torch
from torch import nn

HALF_TYPES = (torch.bfloat16, torch.float16)


def is_vector(_name: str, parameter: nn.Parameter) -> bool:
    """Norms, biases and the like: little memory, and worth their digits."""
    return parameter.dim() < 2


def half_weights(
    module: nn.Module, dtype: torch.dtype, *, keep: Callable[[str, nn.Parameter], bool] = is_vector
) -> None:
    """Rounds the float32 parameters of ``module`` to ``dtype``, one after the other, in place; not those of ``keep``.

    For training under autocast, with an optimizer that has the masters: make that first.

    Raises:
        ValueError: ``dtype`` is not a half type.
    """
    if dtype not in HALF_TYPES:
        raise ValueError(f"half weights are bfloat16 or float16, not {dtype}")
    for name, parameter in module.named_parameters():
        if parameter.dtype == torch.float32 and not keep(name, parameter):
            parameter.data = parameter.data.to(dtype)
