"""Pairs of coordinates turned by an angle: coordinates (i, i + D/2) are real and imaginary part of one number."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x (..., D)`` turned by the angles of ``cos`` and ``sin``, which broadcast to ``(..., D/2)``, in x's type."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
