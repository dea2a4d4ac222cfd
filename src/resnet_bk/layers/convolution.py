"""A short causal convolution along the tokens, one filter for each channel."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_bk.layers.padding import Padding


class ShortConvolution(nn.Module):
    """``y_i = sum_s weight_s x_{i-s}`` for s from 0 to size - 1. It starts as the identity, with a little of the rest.

    Its state is the window of the last size - 1 inputs, ``(B, size - 1, C)``.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.channels, self.size = channels, size
        self.weight = nn.Parameter(torch.empty(size, channels))

    def initial_weight(self) -> Tensor:
        """1 for the token itself, and a random part of the earlier ones."""
        weight_SC = torch.randn(self.size, self.channels) * self.size**-0.5 / 2
        weight_SC[0] += 1
        return weight_SC

    def forward(
        self, x_BNC: Tensor, padding: Padding | None, starts_BN: Tensor | None, window_BWC: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y ``(B, N, C)`` and the window behind each row's last real token; real tokens come first."""
        before = self.size - 1
        if window_BWC is None:
            x_BNC = F.pad(x_BNC, (0, 0, before, 0))
        else:
            x_BNC = torch.cat([window_BWC.to(x_BNC.dtype), x_BNC], dim=1)
        y_BNC = self._everywhere(x_BNC) if starts_BN is None else self._in_documents(x_BNC, starts_BN)
        return y_BNC, self._last(x_BNC, padding).detach()

    def _everywhere(self, x_BMC: Tensor) -> Tensor:
        # As a convolution over pictures one pixel high, channels last: that kernel needs no transposed copy.
        weight_C11S = self.weight.flip(0).mT[:, None, None]
        return F.conv2d(x_BMC.mT.unsqueeze(2), weight_C11S, groups=self.channels).squeeze(2).mT

    def _in_documents(self, x_BMC: Tensor, starts_BN: Tensor) -> Tensor:
        length, before = starts_BN.shape[1], self.size - 1
        document_BM1 = F.pad(starts_BN.long().cumsum(1), (before, 0)).unsqueeze(-1)
        now_BN1 = document_BM1[:, before:]
        y_BNC = torch.zeros_like(x_BMC[:, before:])
        for s, weight_C in enumerate(self.weight.to(x_BMC.dtype)):
            then = slice(before - s, before - s + length)
            y_BNC = y_BNC + weight_C * x_BMC[:, then] * (document_BM1[:, then] == now_BN1)
        return y_BNC

    def _last(self, x_BMC: Tensor, padding: Padding | None) -> Tensor:
        before = self.size - 1
        if padding is None:
            return x_BMC[:, x_BMC.shape[1] - before :].contiguous()
        steps_BW = padding.num_real_B.unsqueeze(1) + torch.arange(before, device=x_BMC.device)
        return x_BMC.gather(1, steps_BW.unsqueeze(-1).expand(-1, -1, x_BMC.shape[-1]))
