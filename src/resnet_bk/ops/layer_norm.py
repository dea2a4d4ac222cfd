"""A layer norm in a residual stream whose result is rounded at once: computed in float32, read by half products.

torch's own writes float32, which a cast reads again and autograd keeps. On a GPU one kernel does it in Triton, with the
sum before it; backward, the gradient that comes along the stream is added in the same pass. Elsewhere it is torch's own
and a cast.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_bk.imagined import kind_of
from resnet_bk.ops.bk.api import HAS_TRITON, BackendChoice
from resnet_bk.ops.operator import operator


def choose_norm_backend(x: Tensor, dtype: torch.dtype) -> BackendChoice:
    """What ``layer_norm`` of x runs, if the norm is wanted in ``dtype``."""
    kind = kind_of(x.device)
    if dtype == x.dtype:
        return BackendChoice(name="torch", reason="its own kernel, where nothing is rounded")
    if kind == "cuda" and HAS_TRITON and x.dtype != torch.float64:
        return BackendChoice(name="triton", reason="rounded in the same pass over memory, with the sum before it")
    return BackendChoice(name="torch", reason="its own kernel and a cast")


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    dtype: torch.dtype,
    added: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The stream, and ``(stream - mean) / sqrt(variance + eps) * weight + bias`` over its last dimension.

    Args:
        x: ``(..., D)``.
        weight, bias: ``(D,)``.
        eps: what is added to the variance.
        dtype: of the norm; the arithmetic is in float32, in float64 if x is.
        added: what is to be added to x first, of x's shape and no wider type.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``x`` or ``x + added``, in x's type, to go on with, and its norm.
    """
    if backend == "auto":
        backend = choose_norm_backend(x, dtype).name
    if backend == "triton":
        stream, normed = _Norm.apply(x, added, weight, bias, eps, dtype)  # type: ignore[no-untyped-call]
        return stream, normed
    stream = x if added is None else x + added
    wide = stream if dtype == x.dtype else stream.to(torch.promote_types(x.dtype, torch.float32))
    return stream, F.layer_norm(wide, weight.shape, weight, bias, eps).to(dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        total, normed = _layer_norm(x, added, weight, bias, eps, dtype)
        stream = x if added is None else total
        ctx.eps, ctx.added = eps, None if added is None else added.dtype
        ctx.save_for_backward(stream, weight)
        ctx.set_materialize_grads(False)
        return stream, normed

    @staticmethod
    def backward(ctx: Any, along: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if grad is None:
            added_bar = None if along is None or ctx.added is None else along.to(ctx.added)
            return along, added_bar, None, None, None, None
        x_bar, added_bar, weight_bar, bias_bar = _layer_norm_backward(grad, along, x, weight, ctx.eps, ctx.added)
        return x_bar, None if ctx.added is None else added_bar, weight_bar, bias_bar, None, None


@operator("resnet_bk::layer_norm")
def _layer_norm(
    x: Tensor, added: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from resnet_bk.ops import layer_norm_gpu

    return layer_norm_gpu.forward(x, added, weight_D, bias_D, eps, dtype)


@operator("resnet_bk::layer_norm_backward")
def _layer_norm_backward(
    grad: Tensor, along: Tensor | None, x: Tensor, weight_D: Tensor, eps: float, added: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from resnet_bk.ops import layer_norm_gpu

    return layer_norm_gpu.backward(grad, along, x, weight_D, eps, added)


@_layer_norm.register_fake
def _(
    x: Tensor, added: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return x.new_empty(0 if added is None else x.shape), x.new_empty(x.shape, dtype=dtype)


@_layer_norm_backward.register_fake
def _(
    grad: Tensor, along: Tensor | None, x: Tensor, weight_D: Tensor, eps: float, added: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    added_bar = x.new_empty(0) if added is None else x.new_empty(x.shape, dtype=added)
    return x.new_empty(x.shape), added_bar, weight_D.new_empty(weight_D.shape), weight_D.new_empty(weight_D.shape)
