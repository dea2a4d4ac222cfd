"""Queries, keys and values of a mixer from their projection: convolution, silu, norm and rotation in one pass.

The backends are ``triton`` on a GPU and ``torch`` elsewhere, behind one registered operator. Nothing but the arguments
is kept for backward, which computes the convolution again.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from resnet_bk.imagined import kind_of
from resnet_bk.ops import one_token, projections_torch
from resnet_bk.ops.bk.api import HAS_TRITON, BackendChoice
from resnet_bk.ops.operator import operator

Rotary = tuple[Tensor, Tensor]


def choose_projections_backend(device: torch.device, dtype: torch.dtype = torch.float32) -> BackendChoice:
    """What ``queries_keys_values`` and ``gated_norm`` run on ``device``."""
    kind = kind_of(device)
    if kind == "cuda" and HAS_TRITON and dtype != torch.float64:
        return BackendChoice(name="triton", reason="one pass over memory")
    if kind == "cpu":
        return BackendChoice(name="torch", reason="tokens a few at a time, as many as a cache holds")
    why = "in double precision" if kind == "cuda" and HAS_TRITON else f"on {kind} without triton"
    return BackendChoice(name="torch", reason=f"torch's elementwise kernels {why}")


def queries_keys_values(
    x: Tensor,
    num_heads: int,
    key_size: int,
    *,
    weight: Tensor | None = None,
    window: Tensor | None = None,
    documents: Tensor | None = None,
    rotary: Rotary | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Each head's queries, keys and values from the projection ``x`` of the tokens.

        q, k, v = silu(convolution(x));   q, k <- q / rms(q), k / rms(k), turned by the positions' angles

    rms is the root of the mean square and float32's machine epsilon, whatever the type; all arithmetic is in float32,
    in float64 for float64.

    Args:
        x: ``(B, N, C)``, C = H (2 K + V): of each head q, k and v, one behind the other.
        num_heads: H.
        key_size: K, at least 1.
        weight, window, documents: of the convolution, as in ``short_convolution``; without a weight there is none. No
            gradient goes to the window.
        rotary: cos and sin of the positions' angles, ``(1 or B, N, K / 2)``; K must then be even. No gradient.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        q and k, ``(B, N, H, K)``, and v, ``(B, N, H, V)``, in x's type.

    Raises:
        ValueError: a shape does not fit; the message names the mend.
    """
    _check(x, num_heads, key_size, weight, window, documents, rotary)
    if window is not None:
        window = window.to(x.dtype)
    if documents is not None:
        documents = documents.to(torch.int32)
    cos, sin = (None, None) if rotary is None else rotary
    name = choose_projections_backend(x.device, x.dtype).name if backend == "auto" else backend
    arguments = (x, weight, window, documents, cos, sin, num_heads, key_size)
    if weight is not None and window is not None and documents is None and cos is not None and sin is not None:
        tokens = x.shape[0] * x.shape[1]
        if backend == "auto" and one_token.is_alone(tokens, x, weight, window, cos, sin):
            return one_token.queries_keys_values(x, weight, window, cos, sin, num_heads, key_size)
    if name == "torch" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return projections_torch.forward(*arguments)  # a token to decode is as quick as the operator's dispatch
    q, k, v = _projections(*arguments, name)
    return q, k, v


def _module(backend: str) -> ModuleType:
    if backend == "torch":
        return projections_torch
    from resnet_bk.ops import projections_gpu

    return projections_gpu


