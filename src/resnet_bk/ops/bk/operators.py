"""The sweeps as torch operators: visible to autograd, fake tensors, torch.compile and FlopCounterMode.

Shapes: ``v_BNH`` real; ``shift_H = h0 - z`` complex, so that ``a_i = v_i + shift``; ``bonds`` real, ``(H,)`` or
``(B, N, H)``, the bond to the left of each site; ``initial_state_BH`` complex, the l before the first site.

``blend`` None asks for the exact gradient; a number b asks for the analytic rule that keeps only i = j and blends
an inverse in, dL/da_i = -conj((1 - b) G_i^2 + b / G_i^2) g_i. It moves no gradient across tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from resnet_bk.ops.bk import sweep

# G -> 0 where the potential is huge, and 1/G^2 with it to infinity. This is the one bound on a magnitude in BK-Core,
# far above what a potential within +-100 of the energy gives (1/|G|^2 about 1e4).
BLEND_INVERSE_SQUARE_LIMIT = 1e6

# Real additions, multiplications and divisions per site and head: a complex product or square is 6, a product with a
# real number 2, a sum 2, a reciprocal 5 (3 for |a|^2, 2 quotients); changes of sign are free.
CAUSAL_FORWARD_FLOPS = 1 + 2 + 2 + 5  # a, t l, a - t l, reciprocal
CAUSAL_BACKWARD_FLOPS = 6 + 2 + 6 + 2 + 6  # l^2, t l^2, times lambda, plus g, abar
BIDIRECTIONAL_FORWARD_FLOPS = 1 + 2 * 9 + 2 * 4 + 5  # a, two sweeps, two bonds taken off, reciprocal
BIDIRECTIONAL_BACKWARD_FLOPS = BIDIRECTIONAL_FORWARD_FLOPS + 6 + 6 + 2 * 2 + 2 * CAUSAL_BACKWARD_FLOPS + 2 * 2
TUNNEL_FORWARD_FLOPS = 1 + 1 + 1 + 1  # s, 1 + s, quotient, log1p counted as one
TUNNEL_BACKWARD_FLOPS = 1 + 1 + 1 + 2  # exp counted as one, -l g, l^2, multiply-add


@torch.library.custom_op("resnet_bk::bk_causal", mutates_args=())
def bk_causal(v_BNH: Tensor, shift_H: Tensor, bonds: Tensor, initial_state_BH: Tensor, blend: float | None) -> Tensor:
    """l_i of the causal chain, complex ``(B, N, H)``."""
    return sweep.causal_sweep(v_BNH + shift_H, bonds, initial_state_BH)


@torch.library.custom_op("resnet_bk::bk_causal_backward", mutates_args=())
def bk_causal_backward(
    grad_BNH: Tensor, l_BNH: Tensor, bonds: Tensor, initial_state_BH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (abar complex ``(B, N, H)``, bonds as given, initial state complex ``(B, H)``)."""
    abar_BNH = sweep.causal_adjoint(grad_BNH, l_BNH, bonds)
    bonds_bar_BNH = sweep.bond_gradient(abar_BNH, l_BNH, initial_state_BH)
    first_bond = bonds if bonds.dim() == 1 else bonds[:, 0]
    return abar_BNH, _reduce_bonds(bonds_bar_BNH, bonds), -first_bond * abar_BNH[:, 0]


@torch.library.custom_op("resnet_bk::bk_bidirectional", mutates_args=())
def bk_bidirectional(v_BNH: Tensor, shift_H: Tensor, bonds: Tensor, blend: float | None) -> Tensor:
    """G_ii of the whole chain, complex ``(B, N, H)``. It depends on tokens to the right of i."""
    return sweep.bidirectional_sweeps(v_BNH + shift_H, bonds)[2]


