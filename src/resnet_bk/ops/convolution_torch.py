"""The short convolution in plain torch, on every device, without documents.

It is a convolution over pictures one pixel high, channels last: that kernel of torch's needs no transposed copy. Its
own gradient of the weights is slow, so that both gradients are here:

    x'_j = sum_s weight_s y'_{j+s},   weight'_s = sum_j y'_j x_{j-s}
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 512  # tokens whose products with a tap stay in a cache


def forward(x_BNC: Tensor, weight_SC: Tensor, window_BWC: Tensor | None) -> Tensor:
    """y ``(B, N, C)`` in x's type."""
    return _correlation(_behind(x_BNC, weight_SC, window_BWC), weight_SC.flip(0)).contiguous()


def backward(grad_BNC: Tensor, x_BNC: Tensor, weight_SC: Tensor, window_BWC: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, in their types."""
    before = weight_SC.shape[0] - 1
    x_bar_BNC = _correlation(F.pad(grad_BNC, (0, 0, 0, before)), weight_SC).contiguous()
    return x_bar_BNC, _weight_gradient(grad_BNC, _behind(x_BNC, weight_SC, window_BWC), weight_SC)


def _behind(x_BNC: Tensor, weight_SC: Tensor, window_BWC: Tensor | None) -> Tensor:
    if window_BWC is None:
        return F.pad(x_BNC, (0, 0, weight_SC.shape[0] - 1, 0))
    return torch.cat([window_BWC, x_BNC], dim=1)


def _correlation(x_BMC: Tensor, weight_SC: Tensor) -> Tensor:
    """``y_i = sum_s weight_s x_{i+s}``."""
    weight_C11S = weight_SC.to(x_BMC.dtype).mT[:, None, None]
    with torch.autocast(x_BMC.device.type, enabled=False):
        return F.conv2d(x_BMC.mT.unsqueeze(2), weight_C11S, groups=x_BMC.shape[-1]).squeeze(2).mT


def _weight_gradient(grad_BNC: Tensor, x_BMC: Tensor, weight_SC: Tensor) -> Tensor:
    size, dtype = weight_SC.shape[0], torch.promote_types(grad_BNC.dtype, torch.float32)
    total_SC = torch.zeros(weight_SC.shape, dtype=dtype, device=grad_BNC.device)
    ones_1P = torch.ones(1, PIECE, dtype=dtype, device=grad_BNC.device)
    with torch.autocast(grad_BNC.device.type, enabled=False):
        for grad_NC, x_MC in zip(grad_BNC, x_BMC, strict=True):
            for start in range(0, len(grad_NC), PIECE):
                grad_PC = grad_NC[start : start + PIECE].to(dtype)
                for s in range(size):
                    first = start + size - 1 - s
                    # Summed by a product with ones, which is faster than a sum over rows.
                    products_PC = grad_PC * x_MC[first : first + len(grad_PC)]
                    total_SC[s : s + 1].addmm_(ones_1P[:, : len(grad_PC)], products_PC)
    return total_SC.to(weight_SC.dtype)
