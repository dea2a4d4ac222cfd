"""What torch does otherwise on a GPU than on a CPU, for a step that is imagined there with tensors of the CPU."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention.varlen  # registers operators
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from resnet_bk.imagined import capability_of, multiprocessors_of_imagined
from resnet_bk.ops.local_attention import FIRST_WITH_FLASH

HALF_TYPES = (torch.float16, torch.bfloat16)
# Of a sum that blocks share: values that a thread adds up, and threads of a multiprocessor, of which some cards have
# fewer and take less for it.
FEWEST_VALUES, MOST_VALUES, THREADS_OF_A_MULTIPROCESSOR = 16, 256, 2048

# Functions that CUDA's autocast computes in float32 and a CPU's does not. Source: torch's "Automatic Mixed Precision"
# (docs/source/amp.md), "CUDA Ops that can autocast to float32".
IN_SINGLE = frozenset(
    (
        "__pow__",
        "__rdiv__",
        "__rpow__",
        "__rtruediv__",
        "acos",
        "asin",
        "cosh",
        "cosine_embedding_loss",
        "cdist",
        "cosine_similarity",
        "cross_entropy",
        "cumprod",
        "cumsum",
        "dist",
        "erfinv",
        "exp",
        "expm1",
        "group_norm",
        "hinge_embedding_loss",
        "kl_div",
        "l1_loss",
        "layer_norm",
        "log",
        "log10",
        "log_softmax",
        "log1p",
        "log2",
        "margin_ranking_loss",
        "mse_loss",
        "nll_loss",
        "norm",
        "normalize",
        "pow",
        "prod",
        "reciprocal",
        "rsqrt",
        "sinh",
        "smooth_l1_loss",
        "softmax",
        "softmin",
        "softplus",
        "sum",
        "renorm",
        "tan",
        "rms_norm",
    )
)


class AsOnCuda(TorchFunctionMode):
    """While it is entered, torch's functions take and keep what they would on a GPU of this capability.

    Attention by a fused kernel, dropout with a mask of bytes, and autocast with the GPU's list of float32 functions.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is torch.addmm and "out_dtype" in kwargs:
            return kwargs["out"]  # where no tensor comes of it; torch 2.11 cannot imagine such a product
        if torch.is_autocast_enabled("cpu") and getattr(func, "__name__", "") in IN_SINGLE:
            args = tuple(_in_single(x) for x in args)
        return func(*args, **kwargs)


def _in_single(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in HALF_TYPES else x


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: ARG001
    return torch.native_dropout(x, p, training)[0] if training and p else x


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As torch chooses on a GPU: flash for half types without a mask where the card has it, the memory-efficient kernel
    otherwise."""
    if torch.is_autocast_enabled("cpu"):
        half = torch.get_autocast_dtype("cpu")
        query, key, value = (x.to(half) for x in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(half)
    flash_serves = attn_mask is None and query.dtype in HALF_TYPES and capability_of(query.device) >= FIRST_WITH_FLASH
    if enable_gqa and key.shape[1] != query.shape[1]:
        if not flash_serves:  # of the others only the plain one has groups of queries
            plain: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=True
            )[0]
            return plain
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if flash_serves:
        flash: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
        return flash
    bias = None
    if attn_mask is not None:
        bias = attn_mask
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    result: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]
    return result


def _flash_backward(bound: dict[str, Any]) -> int:
    """dq in float32, padded to blocks of 128 tokens and multiples of 32 numbers of a head, and a number a query."""
    query = bound["query"]
    batch_size, heads, length, size = query.shape
    length, size = -(-length // 128) * 128, -(-size // 32) * 32
    return 4 * int(batch_size) * int(heads) * int(length) * (int(size) + 1)


def _varlen_backward(bound: dict[str, Any]) -> int:
    """The same, of rows one behind another and 128 tokens more for each."""
    queries, heads, size = map(int, bound["query"].shape)
    rows = len(bound["cu_seq_q"]) - 1
    return 4 * heads * (queries + 128 * rows) * (-(-size // 32) * 32 + 1)


def _efficient_backward(bound: dict[str, Any]) -> int:
    """A number a query; half types add up dq in float32."""
    query = bound["query"]
    batch_size, heads, length, size = query.shape
    return 4 * int(batch_size) * int(heads) * int(length) * (1 + (int(size) if query.dtype in HALF_TYPES else 0))


def _embedding_backward(bound: dict[str, Any]) -> int:
    """Ids sorted, their order, and counts: four numbers of 8 bytes for each token."""
    return 4 * 8 * int(bound["indices"].numel())


def _sum_over_rows(bound: dict[str, Any]) -> int:
    """What blocks of threads that share a column's sum leave for the last of them to add up, as with the gradients of
    biases. Source: torch's aten/src/ATen/native/cuda/Reduce.cuh, ``setReduceConfig`` and ``global_memory_size``."""
    x, dims = bound["self"], bound.get("dim") or []
    leading = sorted(int(dim) % x.ndim for dim in dims)
    if not leading or leading != list(range(len(leading))) or len(leading) == x.ndim or not x.is_contiguous():
        return 0
    rows, columns = math.prod(map(int, x.shape[: len(leading)])), math.prod(map(int, x.shape[len(leading) :]))
    vector = next(size for size in (4, 2, 1) if columns % size == 0)
    width = min(_last_power(columns // vector), 32)
    height = min(_last_power(rows), 512 // vector // width)
    values = -(-rows // height)
    blocks = -(-columns // (width * vector))
    if rows < min(16 * height, 256) or values < MOST_VALUES:
        return 0
    shares = -(-values // FEWEST_VALUES)
    if multiprocessors := multiprocessors_of_imagined():
        target = multiprocessors * (THREADS_OF_A_MULTIPROCESSOR // (width * height))
        shares = 1 if blocks > target else min(shares, -(-target // blocks))
    shares = max(shares, -(-values // MOST_VALUES))
    return 4 * columns * shares * width * vector + 512 if shares > 1 else 0


def _last_power(number: int) -> int:
    """The largest power of 2 up to it."""
    return 1 << (max(1, number).bit_length() - 1)


# By operator: bytes that torch's own kernel takes on a GPU and gives back before it returns.
WORKSPACES: dict[Any, Callable[[dict[str, Any]], int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    torch.ops.torch_attn._varlen_attn_backward.default: _varlen_backward,
    torch.ops.aten.embedding_dense_backward.default: _embedding_backward,
    torch.ops.aten.sum.dim_IntList: _sum_over_rows,
}


def workspace_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """What ``func``, an operator of torch's, takes for itself on a GPU while it runs."""
    formula = WORKSPACES.get(func)
    if formula is None:
        return 0
    names = [argument.name for argument in func._schema.arguments]
    return formula({**dict(zip(names, args, strict=False)), **kwargs})
