"""The algorithm of BK-Core in plain torch, for every device: ratios of neighbouring determinants, and their adjoint.

    l_i = 1 / (a_i - t_{i-1} l_{i-1})       from the left,  l_0 the given state (0 at the start of a chain)
    r_i = 1 / (a_i - t_i r_{i+1})           from the right
    G_ii = 1 / (a_i - t_{i-1} l_{i-1} - t_i r_{i+1})

For eta = Im z > 0 and t >= 0, Im l > 0 and |l| <= 1/eta at every step, whatever N and v: no clamp, epsilon or
rescaling is needed. The adjoint is again one linear recurrence per sweep (lambda is the gradient that reaches l_i,
gradients of complex numbers in torch's convention, d/dRe + i d/dIm):

    lambda_i = g_i + t_i conj(l_{i+1}^2) lambda_{i+1},    abar_i = -conj(l_i^2) lambda_i

The tunnelling regime has m_i = s_i / (1 + s_i), s_i = w_i + m_{i-1}, log l_i = -log1p(s_i); its adjoint is linear too.

Parallel in N: the tokens are cut into blocks which are swept side by side, ``BLOCK`` Python steps whatever N. What a
block does to the state that enters it is a Moebius map, a 2x2 matrix up to scale; prefix products of these, in
log2(N / BLOCK) rounds and double precision, give every block its entering state, and the ratios are then swept from
there. Nothing is differentiated through the matrices: the adjoint is its own scan.

Bonds are given to the left of each site: ``bonds[..., i, :]`` joins sites i-1 and i, and the first joins the given
state to site 0. Complex numbers are pairs of reals in the last axis of what goes in and out.
"""

import torch
from torch import Tensor

BLOCK = 64


def causal(v_BNH: Tensor, shift_H2: Tensor, bonds: Tensor, state_BH2: Tensor, *, reverse: bool = False) -> Tensor:
    """l_i for all i, ``(B, N, H, 2)``; ``reverse`` sweeps from the right end."""
    a_BNH = v_BNH.to(shift_H2.dtype) + torch.view_as_complex(shift_H2)
    state_BH = torch.view_as_complex(state_BH2)
    if not reverse:
        return torch.view_as_real(_ratios(a_BNH, bonds, state_BH))
    return torch.view_as_real(_ratios(a_BNH.flip(1), mirror_bonds(bonds), state_BH).flip(1).contiguous())


