"""Rotary positions: pairs of coordinates turn with the position. Source: J. Su et al., RoFormer (2021)."""

import torch
from torch import Tensor


def rotate(x_BHND: Tensor, position_ids_BN: Tensor, theta: float) -> Tensor:
    """Coordinates (i, i + D/2) of ``x_BHND`` turned by position x theta^(-2i/D), the angles in float32 at least."""
    half = x_BHND.shape[-1] // 2
    dtype = torch.promote_types(x_BHND.dtype, torch.float32)
    frequencies = theta ** (-torch.arange(half, device=x_BHND.device, dtype=dtype) / half)
    angles = position_ids_BN[:, None, :, None].to(dtype) * frequencies
    cos, sin = angles.cos(), angles.sin()
    first, second = x_BHND[..., :half].to(dtype), x_BHND[..., half:].to(dtype)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x_BHND.dtype)
