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
from resnet_bk.ops.bk.api import HAS_TRITON, BackendChoice
from resnet_bk.ops.operator import operator

WITH_BFLOAT16 = (8, 0)  # compute capability
FEWEST_TOKENS = 1024  # of fewer, a product takes less time than the launches of splitting
PARTS = 3  # bfloat16 numbers that a float32 one is the sum of


def choose_single_backend(device: torch.device, dtype: torch.dtype) -> BackendChoice:
    """How ``linear_in_single`` multiplies many tokens of ``dtype``."""
    on_gpu = kind_of(device) == "cuda" and HAS_TRITON
    if dtype == torch.bfloat16 and on_gpu and capability_of(device) >= WITH_BFLOAT16:
        return BackendChoice(name="split", reason=f"float32 weights as {PARTS} bfloat16 ones, for tensor cores")
    return BackendChoice(name="torch", reason="a product in float32")


def linear_in_single(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T`` in float32 (in float64 if x is), whatever autocast is set to.

    Args:
        x: ``(..., D)``.
        weight: ``(H, D)``.

    Returns:
        ``(..., H)``. Gradients are in the arguments' types.
    """
    if x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight)
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
        heads, width = weight_HD.shape
        parts = _split(weight_HD.reshape(1, -1)).view(PARTS * heads, width)
        return _times(x_TD, parts.t()).view(len(x_TD), PARTS, heads).sum(1)


@operator("resnet_bk::linear_in_single_backward")
def _product_backward(grad_TH: Tensor, x_TD: Tensor, weight_HD: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, in its type, and of the weight."""
    with torch.autocast(x_TD.device.type, enabled=False):
        if not _splits(x_TD):
            return (grad_TH @ weight_HD).to(x_TD.dtype), grad_TH.t() @ x_TD.float()
        heads, width = weight_HD.shape
        grads = _split(grad_TH, again=True)
        first, second, _ = _split(weight_HD.reshape(1, -1)).view(PARTS, heads, width)
        # Rounded in the end: of terms below its last digit, only the largest.
        x_bar = grads @ torch.cat([first, first, first, second])
        weight_bar = _times(grads[:, : PARTS * heads].t(), x_TD).view(PARTS, heads, width).sum(0)
        return x_bar, weight_bar


def _splits(x_TD: Tensor) -> bool:
    return len(x_TD) >= FEWEST_TOKENS and choose_single_backend(x_TD.device, x_TD.dtype).name == "split"


def _times(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32)


def _split(x_TH: Tensor, *, again: bool = False) -> Tensor:
    from resnet_bk.ops.single_gpu import split

    return split(x_TH, again=again)


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
