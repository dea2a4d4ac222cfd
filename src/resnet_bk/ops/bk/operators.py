"""The sweeps as torch operators: visible to autograd, fake tensors, torch.compile and FlopCounterMode.

Complex numbers are pairs of reals in the last axis here, which torch.compile can generate code around. Shapes:
``v_BNH`` real of any floating type; ``shift_H2 = h0 - z``, so that ``a_i = v_i + shift``; ``bonds`` real, ``(H,)`` or
``(B, N, H)``, the bond to the left of each site; ``initial_state_BH2`` the l before the first site. The shift's type,
float32 or float64, is that of the arithmetic and the result.

``blend`` None asks for the exact gradient; a number b asks for the analytic rule that keeps only i = j and blends
an inverse in, dL/da_i = -conj((1 - b) G_i^2 + b / G_i^2) g_i. It moves no gradient across tokens.

``backend`` names the module that sweeps: ``torch`` (scan), ``cpu`` or ``triton``.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from resnet_bk.ops.bk.scan import shift_left, shift_right, side_bonds
from resnet_bk.ops.operator import operator

# G -> 0 where the potential is huge, and 1/G^2 with it to infinity. This is the one bound on a magnitude in BK-Core,
# far above what a potential within +-100 of the energy gives (1/|G|^2 about 1e4).
BLEND_INVERSE_SQUARE_LIMIT = 1e6

# Real additions, multiplications and divisions per site and head: a complex product or square is 6, a product with a
# real number 2, a sum 2, a reciprocal 5 (3 for |a|^2, 2 quotients); changes of sign are free.
CAUSAL_FORWARD_FLOPS = 1 + 2 + 2 + 5  # a, t l, a - t l, reciprocal
CAUSAL_BACKWARD_FLOPS = 6 + 2 + 2 + 6  # l^2, t abar, g minus it, product
BIDIRECTIONAL_FORWARD_FLOPS = 2 * CAUSAL_FORWARD_FLOPS + 2 + 2 + 5  # two sweeps, t l off the right one's divisor, 1/x
# The sweeps again, q = conj(G^2) g, what it gives either sweep, the adjoints, their sum.
BIDIRECTIONAL_BACKWARD_FLOPS = 2 * CAUSAL_FORWARD_FLOPS + 6 + 6 + 2 * 2 + 2 * CAUSAL_BACKWARD_FLOPS + 2 * 2
TUNNEL_FORWARD_FLOPS = 1 + 1 + 1 + 1  # s, 1 + s, quotient, log1p counted as one
TUNNEL_BACKWARD_FLOPS = 1 + 1 + 1 + 1  # expm1 counted as one, l times the carry, minus g, times l

BACKENDS = {"torch": "scan", "cpu": "cpu", "triton": "gpu"}


class Sweeps(Protocol):
    """What a backend's module offers; ``scan`` has the formulas."""

    causal: Callable[..., Tensor]
    causal_adjoint: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    bidirectional: Callable[..., Tensor]
    tunnel: Callable[..., Tensor]
    tunnel_adjoint: Callable[..., Tensor]


def sweeps(backend: str) -> Sweeps:
    """The module of a backend, imported at its first use: compilers are slow to load."""
    return cast(Sweeps, import_module(f"resnet_bk.ops.bk.{BACKENDS[backend]}"))


@operator("resnet_bk::bk_causal")
def bk_causal(
    v_BNH: Tensor, shift_H2: Tensor, bonds: Tensor, initial_state_BH2: Tensor, blend: float | None, backend: str
) -> Tensor:
    """l_i of the causal chain, ``(B, N, H, 2)``."""
    return sweeps(backend).causal(v_BNH, shift_H2, bonds, initial_state_BH2)


