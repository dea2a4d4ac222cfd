"""A short causal convolution along the tokens, with the window that decoding needs."""

import torch
from torch import Tensor, nn

from resnet_bk.layers.padding import Padding
from resnet_bk.ops.convolution import short_convolution


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
        weight_SC: Tensor = torch.randn(self.size, self.channels) * self.size**-0.5 / 2
        weight_SC[0].add_(1)
        return weight_SC

    def forward(
        self, x_BNC: Tensor, padding: Padding | None, starts_BN: Tensor | None, window_BWC: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y ``(B, N, C)`` and the window behind each row's last real token; real tokens come first."""
        documents_BN = None if starts_BN is None else starts_BN.cumsum(1)
        y_BNC = short_convolution(x_BNC, self.weight, window=window_BWC, documents=documents_BN)
        return y_BNC, self.window_behind(x_BNC, padding, documents_BN, window_BWC)

    def window_behind(
        self, x_BNC: Tensor, padding: Padding | None, documents_BN: Tensor | None, window_BWC: Tensor | None
    ) -> Tensor:
        """The window behind each row's last real token, for those who convolve in an operator of their own.

        Of packed documents it has nothing but the last one's.
        """
        x_BNC, before = x_BNC.detach(), self.size - 1
        if padding is None:
            x_BNC = x_BNC[:, max(0, x_BNC.shape[1] - before) :]
        if documents_BN is not None:
            # Behind the real tokens no document starts, and so the last of all is in the last one.
            is_last_BN = documents_BN == documents_BN[:, -1:]
            x_BNC = x_BNC * is_last_BN[:, is_last_BN.shape[1] - x_BNC.shape[1] :].unsqueeze(-1)
        if padding is None and x_BNC.shape[1] == before:
            return x_BNC.clone()  # a view would keep all tokens alive
        if window_BWC is None:
            window_BWC = x_BNC.new_zeros(x_BNC.shape[0], before, self.channels)
        window_BWC = window_BWC.to(x_BNC.dtype)
        if padding is None:
            return torch.cat([window_BWC[:, x_BNC.shape[1] :], x_BNC], dim=1)
        x_BMC = torch.cat([window_BWC, x_BNC], dim=1)
        steps_BW = padding.num_real_B.unsqueeze(1) + torch.arange(before, device=x_BMC.device)
        return x_BMC.gather(1, steps_BW.unsqueeze(-1).expand(-1, -1, self.channels))
