"""Products that stay in float32 under autocast, of tokens that are rounded: what decides (routers) or recurs (chains).

The tokens are read and kept as they are, and no copy of them in float32 is. A product of two bfloat16 numbers is exact
in float32, and a float32 number is the sum of three bfloat16 ones, so that a GPU's tensor cores give what a product in
float32 gives.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from resnet_bk.imagined import capability_of, kind_of
from resnet_bk.ops.bk.api import BackendChoice
from resnet_bk.ops.operator import operator

WITH_BFLOAT16 = (8, 0)  # compute capability
FEWEST_TOKENS = 1024  # from which splitting takes less than it saves
EXACT = 3  # bfloat16 numbers that a float32 one is the sum of


def choose_single_backend(device: torch.device, dtype: torch.dtype) -> BackendChoice:
    """How ``linear_in_single`` multiplies many tokens of ``dtype``."""
    if dtype == torch.bfloat16 and kind_of(device) == "cuda" and capability_of(device) >= WITH_BFLOAT16:
        return BackendChoice(name="split", reason=f"float32 weights as {EXACT} bfloat16 ones, for tensor cores")
    return BackendChoice(name="torch", reason="a product in float32")


def linear_in_single(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T`` in float32 (in float64 if x is), whatever autocast is set to.

    Args:
        x: ``(..., D)``.
        weight: ``(H, D)``.

    Returns:
        ``(..., H)``. Gradients are in the arguments' types.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        if dtype == x.dtype:
            return F.linear(x, weight.to(dtype))
        product: Tensor = _product(x.flatten(0, -2), weight.to(dtype))
    return product.view(*x.shape[:-1], len(weight))


@operator("resnet_bk::linear_in_single")
def _product(x_TD: Tensor, weight_HD: Tensor) -> Tensor:
    with torch.autocast(x_TD.device.type, enabled=False):
        if not _splits(x_TD):
            return x_TD.float() @ weight_HD.t()
        return _times(x_TD, torch.cat(_parts(weight_HD, EXACT)).t()).view(len(x_TD), EXACT, -1).sum(1)


@operator("resnet_bk::linear_in_single_backward")
def _product_backward(grad_TH: Tensor, x_TD: Tensor, weight_HD: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, in its type, and of the weight."""
    with torch.autocast(x_TD.device.type, enabled=False):
        if not _splits(x_TD):
            return (grad_TH @ weight_HD).to(x_TD.dtype), grad_TH.t() @ x_TD.float()
        grads, weights = _parts(grad_TH, EXACT), _parts(weight_HD, 2)
        # Rounded in the end: terms below its last digit are left out.
        x_bar = torch.cat([grads[0], grads[1], grads[0]], 1) @ torch.cat([weights[0], weights[0], weights[1]])
        weight_bar = _times(torch.cat(grads, 1).t(), x_TD).view(EXACT, *weight_HD.shape).sum(0)
        return x_bar, weight_bar


def _splits(x_TD: Tensor) -> bool:
    return len(x_TD) >= FEWEST_TOKENS and choose_single_backend(x_TD.device, x_TD.dtype).name == "split"


def _times(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32)


def _parts(x: Tensor, number: int) -> list[Tensor]:
    """bfloat16 tensors that add up to x."""
    parts = [x.bfloat16()]
    while len(parts) < number:
        x = x - parts[-1]
        parts.append(x.bfloat16())
    return parts


@_product.register_fake
def _(x_TD: Tensor, weight_HD: Tensor) -> Tensor:
    return weight_HD.new_empty(len(x_TD), len(weight_HD))


@_product_backward.register_fake
def _(grad_TH: Tensor, x_TD: Tensor, weight_HD: Tensor) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), weight_HD.new_empty(weight_HD.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, Tensor]:
    x_bar, weight_bar = _product_backward(grad_TH, *ctx.saved_tensors)
    return x_bar, weight_bar


_product.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.resnet_bk.linear_in_single)
def _(x_shape: torch.Size, weight_shape: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    return 2 * x_shape[0] * weight_shape.numel()


@register_flop_formula(torch.ops.resnet_bk.linear_in_single_backward)
def _(_grad: torch.Size, x_shape: torch.Size, weight_shape: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    return 4 * x_shape[0] * weight_shape.numel()
