"""Matrix products of groups of rows, each group with a matrix of its own: what a mixture of experts is made of.

Rows come sorted by group; ``ends_E`` (int32) is where each group ends, so that group e is the rows from
``ends[e - 1]`` to ``ends[e]``. On a GPU nobody waits to learn how many rows a group has: ``ends_E`` stays there.

Beside the usual letters, ``K`` and ``M`` are the width of a row before and after its product.
"""

import math
from importlib import import_module
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from resnet_bk.imagined import capability_of, is_imagined, kind_of
from resnet_bk.ops.bk.api import BackendChoice
from resnet_bk.ops.operator import operator

# What one transfer of torch's kernel for groups moves: rows have to begin at its multiples.
TRANSFER_BYTES = 16
# Multiply-adds from which torch's kernel for groups is ahead of ours: on an H100 ours takes two thirds of its time at
# 2^30, as much at 2^32, and half as long again at 2^35.
MANY_PRODUCTS = 2**32


def grouped_mm(x_TK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> Tensor:
    """y_t = x_t w_e for the group e of row t, ``(T, M)``."""
    if not torch.is_grad_enabled():
        return _product(x_TK, w_EKM, ends_E)
    result: Tensor = _GroupedProduct.apply(x_TK, w_EKM, ends_E)  # type: ignore[no-untyped-call]
    return result


def choose_moe_backend(device: torch.device, dtype: torch.dtype, rows: int, *widths: int) -> BackendChoice:
    """How ``rows`` of ``dtype`` are taken from the first of the two ``widths`` to the second on ``device``, and why."""
    kind = kind_of(device)
    if kind != "cuda":
        return BackendChoice(name="loop", reason=f"a matrix product per expert that has tokens, on {kind}")
    if dtype == torch.float64:
        return BackendChoice(name="loop", reason="float64 is for checks: a product per expert, which waits for the GPU")
    if dtype == torch.bfloat16 and rows * math.prod(widths) >= MANY_PRODUCTS and _torch_has_a_kernel(device, widths):
        return BackendChoice(name="grouped_mm", reason="torch's kernel for groups: many products in bfloat16")
    reason = "tiles of sorted tokens, the groups' sizes left on the GPU"
    if dtype == torch.bfloat16:
        reason += f"; in bfloat16 grouped_mm from {MANY_PRODUCTS:,} multiply-adds, widths being multiples of 8"
    return BackendChoice(name="triton", reason=reason)


def _torch_has_a_kernel(device: torch.device, widths: tuple[int, ...]) -> bool:
    """Whether ``F.grouped_mm`` has one: elsewhere it reads the groups' sizes, which waits for the GPU."""
    aligned = all(width * torch.bfloat16.itemsize % TRANSFER_BYTES == 0 for width in widths)
    return aligned and capability_of(device)[0] in (9, 10)


class _Kernels(Protocol):
    def grouped_mm(self, x_TK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> Tensor: ...

    def grouped_outer(self, x_TK: Tensor, g_TM: Tensor, ends_E: Tensor) -> Tensor: ...


def _kernels() -> _Kernels:
    """The Triton kernels, imported at their first use: their compiler is slow to load, and not everywhere."""
    return cast(_Kernels, import_module("resnet_bk.ops.grouped_gpu"))


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_TK, w_EKM, ends_E)
        return _product(x_TK, w_EKM, ends_E)

    @staticmethod
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TK, w_EKM, ends_E = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("grouped_mm has no second derivative")
        grad_TM = grad_TM.contiguous()
        x_bar_TK = _product(grad_TM, w_EKM.transpose(1, 2), ends_E) if ctx.needs_input_grad[0] else None
        w_bar_EKM = _sums(x_TK, grad_TM, ends_E) if ctx.needs_input_grad[1] else None
        return x_bar_TK, w_bar_EKM, None


def _product(x_TK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> Tensor:
    product: Tensor = (_product_loop if needs_no_operator(x_TK) else grouped_product)(x_TK, w_EKM, ends_E)
    return product


def _sums(x_TK: Tensor, g_TM: Tensor, ends_E: Tensor) -> Tensor:
    sums: Tensor = (_sums_loop if needs_no_operator(x_TK) else grouped_sums)(x_TK, g_TM, ends_E)
    return sums


def needs_no_operator(x: Tensor) -> bool:
    """On a CPU where nobody traces, an operator around the loop is but overhead: with few tokens, a third of it all."""
    ordinary = type(x) is Tensor or is_imagined()
    return kind_of(x.device) == "cpu" and not torch.compiler.is_compiling() and ordinary


@operator("resnet_bk::grouped_product")
def grouped_product(x_TK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> Tensor:
    """y_t = x_t w_e, as an operator: no compiler looks inside, where the CPU reads the groups' sizes."""
    backend = choose_moe_backend(x_TK.device, x_TK.dtype, *x_TK.shape, w_EKM.shape[2]).name
    if backend == "grouped_mm":
        return F.grouped_mm(x_TK, w_EKM, offs=ends_E)
    if backend == "triton":
        return _kernels().grouped_mm(x_TK, w_EKM, ends_E)
    return _product_loop(x_TK, w_EKM, ends_E)


@operator("resnet_bk::grouped_sums")
def grouped_sums(x_TK: Tensor, g_TM: Tensor, ends_E: Tensor) -> Tensor:
    """The gradient of the matrices: for each group the sum of x_t g_t^T over its rows, ``(E, K, M)``."""
    backend = choose_moe_backend(x_TK.device, x_TK.dtype, *x_TK.shape, g_TM.shape[1]).name
    if backend == "grouped_mm":
        return F.grouped_mm(x_TK.t(), g_TM, offs=ends_E)
    if backend == "triton":
        return _kernels().grouped_outer(x_TK, g_TM, ends_E)
    return _sums_loop(x_TK, g_TM, ends_E)


def _product_loop(x_TK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> Tensor:
    y_TM = x_TK.new_empty(x_TK.shape[0], w_EKM.shape[2])
    sizes = _sizes(ends_E, len(x_TK))
    for x, w_KM, y in zip(x_TK.split_with_sizes(sizes), w_EKM.unbind(0), y_TM.split_with_sizes(sizes), strict=True):
        if len(x):
            torch.mm(x, w_KM, out=y)
    return y_TM


def _sums_loop(x_TK: Tensor, g_TM: Tensor, ends_E: Tensor) -> Tensor:
    sums_EKM = x_TK.new_empty(ends_E.shape[0], x_TK.shape[1], g_TM.shape[1])
    sizes = _sizes(ends_E, len(x_TK))
    for x, g, sum_KM in zip(
        x_TK.split_with_sizes(sizes), g_TM.split_with_sizes(sizes), sums_EKM.unbind(0), strict=True
    ):
        torch.mm(x.t(), g, out=sum_KM)
    return sums_EKM


def _sizes(ends_E: Tensor, rows: int) -> list[int]:
    """Rows of each group. Reads the ends, which waits for a device that is not the CPU; imagined, the first has all."""
    ends = [rows] * len(ends_E) if is_imagined() else ends_E.tolist()
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


@grouped_product.register_fake
def _(x_TK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> Tensor:  # noqa: ARG001  # the operator's arguments
    return x_TK.new_empty(x_TK.shape[0], w_EKM.shape[2])


@grouped_sums.register_fake
def _(x_TK: Tensor, g_TM: Tensor, ends_E: Tensor) -> Tensor:
    return x_TK.new_empty(ends_E.shape[0], x_TK.shape[1], g_TM.shape[1])


@register_flop_formula([torch.ops.resnet_bk.grouped_product, torch.ops.resnet_bk.grouped_sums])
def _flops(x_shape: torch.Size, other_shape: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """Both multiply each row's K numbers with M: two for each multiply-add."""
    return 2 * x_shape[0] * x_shape[1] * other_shape[-1]
