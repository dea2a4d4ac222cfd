"""The definition of BK-Core: determinants of the chain's leading and trailing parts, in complex128.

    theta_i = a_i theta_{i-1} - t_{i-1} theta_{i-2},   theta_0 = 1, theta_{-1} = l_0
    phi_i   = a_i phi_{i+1}   - t_i     phi_{i+2},     phi_{N+1} = 1, phi_{N+2} = 0
    causal          l_i  = theta_{i-1} / theta_i                = [(H_{<=i} - z)^-1]_ii
    bidirectional   G_ii = theta_{i-1} phi_{i+1} / theta_N      = [(H - z)^-1]_ii

The determinants grow exponentially (they leave complex128 near N = 1000), so each is kept as a mantissa and a
power of two, which is exact. Autograd differentiates straight through. Slow and exact: the oracle, not the algorithm.
Source: J. Meurant, "A review on the inverse of symmetric tridiagonal and block tridiagonal matrices" (1992).
"""

import torch
from torch import Tensor


def bk_causal_reference(v_BNH: Tensor, shift_H: Tensor, bonds: Tensor, initial_state_BH: Tensor) -> Tensor:
    """l_i for all i. Arguments as ``operators.bk_causal``; computed and returned in complex128."""
    a_BNH = v_BNH.to(torch.float64) + shift_H.to(torch.complex128)
    thetas, _ = _determinants(a_BNH, _left_bonds(bonds, a_BNH), initial_state_BH.to(torch.complex128))
    ratios = [before / after for before, after in thetas]
    return torch.stack(ratios, dim=1) if ratios else a_BNH


def bk_bidirectional_reference(v_BNH: Tensor, shift_H: Tensor, bonds: Tensor) -> Tensor:
    """G_ii for all i. Arguments as ``operators.bk_bidirectional``; computed and returned in complex128."""
    a_BNH = v_BNH.to(torch.float64) + shift_H.to(torch.complex128)
    if a_BNH.shape[1] == 0:
        return a_BNH
    left_bonds_BNH = _left_bonds(bonds, a_BNH)
    nothing_BH = torch.zeros_like(a_BNH[:, 0])
    thetas, theta_exponents = _determinants(a_BNH, left_bonds_BNH, nothing_BH)
    # Seen from the right end, the bond to the left of a site is the one to the right of its mirror image.
    mirrored_bonds_BNH = left_bonds_BNH.roll(-1, dims=1).flip(1)
    phis, phi_exponents = _determinants(a_BNH.flip(1), mirrored_bonds_BNH, nothing_BH)
    whole, whole_exponent = thetas[-1][1], theta_exponents[-1]
    diagonal = []
    for site in range(a_BNH.shape[1]):
        mirror = a_BNH.shape[1] - 1 - site
        exponent = theta_exponents[site] + phi_exponents[mirror] - whole_exponent
        diagonal.append(thetas[site][0] * phis[mirror][0] / whole * torch.exp2(exponent))
    return torch.stack(diagonal, dim=1)


def bk_tunnel_reference(w_BNH: Tensor, initial_state_BH: Tensor) -> Tensor:
    """log l for the tunnelling chain (t = 1, a_i = 2 + w_i), in float64. Arguments as ``operators.bk_tunnel``.

    The determinants in the variable m = 1 - l: with d_i = theta_i - theta_{i-1} > 0, every term is positive and
    nothing cancels: d_i = d_{i-1} + w_i theta_{i-1}, theta_i = theta_{i-1} + d_i, log l_i = -log1p(d_i / theta_{i-1}).
    """
    w_BNH = w_BNH.to(torch.float64)
    theta_BH = torch.ones_like(initial_state_BH, dtype=torch.float64)
    step_BH = initial_state_BH.to(torch.float64)
    log_l = []
    for w_BH in w_BNH.unbind(1):
        step_BH = step_BH + w_BH * theta_BH
        log_l.append(-torch.log1p(step_BH / theta_BH))
        theta_BH = theta_BH + step_BH
        scale_BH = _power_of_two(theta_BH)
        theta_BH, step_BH = theta_BH / scale_BH, step_BH / scale_BH
    return torch.stack(log_l, dim=1) if log_l else w_BNH


def _determinants(
    a_BNH: Tensor, left_bonds_BNH: Tensor, before_first_BH: Tensor
) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """For each site i the mantissas (theta_{i-1}, theta_i), and their common binary exponent."""
    pairs, exponents = [], []
    before_BH, theta_BH = before_first_BH, torch.ones_like(before_first_BH)
    exponent_BH = torch.zeros_like(theta_BH.real)
    for a_BH, bond_BH in zip(a_BNH.unbind(1), left_bonds_BNH.unbind(1), strict=True):
        before_BH, theta_BH = theta_BH, a_BH * theta_BH - bond_BH * before_BH
        scale_BH = _power_of_two(torch.maximum(theta_BH.abs(), before_BH.abs()))
        before_BH, theta_BH = before_BH / scale_BH, theta_BH / scale_BH
        exponent_BH = exponent_BH + torch.log2(scale_BH)
        pairs.append((before_BH, theta_BH))
        exponents.append(exponent_BH)
    return pairs, exponents


def _power_of_two(magnitude: Tensor) -> Tensor:
    """The power of two at ``magnitude``, a constant to autograd: dividing by it changes no digit."""
    return torch.exp2(torch.floor(torch.log2(magnitude.detach())))


def _left_bonds(bonds: Tensor, like_BNH: Tensor) -> Tensor:
    """Bonds per head, or per site and head, as one bond to the left of each site."""
    return bonds.to(torch.complex128).expand_as(like_BNH)
