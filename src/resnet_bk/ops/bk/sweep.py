"""The algorithm of BK-Core: ratios of neighbouring determinants, one sweep from each end, and the exact adjoint.

    l_i = 1 / (a_i - t_{i-1} l_{i-1})       from the left,  l_0 the given state (0 at the start of a chain)
    r_i = 1 / (a_i - t_i r_{i+1})           from the right
    G_ii = 1 / (a_i - t_{i-1} l_{i-1} - t_i r_{i+1})

For eta = Im z > 0 and t >= 0, Im l > 0 and |l| <= 1/eta at every step, whatever N and v: no clamp, epsilon or
rescaling is needed. The adjoint is again one linear recurrence per sweep (lambda is the gradient that reaches l_i,
gradients of complex numbers in torch's convention, d/dRe + i d/dIm):

    lambda_i = g_i + t_i conj(l_{i+1}^2) lambda_{i+1},    abar_i = -conj(l_i^2) lambda_i

Bonds are given to the left of each site: ``bonds[..., i, :]`` joins sites i-1 and i, and the first joins the given
state to site 0. A loop over N in Python, vectorised over rows and heads; works on every device.
"""

import torch
from torch import Tensor


def causal_sweep(a_BNH: Tensor, bonds: Tensor, initial_state_BH: Tensor) -> Tensor:
    """l_i for all i, complex ``(B, N, H)``; ``bonds`` real ``(H,)`` or ``(B, N, H)``."""
    sites_N = a_BNH.transpose(0, 1).contiguous()
    l_NBH = torch.empty_like(sites_N)
    bonds_N = _per_site(bonds.to(a_BNH.dtype), a_BNH)
    l_BH = initial_state_BH
    for a_BH, bond_BH, out_BH in zip(sites_N.unbind(0), bonds_N, l_NBH.unbind(0), strict=True):
        torch.reciprocal(torch.addcmul(a_BH, bond_BH, l_BH, value=-1), out=out_BH)
        l_BH = out_BH
    return l_NBH.transpose(0, 1).contiguous()


def causal_adjoint(grad_BNH: Tensor, l_BNH: Tensor, bonds: Tensor) -> Tensor:
    """abar_i for all i: what a gradient on every l_i makes of the gradient of every a_i."""
    conj_square_BNH = (l_BNH * l_BNH).conj().resolve_conj()
    factors_N = (bonds * conj_square_BNH).expand_as(l_BNH).transpose(0, 1).contiguous().unbind(0)
    grads_N = grad_BNH.transpose(0, 1).contiguous().unbind(0)
    lambda_NBH = torch.empty_like(l_BNH.transpose(0, 1), memory_format=torch.contiguous_format)
    outs_N = lambda_NBH.unbind(0)
    for site in range(len(outs_N) - 1, -1, -1):
        if site == len(outs_N) - 1:
            outs_N[site].copy_(grads_N[site])
        else:
            torch.addcmul(grads_N[site], factors_N[site + 1], outs_N[site + 1], out=outs_N[site])
    return -conj_square_BNH * lambda_NBH.transpose(0, 1)


def bond_gradient(abar_BNH: Tensor, l_BNH: Tensor, initial_state_BH: Tensor) -> Tensor:
    """Gradient of the bond to the left of each site, real ``(B, N, H)``: d a_i - t l_{i-1} makes -l_{i-1} of t."""
    previous_BNH = torch.cat([initial_state_BH.unsqueeze(1), l_BNH[:, :-1]], dim=1)
    return -(previous_BNH.conj() * abar_BNH).real