def causal_adjoint(
    grad_BNH2: Tensor, l_BNH2: Tensor, bonds: Tensor, state_BH2: Tensor, *, wants_bonds: bool, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of v ``(B, N, H)``, shift ``(H, 2)``, bonds (as given; empty if not wanted), state ``(B, H, 2)``."""
    grad_BNH, l_BNH, state_BH = (torch.view_as_complex(x.contiguous()) for x in (grad_BNH2, l_BNH2, state_BH2))
    if reverse:
        grad_BNH, l_BNH, bonds = grad_BNH.flip(1), l_BNH.flip(1), mirror_bonds(bonds)
    conj_square_BNH = (l_BNH * l_BNH).conj().resolve_conj()
    lambda_BNH = _affine((bonds * conj_square_BNH).flip(1), grad_BNH.flip(1)).flip(1)
    abar_BNH = -conj_square_BNH * lambda_BNH
    first_bond = bonds if bonds.dim() == 1 else bonds[:, 0]
    state_bar_BH2 = torch.view_as_real(-first_bond * abar_BNH[:, 0])
    bonds_bar = bonds.new_empty(0, *bonds.shape[1:])
    if wants_bonds:
        before_BNH = torch.cat([state_BH.unsqueeze(1), l_BNH[:, :-1]], dim=1)
        per_token_BNH = -(before_BNH.conj() * abar_BNH).real
        if bonds.dim() == 1:
            bonds_bar = per_token_BNH.sum((0, 1), dtype=_widest(per_token_BNH)).to(per_token_BNH.dtype)
        else:
            # Mirrored, the bond before the first site is the one that is not there.
            bonds_bar = mirror_bonds(per_token_BNH) if reverse else per_token_BNH.contiguous()
    if reverse:
        abar_BNH = abar_BNH.flip(1)
    abar_BNH2 = torch.view_as_real(abar_BNH)
    # A sum over a million sites of either sign may be small beside them.
    shift_bar_H2 = abar_BNH2.sum((0, 1), dtype=_widest(abar_BNH2)).to(abar_BNH2.dtype)
    return abar_BNH.real.contiguous(), shift_bar_H2, bonds_bar, state_bar_BH2


def bidirectional(v_BNH: Tensor, shift_H2: Tensor, bonds: Tensor) -> Tensor:
    """G_ii of the whole chain, ``(B, N, H, 2)``."""
    nothing_BH2 = torch.zeros(v_BNH.shape[0], *shift_H2.shape, dtype=shift_H2.dtype, device=v_BNH.device)
    l_BNH = torch.view_as_complex(causal(v_BNH, shift_H2, bonds, nothing_BH2))
    r_BNH = torch.view_as_complex(causal(v_BNH, shift_H2, bonds, nothing_BH2, reverse=True))
    a_BNH = v_BNH.to(shift_H2.dtype) + torch.view_as_complex(shift_H2)
    left_BNH, right_BNH = side_bonds(bonds, l_BNH)
    denominator_BNH = a_BNH - left_BNH * shift_right(l_BNH) - right_BNH * shift_left(r_BNH)
    return torch.view_as_real(denominator_BNH.reciprocal())


def tunnel(w_BNH: Tensor, state_BH: Tensor) -> Tensor:
    """log l_i = -log1p(w_i + m_{i-1}), ``(B, N, H)`` in the state's type."""
    wide = _widest(w_BNH)
    w_BKCH, length = _blocks(w_BNH.to(wide))
    m_BKH = state_BH.to(wide).unsqueeze(1)
    if w_BKCH.shape[1] > 1:
        # m -> (m + w) / (m + 1 + w): entries and determinant are positive, so that products lose nothing.
        one = torch.ones_like(w_BKCH[:, :, 0])
        block_BKH = (one, torch.zeros_like(one), torch.zeros_like(one), one)
        for w_BKH in w_BKCH.unbind(2):
            block_BKH = _product((one, w_BKH, one, 1 + w_BKH), block_BKH)
        m_BKH = _entering(block_BKH, m_BKH)
    s_BKCH = torch.empty_like(w_BKCH)
    for w_BKH, s_BKH in zip(w_BKCH.unbind(2), s_BKCH.unbind(2), strict=True):
        torch.add(w_BKH, m_BKH, out=s_BKH)
        m_BKH = s_BKH / (1 + s_BKH)
    return -torch.log1p(s_BKCH.flatten(1, 2)[:, :length]).to(state_BH.dtype)


def tunnel_adjoint(grad_BNH: Tensor, log_l_BNH: Tensor) -> Tensor:
    """Gradient of w_i, the first also that of the initial m. With s = w + m: d log l/ds = -l, dm/ds = l^2."""
    wide = _widest(log_l_BNH)
    l_BNH = 1 + torch.expm1(log_l_BNH.to(wide))
    # s-bar_i = -l_i g_i + l_i^2 s-bar_{i+1}: on its way from site i+1 to i it is weighed by site i.
    factors_BNH = shift_right(l_BNH * l_BNH)
    return _affine(factors_BNH.flip(1), (-l_BNH * grad_BNH).flip(1)).flip(1).to(log_l_BNH.dtype).contiguous()


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


Matrix = tuple[Tensor, Tensor, Tensor, Tensor]


def _ratios(a_BNH: Tensor, bonds: Tensor, state_BH: Tensor) -> Tensor:
    """l_i of the causal chain, complex ``(B, N, H)``, blocks side by side."""
    a_BKCH, length = _blocks(a_BNH)
    bonds_BKCH = _blocks(bonds.expand(a_BNH.shape))[0]
    l_BKH = state_BH.unsqueeze(1)
    if a_BKCH.shape[1] > 1:
        wide = torch.complex(*[torch.empty(0, dtype=_widest(a_BNH.real))] * 2).dtype
        one = torch.ones_like(a_BKCH[:, :, 0], dtype=wide)
        block_BKH = (one, torch.zeros_like(one), torch.zeros_like(one), one)
        for a_BKH, bond_BKH in zip(a_BKCH.to(wide).unbind(2), bonds_BKCH.unbind(2), strict=True):
            block_BKH = _product((torch.zeros_like(one), one, -bond_BKH * one, a_BKH), block_BKH)
        l_BKH = _entering(block_BKH, l_BKH.to(wide)).to(a_BNH.dtype)
    l_BKCH = torch.empty_like(a_BKCH)
    for a_BKH, bond_BKH, out_BKH in zip(a_BKCH.unbind(2), bonds_BKCH.unbind(2), l_BKCH.unbind(2), strict=True):
        l_BKH = (a_BKH - bond_BKH * l_BKH).reciprocal()
        out_BKH.copy_(l_BKH)
    return l_BKCH.flatten(1, 2)[:, :length].contiguous()


def _affine(factors_BNH: Tensor, offsets_BNH: Tensor) -> Tensor:
    """x_i = offset_i + factor_{i-1} x_{i-1} with x before the first 0: blocks side by side, then their carries.

    The factor at i weighs x_i as it goes on to the next site.
    """
    factors_BKCH, length = _blocks(factors_BNH)
    offsets_BKCH = _blocks(offsets_BNH)[0]
    x_BKCH, products_BKCH = torch.empty_like(offsets_BKCH), torch.empty_like(factors_BKCH)
    carried_BKH = torch.zeros_like(offsets_BKCH[:, :, 0])
    product_BKH = torch.ones_like(factors_BKCH[:, :, 0])
    for factor, offset, x, product in zip(
        factors_BKCH.unbind(2), offsets_BKCH.unbind(2), x_BKCH.unbind(2), products_BKCH.unbind(2), strict=True
    ):
        torch.add(offset, carried_BKH, out=x)
        product.copy_(product_BKH)
        carried_BKH, product_BKH = factor * x, factor * product_BKH
    # What a block hands on is carried + product x what enters it: affine maps compose, in log2 rounds.
    reach = 1
    while reach < x_BKCH.shape[1]:
        earlier_carried = carried_BKH[:, :-reach] * product_BKH[:, reach:]
        carried_BKH = torch.cat([carried_BKH[:, :reach], carried_BKH[:, reach:] + earlier_carried], dim=1)
        product_BKH = torch.cat([product_BKH[:, :reach], product_BKH[:, reach:] * product_BKH[:, :-reach]], dim=1)
        reach *= 2
    entering_BKH = shift_right(carried_BKH)
    return (x_BKCH + products_BKCH * entering_BKH.unsqueeze(2)).flatten(1, 2)[:, :length]


def _entering(block_BKH: Matrix, state_B1H: Tensor) -> Tensor:
    """The state that enters each block, ``(B, K, H)``: the product of the maps of all earlier blocks, applied."""
    reach, length = 1, block_BKH[0].shape[1]
    while reach < length:
        later = _product(
            tuple(entry[:, reach:] for entry in block_BKH),  # type: ignore[arg-type]
            tuple(entry[:, :-reach] for entry in block_BKH),  # type: ignore[arg-type]
        )
        block_BKH = tuple(  # type: ignore[assignment]
            torch.cat([entry[:, :reach], new], dim=1) for entry, new in zip(block_BKH, later, strict=True)
        )
        reach *= 2
    p, q, r, s = (entry[:, :-1] for entry in block_BKH)
    return torch.cat([state_B1H, (p * state_B1H + q) / (r * state_B1H + s)], dim=1)


def _product(second: Matrix, first: Matrix) -> Matrix:
    """Entries of the matrix product (row by row), scaled so that the largest entry is of order 1."""
    (a, b, c, d), (e, f, g, h) = second, first
    entries = (a * e + b * g, a * f + b * h, c * e + d * g, c * f + d * h)
    largest = torch.stack([entry.abs() for entry in entries]).amax(0)
    p, q, r, s = (entry / largest for entry in entries)
    return p, q, r, s


def _blocks(x_BNH: Tensor) -> tuple[Tensor, int]:
    """``(B, K, C, H)`` with K blocks of C tokens, zeros after the last, and N. Short sequences are one block."""
    length = x_BNH.shape[1]
    size = BLOCK if length > 2 * BLOCK else length
    missing = -length % size
    if missing:
        x_BNH = torch.cat([x_BNH, x_BNH.new_zeros(x_BNH.shape[0], missing, x_BNH.shape[2])], dim=1)
    return x_BNH.reshape(x_BNH.shape[0], -1, size, x_BNH.shape[2]), length


def _widest(like: Tensor) -> torch.dtype:
    """float64, but for devices that have none."""
    return torch.float32 if like.device.type == "mps" else torch.float64
