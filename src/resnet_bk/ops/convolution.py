"""A short causal convolution along the tokens, one filter for each channel: ``y_i = sum_s weight_s x_{i-s}``.

The backends are ``triton`` on a GPU and ``torch`` elsewhere, behind one registered operator.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from resnet_bk.imagined import kind_of
from resnet_bk.ops import convolution_torch
from resnet_bk.ops.bk.api import HAS_TRITON, BackendChoice
from resnet_bk.ops.operator import operator


def choose_convolution_backend(device: torch.device) -> BackendChoice:
    """What ``short_convolution`` runs on ``device``."""
    kind = kind_of(device)
    if kind == "cuda" and HAS_TRITON:
        return BackendChoice(name="triton", reason="one pass over memory")
    return BackendChoice(name="torch", reason=f"torch's depthwise convolution on {kind}")


def short_convolution(
    x: Tensor,
    weight: Tensor,
    *,
    window: Tensor | None = None,
    documents: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Each channel of ``x`` with its own causal filter.

    Args:
        x: ``(B, N, C)``.
        weight: ``(S, C)``; row s meets the token s steps before.
        window: the S - 1 tokens before the first, ``(B, S - 1, C)``; zeros if None. No gradient goes there.
        documents: int ``(B, N)``, a number for each document of a packed row, 0 for the first: filters do not reach
            across, and the window belongs to document 0.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        y, ``(B, N, C)``, in x's type, or autocast's.

    Raises:
        ValueError: a shape does not fit; the message names the mend.
    """
    _check(x, weight, window, documents)
    if window is not None:
        window = window.to(x.dtype)
    name = choose_convolution_backend(x.device).name if backend == "auto" else backend
    result: Tensor
    if name == "triton":
        if documents is not None:
            documents = documents.to(torch.int32)
        result = _convolution(x, weight, window, documents, name)
        return result
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, window = x.to(dtype), None if window is None else window.to(dtype)
    if documents is None and (x.shape[1] > 1 or torch.is_grad_enabled()):
        result = _convolution(x, weight, window, None, name)
    else:
        result = _small(x, weight, window, documents)
    return result


def _small(x: Tensor, weight: Tensor, window: Tensor | None, documents: Tensor | None) -> Tensor:
    before = weight.shape[0] - 1
    x = F.pad(x, (0, 0, before, 0)) if window is None else torch.cat([window, x], dim=1)
    if documents is not None:
        return _in_documents(x, weight, documents)
    # One token, as in decoding: a sum costs less than setting a convolution up.
    return (x * weight.flip(0).to(x.dtype)).sum(1, keepdim=True)


def _in_documents(x_BMC: Tensor, weight_SC: Tensor, documents_BN: Tensor) -> Tensor:
    length, before = documents_BN.shape[1], weight_SC.shape[0] - 1
    document_BM1 = F.pad(documents_BN, (before, 0)).unsqueeze(-1)
    y_BNC = torch.zeros_like(x_BMC[:, before:])
    for s, weight_C in enumerate(weight_SC.to(x_BMC.dtype)):
        then = slice(before - s, before - s + length)
        y_BNC = y_BNC + weight_C * x_BMC[:, then] * (document_BM1[:, then] == document_BM1[:, before:])
    return y_BNC


@operator("resnet_bk::short_convolution")
def _convolution(
    x_BNC: Tensor, weight_SC: Tensor, window_BWC: Tensor | None, documents_BN: Tensor | None, backend: str
) -> Tensor:
    if backend == "torch":
        return convolution_torch.forward(x_BNC, weight_SC, window_BWC)
    from resnet_bk.ops import convolution_gpu

    return convolution_gpu.forward(x_BNC, weight_SC, window_BWC, documents_BN)


@operator("resnet_bk::short_convolution_backward")
def _convolution_backward(
    grad_BNC: Tensor,
    x_BNC: Tensor,
    weight_SC: Tensor,
    window_BWC: Tensor | None,
    documents_BN: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "torch":
        return convolution_torch.backward(grad_BNC, x_BNC, weight_SC, window_BWC)
    from resnet_bk.ops import convolution_gpu

    return convolution_gpu.backward(grad_BNC, x_BNC, weight_SC, window_BWC, documents_BN)


@_convolution.register_fake
def _(x_BNC: Tensor, weight_SC: Tensor, window_BWC: Any, documents_BN: Any, backend: str) -> Tensor:
    return x_BNC.new_empty(x_BNC.shape)


@_convolution_backward.register_fake
def _(
    grad_BNC: Tensor, x_BNC: Tensor, weight_SC: Tensor, window_BWC: Any, documents_BN: Any, backend: str
) -> tuple[Tensor, Tensor]:
    return x_BNC.new_empty(x_BNC.shape), weight_SC.new_empty(weight_SC.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad_BNC: Tensor) -> tuple[Tensor | None, ...]:
    x_bar, weight_bar = _convolution_backward(grad_BNC, *ctx.saved_tensors, ctx.backend)
    return x_bar, weight_bar, None, None, None


_convolution.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.resnet_bk.short_convolution)
def _(x_shape: torch.Size, weight_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * weight_shape[0] * x_shape.numel()


@register_flop_formula(torch.ops.resnet_bk.short_convolution_backward)
def _(grad_shape: torch.Size, x_shape: torch.Size, weight_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 4 * weight_shape[0] * x_shape.numel()


def _check(x: Tensor, weight: Tensor, window: Tensor | None, documents: Tensor | None) -> None:
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[1] != x.shape[2]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; give (batch, tokens, C) and (size, C)"
        )
    wanted = (x.shape[0], weight.shape[0] - 1, x.shape[2])
    if window is not None and tuple(window.shape) != wanted:
        raise ValueError(f"window has shape {tuple(window.shape)}; give {wanted}, the tokens before the first")
    if documents is not None and (documents.shape != x.shape[:2] or documents.is_floating_point()):
        raise ValueError(
            f"documents is {documents.dtype} of shape {tuple(documents.shape)}; give integers of {tuple(x.shape[:2])}"
        )