@operator("resnet_bk::bk_causal_backward")
def bk_causal_backward(
    grad_BNH2: Tensor, l_BNH2: Tensor, bonds: Tensor, initial_state_BH2: Tensor, wants_bonds: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of v ``(B, N, H)``, shift ``(H, 2)``, bonds (empty if not wanted), initial state ``(B, H, 2)``."""
    return sweeps(backend).causal_adjoint(grad_BNH2, l_BNH2, bonds, initial_state_BH2, wants_bonds=wants_bonds)


@operator("resnet_bk::bk_bidirectional")
def bk_bidirectional(v_BNH: Tensor, shift_H2: Tensor, bonds: Tensor, blend: float | None, backend: str) -> Tensor:
    """G_ii of the whole chain, ``(B, N, H, 2)``. It depends on tokens to the right of i."""
    return sweeps(backend).bidirectional(v_BNH, shift_H2, bonds)


@operator("resnet_bk::bk_bidirectional_backward")
def bk_bidirectional_backward(
    grad_BNH2: Tensor, g_BNH2: Tensor, v_BNH: Tensor, shift_H2: Tensor, bonds: Tensor, wants_bonds: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of v, shift and bonds: all of dG_jj/da_i = -G_ji G_ij, not only i = j.

    G_ii = 1 / (a_i - t_{i-1} l_{i-1} - t_i r_{i+1}) hands q_i = conj(G_ii^2) g_i on to a_i, to the sweep from the left
    and to the one from the right, each of which has its own adjoint. The sweeps are done again rather than stored.
    """
    backend_sweeps = sweeps(backend)
    grad_BNH, g_BNH = torch.view_as_complex(grad_BNH2.contiguous()), torch.view_as_complex(g_BNH2)
    q_BNH = (g_BNH * g_BNH).conj() * grad_BNH
    left_BNH, right_BNH = side_bonds(bonds, g_BNH)
    nothing_BH2 = torch.zeros_like(g_BNH2[:, 0])
    v_bar_BNH, shift_bar_H2 = -q_BNH.real, -torch.view_as_real(q_BNH).sum((0, 1))
    bonds_bar = torch.empty_like(bonds[:0])
    ratios = {}
    for reverse, grad_ratio_BNH in ((False, shift_left(left_BNH * q_BNH)), (True, shift_right(right_BNH * q_BNH))):
        ratio_BNH2 = backend_sweeps.causal(v_BNH, shift_H2, bonds, nothing_BH2, reverse=reverse)
        v_bar, shift_bar, swept_bonds_bar, _ = backend_sweeps.causal_adjoint(
            torch.view_as_real(grad_ratio_BNH.contiguous()),
            ratio_BNH2,
            bonds,
            nothing_BH2,
            wants_bonds=wants_bonds,
            reverse=reverse,
        )
        v_bar_BNH, shift_bar_H2 = v_bar_BNH + v_bar, shift_bar_H2 + shift_bar
        if wants_bonds:
            bonds_bar = bonds_bar + swept_bonds_bar if reverse else swept_bonds_bar
            ratios[reverse] = torch.view_as_complex(ratio_BNH2)
    if wants_bonds:
        # The bond between i-1 and i enters G_ii with l_{i-1}, G_{i-1,i-1} with r_i, and each sweep once.
        l_BNH, r_BNH = ratios[False], ratios[True]
        direct_BNH = (shift_right(l_BNH).conj() * q_BNH).real + (r_BNH.conj() * shift_right(q_BNH)).real
        bonds_bar = bonds_bar + (direct_BNH.sum((0, 1)) if bonds.dim() == 1 else direct_BNH)
    return v_bar_BNH, shift_bar_H2, bonds_bar


@operator("resnet_bk::bk_tunnel")
def bk_tunnel(w_BNH: Tensor, initial_state_BH: Tensor, backend: str) -> Tensor:
    """log l_i of the tunnelling chain, ``(B, N, H)`` in the state's type."""
    return sweeps(backend).tunnel(w_BNH, initial_state_BH)


@operator("resnet_bk::bk_tunnel_backward")
def bk_tunnel_backward(grad_BNH: Tensor, log_l_BNH: Tensor, backend: str) -> Tensor:
    """Gradient of w, ``(B, N, H)``; its first site is also the gradient of the initial m."""
    return sweeps(backend).tunnel_adjoint(grad_BNH, log_l_BNH)


@bk_causal.register_fake
def _(v_BNH: Tensor, shift_H2: Tensor, bonds: Tensor, initial_state_BH2: Tensor, blend: Any, backend: str) -> Tensor:
    return shift_H2.new_empty(*v_BNH.shape, 2)


@bk_causal_backward.register_fake
def _(
    grad_BNH2: Tensor, l_BNH2: Tensor, bonds: Tensor, initial_state_BH2: Tensor, wants_bonds: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shift_bar_H2 = l_BNH2.new_empty(l_BNH2.shape[2:])
    return _real(l_BNH2), shift_bar_H2, _bonds_bar(bonds, wants_bonds), _contiguous(initial_state_BH2)


@bk_bidirectional.register_fake
def _(v_BNH: Tensor, shift_H2: Tensor, bonds: Tensor, blend: float | None, backend: str) -> Tensor:
    return shift_H2.new_empty(*v_BNH.shape, 2)


@bk_bidirectional_backward.register_fake
def _(
    grad_BNH2: Tensor, g_BNH2: Tensor, v_BNH: Tensor, shift_H2: Tensor, bonds: Tensor, wants_bonds: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _real(g_BNH2), _contiguous(shift_H2), _bonds_bar(bonds, wants_bonds)


@bk_tunnel.register_fake
def _(w_BNH: Tensor, initial_state_BH: Tensor, backend: str) -> Tensor:
    return initial_state_BH.new_empty(w_BNH.shape)


@bk_tunnel_backward.register_fake
def _(grad_BNH: Tensor, log_l_BNH: Tensor, backend: str) -> Tensor:
    return _contiguous(log_l_BNH)


def _contiguous(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _real(like_BNH2: Tensor) -> Tensor:
    return like_BNH2.new_empty(like_BNH2.shape[:-1])


def _bonds_bar(bonds: Tensor, wanted: bool) -> Tensor:
    return _contiguous(bonds) if wanted else bonds.new_empty(0, *bonds.shape[1:])


def _save_causal(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v_BNH, _, bonds, initial_state_BH2, ctx.blend, ctx.backend = inputs
    ctx.dtype = v_BNH.dtype
    ctx.save_for_backward(output, bonds, initial_state_BH2)


def _causal_gradients(ctx: Any, grad_BNH2: Tensor) -> tuple[Tensor | None, ...]:
    l_BNH2, bonds, initial_state_BH2 = ctx.saved_tensors
    if ctx.blend is not None:
        return *_blended(ctx, grad_BNH2, l_BNH2), None, None, None, None
    wants_bonds = ctx.needs_input_grad[2]
    v_bar, shift_bar, bonds_bar, state_bar = bk_causal_backward(
        grad_BNH2, l_BNH2, bonds, initial_state_BH2, wants_bonds, ctx.backend
    )
    return v_bar.to(ctx.dtype), shift_bar, bonds_bar if wants_bonds else None, state_bar, None, None


def _save_bidirectional(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v_BNH, shift_H2, bonds, ctx.blend, ctx.backend = inputs
    ctx.dtype = v_BNH.dtype
    ctx.save_for_backward(output, v_BNH, shift_H2, bonds)


def _bidirectional_gradients(ctx: Any, grad_BNH2: Tensor) -> tuple[Tensor | None, ...]:
    g_BNH2, v_BNH, shift_H2, bonds = ctx.saved_tensors
    if ctx.blend is not None:
        return *_blended(ctx, grad_BNH2, g_BNH2), None, None, None
    wants_bonds = ctx.needs_input_grad[2]
    v_bar, shift_bar, bonds_bar = bk_bidirectional_backward(
        grad_BNH2, g_BNH2, v_BNH, shift_H2, bonds, wants_bonds, ctx.backend
    )
    return v_bar.to(ctx.dtype), shift_bar, bonds_bar if wants_bonds else None, None, None


def _blended(ctx: Any, grad_BNH2: Tensor, g_BNH2: Tensor) -> tuple[Tensor, Tensor]:
    """The analytic rule with i = j only: gradients of v and shift."""
    grad_BNH, g_BNH = torch.view_as_complex(grad_BNH2.contiguous()), torch.view_as_complex(g_BNH2)
    square = g_BNH * g_BNH
    inverse = square.reciprocal()
    bound = (BLEND_INVERSE_SQUARE_LIMIT / inverse.abs()).clamp(max=1.0)
    abar_BNH = -((1 - ctx.blend) * square + ctx.blend * inverse * bound).conj() * grad_BNH
    return abar_BNH.real.to(ctx.dtype), torch.view_as_real(abar_BNH.sum((0, 1)))


def _save_tunnel(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    w_BNH, _, ctx.backend = inputs
    ctx.dtype = w_BNH.dtype
    ctx.save_for_backward(output)


def _tunnel_gradients(ctx: Any, grad_BNH: Tensor) -> tuple[Tensor, Tensor, None]:
    (log_l_BNH,) = ctx.saved_tensors
    w_bar_BNH = bk_tunnel_backward(grad_BNH, log_l_BNH, ctx.backend)
    return w_bar_BNH.to(ctx.dtype), w_bar_BNH[:, 0], None


bk_causal.register_autograd(_causal_gradients, setup_context=_save_causal)
bk_bidirectional.register_autograd(_bidirectional_gradients, setup_context=_save_bidirectional)
bk_tunnel.register_autograd(_tunnel_gradients, setup_context=_save_tunnel)


def _count(flops_per_site: int, operator: Any, *, pairs: bool = False) -> None:
    @register_flop_formula(operator)
    def flops(first_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
        return flops_per_site * first_shape.numel() // (2 if pairs else 1)


_count(CAUSAL_FORWARD_FLOPS, torch.ops.resnet_bk.bk_causal)
_count(CAUSAL_BACKWARD_FLOPS, torch.ops.resnet_bk.bk_causal_backward, pairs=True)
_count(BIDIRECTIONAL_FORWARD_FLOPS, torch.ops.resnet_bk.bk_bidirectional)
_count(BIDIRECTIONAL_BACKWARD_FLOPS, torch.ops.resnet_bk.bk_bidirectional_backward, pairs=True)
_count(TUNNEL_FORWARD_FLOPS, torch.ops.resnet_bk.bk_tunnel)
_count(TUNNEL_BACKWARD_FLOPS, torch.ops.resnet_bk.bk_tunnel_backward)