def bidirectional_sweeps(a_BNH: Tensor, bonds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(l_i, r_i, G_ii) for all i, each complex ``(B, N, H)``."""
    nothing_BH = torch.zeros_like(a_BNH[:, 0])
    l_BNH = causal_sweep(a_BNH, bonds, nothing_BH)
    r_BNH = causal_sweep(a_BNH.flip(1), mirror_bonds(bonds), nothing_BH).flip(1)
    left_BNH, right_BNH = side_bonds(bonds, a_BNH)
    denominator_BNH = a_BNH - left_BNH * shift_right(l_BNH) - right_BNH * shift_left(r_BNH)
    return l_BNH, r_BNH, denominator_BNH.reciprocal()


def bidirectional_adjoint(
    grad_BNH: Tensor, l_BNH: Tensor, r_BNH: Tensor, g_BNH: Tensor, bonds: Tensor
) -> tuple[Tensor, Tensor]:
    """(abar, gradient of the bond to the left of each site): all of dG_jj/da_i = -G_ji G_ij, not only i = j."""
    q_BNH = (g_BNH * g_BNH).conj() * grad_BNH
    left_BNH, right_BNH = side_bonds(bonds, g_BNH)
    grad_l_BNH, grad_r_BNH = shift_left(left_BNH * q_BNH), shift_right(right_BNH * q_BNH)
    abar_l_BNH = causal_adjoint(grad_l_BNH, l_BNH, bonds)
    abar_r_BNH = causal_adjoint(grad_r_BNH.flip(1), r_BNH.flip(1), mirror_bonds(bonds)).flip(1)
    # The bond between i-1 and i enters G_ii with l_{i-1}, G_{i-1,i-1} with r_i, and each sweep once.
    direct_BNH = (shift_right(l_BNH).conj() * q_BNH).real + (r_BNH.conj() * shift_right(q_BNH)).real
    swept_BNH = (shift_right(l_BNH).conj() * abar_l_BNH).real + (r_BNH.conj() * shift_right(abar_r_BNH)).real
    return abar_l_BNH + abar_r_BNH - q_BNH, direct_BNH - swept_BNH


def tunnel_sweep(w_BNH: Tensor, initial_state_BH: Tensor) -> Tensor:
    """log l_i = -log1p(w_i + m_{i-1}) with m_i = (w_i + m_{i-1}) / (1 + w_i + m_{i-1}), real ``(B, N, H)``."""
    s_NBH = w_BNH.transpose(0, 1).contiguous().clone()
    m_BH = initial_state_BH
    for s_BH in s_NBH.unbind(0):
        s_BH.add_(m_BH)
        m_BH = s_BH / (1 + s_BH)
    return -torch.log1p(s_NBH).transpose(0, 1).contiguous()


def tunnel_adjoint(grad_BNH: Tensor, log_l_BNH: Tensor) -> Tensor:
    """Gradient of w_i, the first also that of the initial m. With s = w + m: d log l/ds = -l, dm/ds = l^2."""
    l_NBH = log_l_BNH.transpose(0, 1).exp()
    direct_N = (-l_NBH * grad_BNH.transpose(0, 1)).contiguous().unbind(0)
    squares_N = (l_NBH * l_NBH).contiguous().unbind(0)
    sbar_NBH = torch.empty_like(l_NBH, memory_format=torch.contiguous_format)
    outs_N = sbar_NBH.unbind(0)
    for site in range(len(outs_N) - 1, -1, -1):
        if site == len(outs_N) - 1:
            outs_N[site].copy_(direct_N[site])
        else:
            torch.addcmul(direct_N[site], squares_N[site], outs_N[site + 1], out=outs_N[site])
    return sbar_NBH.transpose(0, 1).contiguous()


def side_bonds(bonds: Tensor, like_BNH: Tensor) -> tuple[Tensor, Tensor]:
    """The bond to the left and to the right of each site; beyond the ends there is no neighbour to weigh."""
    left_BNH = bonds.expand(like_BNH.shape)
    return left_BNH, shift_left(left_BNH)


def shift_right(x_BNH: Tensor) -> Tensor:
    """x_{i-1} at i, and 0 at the first site."""
    return torch.cat([torch.zeros_like(x_BNH[:, :1]), x_BNH[:, :-1]], dim=1)


def shift_left(x_BNH: Tensor) -> Tensor:
    """x_{i+1} at i, and 0 at the last site."""
    return torch.cat([x_BNH[:, 1:], torch.zeros_like(x_BNH[:, :1])], dim=1)


def mirror_bonds(bonds: Tensor) -> Tensor:
    """Bonds to the left of each site of the chain read from its right end."""
    return bonds if bonds.dim() == 1 else shift_left(bonds).flip(1)


def _per_site(bonds: Tensor, like_BNH: Tensor) -> tuple[Tensor, ...]:
    if bonds.dim() == 1:
        return (bonds,) * like_BNH.shape[1]
    return bonds.transpose(0, 1).contiguous().unbind(0)
