"""A layer norm whose result is rounded at once: computed in float32, read by products in a half type.

torch's own writes float32, which a cast reads again and autograd keeps. On a GPU one kernel does it in Triton, together
with a sum before it; elsewhere it is torch's own and a cast. Nothing but what is normed is kept for backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_bk.ops.operator import operator
from resnet_bk.ops.projections import choose_projections_backend


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, dtype: torch.dtype, backend: str = "auto"
) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` over the last dimension, in ``dtype``.

    Args:
        x: ``(..., D)``.
        weight, bias: ``(D,)``.
        eps: what is added to the variance.
        dtype: the result's type; the arithmetic is in float32, in float64 if x is.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.
    """
    if _backend(x, dtype, backend) == "triton":
        _, rounded = _layer_norm(x, None, weight, bias, eps, dtype)
        return rounded
    wide = torch.promote_types(x.dtype, torch.float32) if dtype != x.dtype else x.dtype
    return F.layer_norm(x.to(wide), weight.shape, weight, bias, eps).to(dtype)


def added_layer_norm(
    x: Tensor, added: Tensor, weight: Tensor, bias: Tensor, eps: float, *, dtype: torch.dtype, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``x + added`` in x's type, and ``layer_norm`` of that; ``added`` has x's shape and a type that is no wider."""
    if _backend(x, dtype, backend) == "triton":
        total, rounded = _layer_norm(x, added, weight, bias, eps, dtype)
        return total, rounded
    total = x + added
    return total, layer_norm(total, weight, bias, eps, dtype=dtype, backend="torch")


def _backend(x: Tensor, dtype: torch.dtype, backend: str) -> str:
    """Where nothing is rounded torch's own kernels are as good."""
    if backend != "auto":
        return backend
    return "torch" if dtype == x.dtype else choose_projections_backend(x.device, x.dtype).name


@operator("resnet_bk::layer_norm")
def _layer_norm(
    x: Tensor, added: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from resnet_bk.ops import layer_norm_gpu

    return layer_norm_gpu.forward(x, added, weight_D, bias_D, eps, dtype)


@operator("resnet_bk::layer_norm_backward")
def _layer_norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight_D: Tensor, eps: float, added_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from resnet_bk.ops import layer_norm_gpu

    return layer_norm_gpu.backward(grad, grad_total, x, weight_D, eps, added_dtype)


@_layer_norm.register_fake
def _(
    x: Tensor, added: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return x.new_empty(0 if added is None else x.shape), x.new_empty(x.shape, dtype=dtype)


@_layer_norm_backward.register_fake
def _(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight_D: Tensor, eps: float, added_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    added_bar = x.new_empty(0 if grad_total is None else x.shape, dtype=added_dtype)
    return x.new_empty(x.shape), added_bar, weight_D.new_empty(weight_D.shape), weight_D.new_empty(weight_D.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, added, weight_D, _, ctx.eps, _ = inputs
    ctx.added_dtype = None if added is None else added.dtype
    ctx.save_for_backward(x if added is None else output[0], weight_D)


def _gradients(ctx: Any, grad_total: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight_D = ctx.saved_tensors
    adds = ctx.added_dtype is not None
    x_bar, added_bar, weight_bar, bias_bar = _layer_norm_backward(
        grad, grad_total if adds else None, x, weight_D, ctx.eps, ctx.added_dtype or x.dtype
    )
    return x_bar, added_bar if adds else None, weight_bar, bias_bar, None, None


_layer_norm.register_autograd(_gradients, setup_context=_save)