@torch.library.custom_op("resnet_bk::bk_bidirectional_backward", mutates_args=())
def bk_bidirectional_backward(grad_BNH: Tensor, v_BNH: Tensor, shift_H: Tensor, bonds: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (abar complex ``(B, N, H)``, bonds as given). The sweeps are done again rather than stored."""
    l_BNH, r_BNH, g_BNH = sweep.bidirectional_sweeps(v_BNH + shift_H, bonds)
    abar_BNH, bonds_bar_BNH = sweep.bidirectional_adjoint(grad_BNH, l_BNH, r_BNH, g_BNH, bonds)
    return abar_BNH, _reduce_bonds(bonds_bar_BNH, bonds)


@torch.library.custom_op("resnet_bk::bk_tunnel", mutates_args=())
def bk_tunnel(w_BNH: Tensor, initial_state_BH: Tensor) -> Tensor:
    """log l_i of the tunnelling chain, real ``(B, N, H)``."""
    return sweep.tunnel_sweep(w_BNH, initial_state_BH)


@torch.library.custom_op("resnet_bk::bk_tunnel_backward", mutates_args=())
def bk_tunnel_backward(grad_BNH: Tensor, log_l_BNH: Tensor) -> Tensor:
    """Gradient of w, real ``(B, N, H)``; its first site is also the gradient of the initial m."""
    return sweep.tunnel_adjoint(grad_BNH, log_l_BNH)


def _reduce_bonds(bonds_bar_BNH: Tensor, bonds: Tensor) -> Tensor:
    return bonds_bar_BNH.sum((0, 1)) if bonds.dim() == 1 else bonds_bar_BNH.clone()


def _empty_complex(v_BNH: Tensor) -> Tensor:
    dtype = torch.complex128 if v_BNH.dtype == torch.float64 else torch.complex64
    return torch.empty(v_BNH.shape, dtype=dtype, device=v_BNH.device)


@bk_causal.register_fake
def _(v_BNH: Tensor, shift_H: Tensor, bonds: Tensor, initial_state_BH: Tensor, blend: float | None) -> Tensor:
    return _empty_complex(v_BNH)


@bk_causal_backward.register_fake
def _(grad_BNH: Tensor, l_BNH: Tensor, bonds: Tensor, initial_state_BH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _contiguous(l_BNH), _contiguous(bonds), _contiguous(initial_state_BH)


@bk_bidirectional.register_fake
def _(v_BNH: Tensor, shift_H: Tensor, bonds: Tensor, blend: float | None) -> Tensor:
    return _empty_complex(v_BNH)


@bk_bidirectional_backward.register_fake
def _(grad_BNH: Tensor, v_BNH: Tensor, shift_H: Tensor, bonds: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_complex(v_BNH), _contiguous(bonds)


@bk_tunnel.register_fake
def _(w_BNH: Tensor, initial_state_BH: Tensor) -> Tensor:
    return _contiguous(w_BNH)


@bk_tunnel_backward.register_fake
def _(grad_BNH: Tensor, log_l_BNH: Tensor) -> Tensor:
    return _contiguous(log_l_BNH)


def _contiguous(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _save_causal(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, bonds, initial_state_BH, ctx.blend = inputs
    ctx.save_for_backward(output, bonds, initial_state_BH)


def _causal_gradients(ctx: Any, grad_BNH: Tensor) -> tuple[Tensor | None, ...]:
    l_BNH, bonds, initial_state_BH = ctx.saved_tensors
    if ctx.blend is not None:
        abar_BNH = blended_gradient(grad_BNH, l_BNH, ctx.blend)
        return abar_BNH.real, abar_BNH.sum((0, 1)), None, None, None
    abar_BNH, bonds_bar, initial_bar_BH = bk_causal_backward(grad_BNH, l_BNH, bonds, initial_state_BH)
    return abar_BNH.real, abar_BNH.sum((0, 1)), bonds_bar, initial_bar_BH, None


def _save_bidirectional(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v_BNH, shift_H, bonds, ctx.blend = inputs
    # Only one of the two is needed: the blended rule reads G, the exact adjoint sweeps again from v.
    ctx.save_for_backward(output if ctx.blend is not None else v_BNH, shift_H, bonds)


def _bidirectional_gradients(ctx: Any, grad_BNH: Tensor) -> tuple[Tensor | None, ...]:
    saved_BNH, shift_H, bonds = ctx.saved_tensors
    if ctx.blend is not None:
        abar_BNH = blended_gradient(grad_BNH, saved_BNH, ctx.blend)
        return abar_BNH.real, abar_BNH.sum((0, 1)), None, None
    abar_BNH, bonds_bar = bk_bidirectional_backward(grad_BNH, saved_BNH, shift_H, bonds)
    return abar_BNH.real, abar_BNH.sum((0, 1)), bonds_bar, None


def blended_gradient(grad_BNH: Tensor, g_BNH: Tensor, blend: float) -> Tensor:
    """The analytic rule with i = j only, as a gradient of a: its real part is that of v."""
    square = g_BNH * g_BNH
    inverse = square.reciprocal()
    bound = (BLEND_INVERSE_SQUARE_LIMIT / inverse.abs()).clamp(max=1.0)
    return -((1 - blend) * square + blend * inverse * bound).conj() * grad_BNH


def _save_tunnel(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _tunnel_gradients(ctx: Any, grad_BNH: Tensor) -> tuple[Tensor, Tensor]:
    (log_l_BNH,) = ctx.saved_tensors
    w_bar_BNH = bk_tunnel_backward(grad_BNH, log_l_BNH)
    return w_bar_BNH, w_bar_BNH[:, 0]


bk_causal.register_autograd(_causal_gradients, setup_context=_save_causal)
bk_bidirectional.register_autograd(_bidirectional_gradients, setup_context=_save_bidirectional)
bk_tunnel.register_autograd(_tunnel_gradients, setup_context=_save_tunnel)


def _count(flops_per_site: int, operator: Any) -> None:
    @register_flop_formula(operator)
    def flops(first_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
        return flops_per_site * first_shape.numel()


_count(CAUSAL_FORWARD_FLOPS, torch.ops.resnet_bk.bk_causal)
_count(CAUSAL_BACKWARD_FLOPS, torch.ops.resnet_bk.bk_causal_backward)
_count(BIDIRECTIONAL_FORWARD_FLOPS, torch.ops.resnet_bk.bk_bidirectional)
_count(BIDIRECTIONAL_BACKWARD_FLOPS, torch.ops.resnet_bk.bk_bidirectional_backward)
_count(TUNNEL_FORWARD_FLOPS, torch.ops.resnet_bk.bk_tunnel)
_count(TUNNEL_BACKWARD_FLOPS, torch.ops.resnet_bk.bk_tunnel_backward)
