"""A linear layer without a bias."""

from torch import Tensor, nn

from resnet_bk.ops.one_token import linear


class Linear(nn.Linear):
    """``nn.Linear`` without a bias, which reads its matrix at memory's speed where a CPU decodes a token."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name)
        """``(..., in_features)`` to ``(..., out_features)``."""
        return linear(input, self.weight)
