"""The layer norm before a mixer or a mixture, in the type in which they compute."""

import torch
from torch import Tensor, nn

from resnet_bk.ops.layer_norm import layer_norm


class LayerNorm(nn.LayerNorm):
    """torch's; under autocast computed in float32 and rounded to autocast's type, for all that reads it."""

    def of_stream(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The residual stream, x or x + ``added``, and its norm, of ``(..., D)``."""
        return layer_norm(x, self.weight, self.bias, self.eps, dtype=type_of_products(x), added=added)


def type_of_products(x: Tensor) -> torch.dtype:
    """What x is multiplied in: autocast's type where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