@operator("resnet_bk::queries_keys_values")
def _projections(
    x_BNC: Tensor,
    weight_SC: Tensor | None,
    window_BWC: Tensor | None,
    documents_BN: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    key_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    forward = _module(backend).forward
    q, k, v = forward(x_BNC, weight_SC, window_BWC, documents_BN, cos, sin, num_heads, key_size)
    return q, k, v


@operator("resnet_bk::queries_keys_values_backward")
def _projections_backward(
    q_bar: Tensor,
    k_bar: Tensor,
    v_bar: Tensor,
    x_BNC: Tensor,
    weight_SC: Tensor | None,
    window_BWC: Tensor | None,
    documents_BN: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    key_size: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight (nothing in it without one), in their types."""
    gradients = (q_bar, k_bar, v_bar)
    x_bar, weight_bar = _module(backend).backward(
        gradients, x_BNC, weight_SC, window_BWC, documents_BN, cos, sin, num_heads, key_size
    )
    return x_bar, x_BNC.new_empty(0) if weight_bar is None else weight_bar


@_projections.register_fake
def _(
    x_BNC: Tensor,
    weight_SC: Any,
    window_BWC: Any,
    documents_BN: Any,
    cos: Any,
    sin: Any,
    num_heads: int,
    key_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, length, channels = x_BNC.shape
    sizes = (key_size, key_size, channels // num_heads - 2 * key_size)
    q, k, v = (x_BNC.new_empty(batch_size, length, num_heads, size) for size in sizes)
    return q, k, v


@_projections_backward.register_fake
def _(
    q_bar: Tensor,
    k_bar: Tensor,
    v_bar: Tensor,
    x_BNC: Tensor,
    weight_SC: Any,
    window_BWC: Any,
    documents_BN: Any,
    cos: Any,
    sin: Any,
    num_heads: int,
    key_size: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    weight_bar = x_BNC.new_empty(0) if weight_SC is None else weight_SC.new_empty(weight_SC.shape)
    return x_BNC.new_empty(x_BNC.shape), weight_bar


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.num_heads, ctx.key_size, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, q_bar: Tensor, k_bar: Tensor, v_bar: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    x_bar, weight_bar = _projections_backward(q_bar, k_bar, v_bar, *tensors, ctx.num_heads, ctx.key_size, ctx.backend)
    return x_bar, None if tensors[1] is None else weight_bar, *[None] * 7


_projections.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.resnet_bk.queries_keys_values)
def _(x_shape: torch.Size, weight_shape: torch.Size | None, *args: Any, **kwargs: Any) -> int:
    return 0 if weight_shape is None else 2 * weight_shape[0] * x_shape.numel()


@register_flop_formula(torch.ops.resnet_bk.queries_keys_values_backward)
def _(
    q_shape: torch.Size,
    k_shape: torch.Size,
    v_shape: torch.Size,
    x_shape: torch.Size,
    weight_shape: torch.Size | None,
    *args: Any,
    **kwargs: Any,
) -> int:
    # The convolution again, and both gradients.
    return 0 if weight_shape is None else 6 * weight_shape[0] * x_shape.numel()


def _check(
    x: Tensor,
    num_heads: int,
    key_size: int,
    weight: Tensor | None,
    window: Tensor | None,
    documents: Tensor | None,
    rotary: Rotary | None,
) -> None:
    if x.dim() != 3 or key_size < 1 or x.shape[2] % num_heads or x.shape[2] <= 2 * num_heads * key_size:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; give (batch, tokens, C) with C = H (2 K + V) for {num_heads} heads and "
            f"keys of at least 1, here {key_size}"
        )
    if weight is None and not (window is None and documents is None):
        raise ValueError("window and documents are the convolution's; give its weight too")
    if weight is not None and (weight.dim() != 2 or weight.shape[1] != x.shape[2]):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; give (size, {x.shape[2]})")
    if weight is not None and window is not None:
        wanted = (x.shape[0], weight.shape[0] - 1, x.shape[2])
        if tuple(window.shape) != wanted:
            raise ValueError(f"window has shape {tuple(window.shape)}; give {wanted}, the tokens before the first")
    if documents is not None and (documents.shape != x.shape[:2] or documents.is_floating_point()):
        raise ValueError(
            f"documents is {documents.dtype} of shape {tuple(documents.shape)}; give integers of {tuple(x.shape[:2])}"
        )
    if rotary is not None:
        shapes = [(rows, x.shape[1], key_size // 2) for rows in (1, x.shape[0])]
        if key_size % 2 or any(tuple(table.shape) not in shapes for table in rotary):
            raise ValueError(
                f"rotary has shapes {[tuple(table.shape) for table in rotary]} and K is {key_size}; give cos and sin "
                f"of shape {shapes[0]} or {shapes[1]}, and an even K"
            )
