"""``rms_norm(o) * silu(gate)``, in one pass: each head's norm, times its part of the gate.

The backends are ``triton`` on a GPU and ``torch`` elsewhere, behind one registered operator, which keeps nothing but
its arguments for backward. ``choose_projections_backend`` says which it is.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from resnet_bk.ops import gated_norm_torch, one_token
from resnet_bk.ops.operator import operator
from resnet_bk.ops.projections import choose_projections_backend


def gated_norm(o: Tensor, weight: Tensor, gate: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """``o / rms(o) * weight * silu(gate)``, rms over each head's coordinates.

    Args:
        o: ``(B, N, H, V)``.
        weight: ``(V,)``, the same for all heads.
        gate: ``(B, N, D)``, D = H V.
        eps: what is added to the mean square.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``(B, N, D)`` in the gate's type; the arithmetic is in float32, in float64 if o or the gate is.

    Raises:
        ValueError: a shape does not fit; the message names the mend.
    """
    if o.dim() != 4 or weight.shape != o.shape[3:] or tuple(gate.shape) != (*o.shape[:2], o.shape[2] * o.shape[3]):
        raise ValueError(
            f"o has shape {tuple(o.shape)}, weight {tuple(weight.shape)} and gate {tuple(gate.shape)}; give (batch, "
            "tokens, H, V), (V,) and (batch, tokens, H V)"
        )
    chosen = choose_projections_backend(o.device, torch.promote_types(o.dtype, gate.dtype))
    name = chosen.name if backend == "auto" else backend
    if backend == "auto" and one_token.is_alone(o.shape[0] * o.shape[1], o, weight, gate):
        return one_token.gated_norm(o, weight, gate, eps)
    if name == "torch" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return gated_norm_torch.forward(o, weight, gate, eps)  # as quick as the operator's dispatch for one token
    result: Tensor = _gated_norm(o, weight, gate, eps, name)
    return result


def _module(backend: str) -> ModuleType:
    if backend == "torch":
        return gated_norm_torch
    from resnet_bk.ops import gated_norm_gpu

    return gated_norm_gpu


@operator("resnet_bk::gated_norm")
def _gated_norm(o_BNHV: Tensor, weight_V: Tensor, gate_BND: Tensor, eps: float, backend: str) -> Tensor:
    result: Tensor = _module(backend).forward(o_BNHV, weight_V, gate_BND, eps)
    return result


@operator("resnet_bk::gated_norm_backward")
def _gated_norm_backward(
    grad_BND: Tensor, o_BNHV: Tensor, weight_V: Tensor, gate_BND: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of o, weight and gate, in their types."""
    o_bar, weight_bar, gate_bar = _module(backend).backward(grad_BND, o_BNHV, weight_V, gate_BND, eps)
    return o_bar, weight_bar, gate_bar


@_gated_norm.register_fake
def _(o_BNHV: Tensor, weight_V: Tensor, gate_BND: Tensor, eps: float, backend: str) -> Tensor:
    return gate_BND.new_empty(gate_BND.shape)


@_gated_norm_backward.register_fake
def _(
    grad_BND: Tensor, o_BNHV: Tensor, weight_V: Tensor, gate_BND: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    o_bar, weight_bar, gate_bar = (x.new_empty(x.shape) for x in (o_BNHV, weight_V, gate_BND))
    return o_bar, weight_bar, gate_bar


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad_BND: Tensor) -> tuple[Tensor | None, ...]:
    o_bar, weight_bar, gate_bar = _gated_norm_backward(grad_BND, *ctx.saved_tensors, ctx.eps, ctx.backend)
    return o_bar, weight_bar, gate_bar, None, None


_gated_norm.register_autograd(_gradients, setup_context=_save)
