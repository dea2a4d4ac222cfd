"""Rotary positions: pairs of coordinates turn with the position. Source: J. Su et al., RoFormer (2021)."""

import torch
from torch import Tensor


def rotary_angles(position_ids_BN: Tensor, size: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position x theta^(-2i/D) for the pairs i of D = ``size`` coordinates, ``(B, N, D/2)``.

    The angles are reduced in double precision, where the device has it: in float32 the millionth position is 0.06 off.
    """
    half = size // 2
    widest = dtype if position_ids_BN.device.type == "mps" else torch.float64
    frequencies = theta ** (-torch.arange(half, device=position_ids_BN.device, dtype=widest) / half)
    angles = (position_ids_BN.unsqueeze(-1).to(widest) * frequencies).remainder(2 * torch.pi).to(dtype)
    return angles.cos(), angles.sin()
