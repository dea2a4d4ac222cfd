"""The resolvent by dense inversion in complex128: slow, and independent of everything under test."""

import torch
from torch import Tensor


def dense_resolvent(
    v_BNH: Tensor,
    z_H: Tensor,
    h0_H: Tensor,
    hopping_BNH: Tensor,
    *,
    causal: bool,
    first_bond_state: Tensor | None = None,
) -> Tensor:
    """diag((H - z)^-1), or for the causal form the last entry of each leading block's inverse.

    ``hopping_BNH`` is (B, N-1, H). ``first_bond_state`` (B, H) is t l of the token before the first, taken off its
    diagonal entry.
    """
    a_BNH = v_BNH.to(torch.complex128) + h0_H - z_H
    if first_bond_state is not None:
        a_BNH = torch.cat([a_BNH[:, :1] - first_bond_state.unsqueeze(1), a_BNH[:, 1:]], dim=1)
    batch_size, length, heads = a_BNH.shape
    chains = []
    for row in range(batch_size):
        for head in range(heads):
            side = torch.sqrt(hopping_BNH[row, :, head].to(torch.complex128))
            matrix = torch.diag(a_BNH[row, :, head]) + torch.diag(side, 1) + torch.diag(side, -1)
            if causal:
                entries = [torch.linalg.inv(matrix[: i + 1, : i + 1])[i, i] for i in range(length)]
                chains.append(torch.stack(entries))
            else:
                chains.append(torch.linalg.inv(matrix).diagonal())
    return torch.stack(chains).view(batch_size, heads, length).transpose(1, 2)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, NaN if anything is."""
    wide = torch.complex128 if expected.is_complex() else torch.float64
    actual, expected = actual.detach(), expected.detach()
    difference = (actual.to(wide) - expected.to(wide)).norm()
    return float(difference / expected.to(wide).norm().clamp(min=1e-300))
