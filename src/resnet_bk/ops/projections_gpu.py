"""Queries, keys and values in Triton: one pass forward; backward one to the convolution's output, and its own one."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from resnet_bk.ops import convolution_gpu
from resnet_bk.ops.projections_kernels import backward_kernel, forward_kernel

TILE = 4096  # numbers of a tile
MOST_TOKENS = 64


def forward(
    x_BNC: Tensor,
    weight_SC: Tensor | None,
    window_BWC: Tensor | None,
    documents_BN: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    key_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k ``(B, N, H, K)`` and v ``(B, N, H, V)`` in x's type."""
    launch = _Launch(x_BNC, weight_SC, window_BWC, documents_BN, cos, sin, num_heads, key_size)
    results = []
    for size, grid, constants in launch.segments():
        out = x_BNC.new_empty(*x_BNC.shape[:2], num_heads, size)
        if out.numel():
            forward_kernel[grid](*launch.tensors, out, *launch.counts, **constants)
        results.append(out)
    q, k, v = results
    return q, k, v


def backward(
    gradients: tuple[Tensor, Tensor, Tensor],
    x_BNC: Tensor,
    weight_SC: Tensor | None,
    window_BWC: Tensor | None,
    documents_BN: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    key_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and weight, in their types."""
    launch = _Launch(x_BNC, weight_SC, window_BWC, documents_BN, cos, sin, num_heads, key_size)
    x_BNC = launch.tensors[0]
    z_bar_BNC = torch.empty_like(x_BNC)
    for bar, (_, grid, constants) in zip(gradients, launch.segments(), strict=True):
        if bar.numel():
            backward_kernel[grid](bar.contiguous(), *launch.tensors, z_bar_BNC, *launch.counts, **constants)
    if weight_SC is None:
        return z_bar_BNC, None
    if not x_BNC.numel():
        return z_bar_BNC, torch.zeros_like(weight_SC)
    return convolution_gpu.backward(z_bar_BNC, x_BNC, weight_SC, window_BWC, documents_BN)


class _Launch:
    """What all launches of a call share."""

    def __init__(
        self,
        x_BNC: Tensor,
        weight_SC: Tensor | None,
        window_BWC: Tensor | None,
        documents_BN: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        num_heads: int,
        key_size: int,
    ) -> None:
        if x_BNC.dtype == torch.float64:
            raise ValueError("the triton backend computes in float32, and x is float64; use backend='torch'")
        self.batch_size, self.length, channels = x_BNC.shape
        self.heads, self.key_size, self.head_size = num_heads, key_size, channels // num_heads
        self.turned = cos is not None
        x_BNC = x_BNC.contiguous()
        # A tensor that nobody reads stands for what is not there.
        optional = (weight_SC, window_BWC, documents_BN, cos, sin)
        self.tensors = (x_BNC, *(x_BNC if y is None else y.contiguous() for y in optional))
        of_all_rows = cos is None or len(cos) == 1
        self.counts = (self.length, channels, 0 if of_all_rows else self.length * (key_size // 2))
        self.constants = {
            "heads": num_heads,
            "head_size": self.head_size,
            "SIZE": 1 if weight_SC is None else weight_SC.shape[0],
            "HAS_WEIGHT": weight_SC is not None,
            "HAS_WINDOW": window_BWC is not None,
            "HAS_DOCUMENTS": documents_BN is not None,
        }

    def segments(self) -> Iterator[tuple[int, tuple[int], dict[str, Any]]]:
        """Of q, k and v: the size, the grid and the compile-time arguments."""
        value_size = self.head_size - 2 * self.key_size
        for index, size in enumerate((self.key_size, self.key_size, value_size)):
            half = (size + 1) // 2
            width = max(16, int(triton.next_power_of_2(half)))
            tokens = max(2, min(MOST_TOKENS, TILE // (2 * width)))
            is_value = index == 2
            yield (
                size,
                (self.batch_size * self.heads * triton.cdiv(self.length, tokens),),
                {
                    **self.constants,
                    "offset": index * self.key_size,
                    "size": size,
                    "half": half,
                    "NORMED": not is_value,
                    "TURNED": self.turned and not is_value,
                    "TOKENS": tokens,
                    "HALF": width,
                    "num_warps": max(4, min(16, 2 * tokens * width // 1024)),
                },
            )
