"""The layer norm before a mixer or a mixture, in the type in which they compute."""

import torch
from torch import Tensor, nn

from resnet_bk.ops.layer_norm import added_layer_norm, layer_norm


class LayerNorm(nn.LayerNorm):
    """torch's; under autocast computed in float32 and rounded to autocast's type, for all that reads it."""

    def forward(self, x: Tensor) -> Tensor:
        """The norm of ``(..., D)``."""
        return layer_norm(x, self.weight, self.bias, self.eps, dtype=_type_of_products(x))

    def of_sum(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """``x + added`` and its norm."""
        return added_layer_norm(x, added, self.weight, self.bias, self.eps, dtype=_type_of_products(x))


def _type_of_products(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
