"""The short convolution in Triton: one pass over memory forward, one backward, no padded copy of the tokens."""

from typing import Any

import torch
import triton
from torch import Tensor

from resnet_bk.ops.convolution_kernels import backward_kernel, forward_kernel

TOKENS, CHANNELS = 64, 64  # of a tile


def forward(x_BNC: Tensor, weight_SC: Tensor, window_BWC: Tensor | None, document_BN: Tensor | None) -> Tensor:
    """y ``(B, N, C)`` in x's type."""
    x_BNC = x_BNC.contiguous()
    y_BNC = torch.empty_like(x_BNC)
    forward_kernel[_grid(x_BNC)](
        x_BNC,
        weight_SC.contiguous(),
        *_optional(x_BNC, window_BWC, document_BN),
        y_BNC,
        **_constants(x_BNC, weight_SC, window_BWC, document_BN),
    )
    return y_BNC


def backward(
    grad_BNC: Tensor, x_BNC: Tensor, weight_SC: Tensor, window_BWC: Tensor | None, document_BN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight."""
    grad_BNC, x_BNC = grad_BNC.contiguous(), x_BNC.contiguous()
    grid = _grid(x_BNC)
    grad_x_BNC = torch.empty_like(x_BNC)
    parts = x_BNC.new_empty(grid[0], *weight_SC.shape, dtype=torch.float32)
    backward_kernel[grid](
        grad_BNC,
        x_BNC,
        weight_SC.contiguous(),
        *_optional(x_BNC, window_BWC, document_BN),
        grad_x_BNC,
        parts,
        **_constants(x_BNC, weight_SC, window_BWC, document_BN),
    )
    return grad_x_BNC, parts.sum(0).to(weight_SC.dtype)


def _grid(x_BNC: Tensor) -> tuple[int, int]:
    """Rows and tiles of tokens in the one axis that has no limit worth a thought, channels in the other."""
    batch_size, length, channels = x_BNC.shape
    return batch_size * triton.cdiv(length, TOKENS), triton.cdiv(channels, CHANNELS)


def _optional(x_BNC: Tensor, window_BWC: Tensor | None, document_BN: Tensor | None) -> tuple[Tensor, Tensor]:
    """A tensor that nobody reads stands for what is not there."""
    window = x_BNC if window_BWC is None else window_BWC.contiguous()
    return window, x_BNC if document_BN is None else document_BN.contiguous()


def _constants(
    x_BNC: Tensor, weight_SC: Tensor, window_BWC: Tensor | None, document_BN: Tensor | None
) -> dict[str, Any]:
    _, length, channels = x_BNC.shape
    return {
        "length": length,
        "channels": channels,
        "SIZE": weight_SC.shape[0],
        "HAS_WINDOW": window_BWC is not None,
        "HAS_DOCUMENTS": document_BN is not None,
        "TOKENS": TOKENS,
        "CHANNELS": CHANNELS,
    }
