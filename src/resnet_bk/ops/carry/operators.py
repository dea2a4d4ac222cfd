"""The carry as torch operators: visible to autograd, fake tensors, torch.compile and FlopCounterMode.

Shapes: ``q_BNHK``, ``k_BNHK``, ``v_BNHV`` of any floating type, ``log_l_BNH``, ``state_BHKV`` and ``skip_H`` in the
type of the arithmetic, float32 or float64. Nothing but the arguments is kept for backward: the states are computed
again.

``backend`` names the module that does it: ``torch`` (chunked) or ``triton``.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from resnet_bk.ops.carry.chunked import CHUNK
from resnet_bk.ops.operator import operator

WIDEST_KERNEL = 128  # coordinates of a head that a Triton kernel can hold
BACKENDS = {"torch": "chunked", "triton": "gpu"}


class Forms(Protocol):
    """What a backend's module offers; ``chunked`` has the formulas."""

    carry: Callable[..., tuple[Tensor, Tensor]]
    carry_adjoint: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]]


def forms(backend: str) -> Forms:
    """The module of a backend, imported at its first use: compilers are slow to load."""
    return cast(Forms, import_module(f"resnet_bk.ops.carry.{BACKENDS[backend]}"))


@operator("resnet_bk::carry")
def carry(
    q_BNHK: Tensor,
    k_BNHK: Tensor,
    v_BNHV: Tensor,
    log_l_BNH: Tensor,
    starts_BN: Tensor | None,
    state_BHKV: Tensor,
    skip_H: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """o ``(B, N, H, V)`` in v's type and the state behind the last token, ``(B, H, K, V)``."""
    with torch.autocast(v_BNHV.device.type, enabled=False):  # sums are in the state's type
        o_BNHV, final_BHKV = forms(backend).carry(q_BNHK, k_BNHK, v_BNHV, log_l_BNH, starts_BN, state_BHKV, skip_H)
    return o_BNHV.to(v_BNHV.dtype), final_BHKV


@operator("resnet_bk::carry_backward")
def carry_backward(
    grad_o_BNHV: Tensor,
    grad_final_BHKV: Tensor,
    q_BNHK: Tensor,
    k_BNHK: Tensor,
    v_BNHV: Tensor,
    log_l_BNH: Tensor,
    starts_BN: Tensor | None,
    state_BHKV: Tensor,
    skip_H: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (in their types), log l, the initial state and skip (nothing in it without one)."""
    with torch.autocast(v_BNHV.device.type, enabled=False):
        q_bar, k_bar, v_bar, log_bar, state_bar, skip_bar = forms(backend).carry_adjoint(
            grad_o_BNHV, grad_final_BHKV, q_BNHK, k_BNHK, v_BNHV, log_l_BNH, starts_BN, state_BHKV, skip_H
        )
    if skip_bar is None:
        skip_bar = log_bar.new_empty(0)
    return q_bar.to(q_BNHK.dtype), k_bar.to(k_BNHK.dtype), v_bar.to(v_BNHV.dtype), log_bar, state_bar, skip_bar


@carry.register_fake
def _(
    q_BNHK: Tensor,
    k_BNHK: Tensor,
    v_BNHV: Tensor,
    log_l_BNH: Tensor,
    starts_BN: Any,
    state_BHKV: Tensor,
    skip_H: Any,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return v_BNHV.new_empty(v_BNHV.shape), state_BHKV.new_empty(state_BHKV.shape)


@carry_backward.register_fake
def _(
    grad_o_BNHV: Tensor,
    grad_final_BHKV: Tensor,
    q_BNHK: Tensor,
    k_BNHK: Tensor,
    v_BNHV: Tensor,
    log_l_BNH: Tensor,
    starts_BN: Any,
    state_BHKV: Tensor,
    skip_H: Any,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = (q_BNHK, k_BNHK, v_BNHV, log_l_BNH, state_BHKV)
    q_bar, k_bar, v_bar, log_bar, state_bar = (x.new_empty(x.shape) for x in like)
    return q_bar, k_bar, v_bar, log_bar, state_bar, log_l_BNH.new_empty(0 if skip_H is None else skip_H.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad_o_BNHV: Tensor, grad_final_BHKV: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, skip_H = ctx.saved_tensors
    q_bar, k_bar, v_bar, log_bar, state_bar, skip_bar = carry_backward(
        grad_o_BNHV, grad_final_BHKV, *tensors, skip_H, ctx.backend
    )
    return q_bar, k_bar, v_bar, log_bar, None, state_bar, None if skip_H is None else skip_bar, None


carry.register_autograd(_gradients, setup_context=_save)


def forward_flops(key_size: int, value_size: int) -> int:
    """Of one token and head: scores and values of a whole chunk, the state written and read."""
    return 2 * CHUNK * (key_size + value_size) + 4 * key_size * value_size


def backward_flops(key_size: int, value_size: int) -> int:
    """Of one token and head: scores again, three products with keys' width in all and two with values', and five
    with the state, one of which writes it again."""
    return 2 * CHUNK * (3 * key_size + 2 * value_size) + 10 * key_size * value_size


@register_flop_formula(torch.ops.resnet_bk.carry)
def _(q_shape: torch.Size, k_shape: torch.Size, v_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return forward_flops(k_shape[-1], v_shape[-1]) * v_shape[:-1].numel()


@register_flop_formula(torch.ops.resnet_bk.carry_backward)
def _(
    grad_o_shape: torch.Size,
    grad_final_shape: torch.Size,
    q_shape: torch.Size,
    k_shape: torch.Size,
    v_shape: torch.Size,
    *args: Any,
    **kwargs: Any,
) -> int:
    return backward_flops(k_shape[-1], v_shape[-1]) * v_shape[:-1].numel()
