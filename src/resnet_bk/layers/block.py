"""Blocks: how a mixer and a mixture of experts change the residual stream."""

from typing import Any

from torch import Tensor, nn

from resnet_bk.layers.bk import BKMixer
from resnet_bk.layers.mixture import MixtureOfExperts, Routing
from resnet_bk.layers.padding import Padding


class BKBlock(nn.Module):
    """The seed's block: h = LN(x), m = MoE(h), v = w . m, x <- x + m + W_o [Re G(v), Im G(v)]."""

    def __init__(self, *, hidden_size: int, layer_norm_eps: float, mixer: BKMixer, moe: MixtureOfExperts) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.moe = moe
        self.mixer = mixer

    def forward(
        self, x_BND: Tensor, padding: Padding | None, state_BH2: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Routing]:
        """The residual stream after the block, the chains' state, and how the tokens were routed."""
        m_BND, routing = self.moe(self.norm(x_BND), None if padding is None else padding.real_BN)
        mixed_BND, state_BH2 = self.mixer(m_BND, padding, state_BH2)
        return x_BND + m_BND + mixed_BND, state_BH2, routing


class MixerBlock(nn.Module):
    """A block with any other mixer: x <- x + mixer(LN1 x), x <- x + MoE(LN2 x)."""

    def __init__(self, *, hidden_size: int, layer_norm_eps: float, mixer: nn.Module, moe: MixtureOfExperts) -> None:
        super().__init__()
        self.mixer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.mixer = mixer
        self.moe_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.moe = moe

    def forward(self, x_BND: Tensor, padding: Padding | None, *mixer_inputs: Any) -> tuple[Tensor, Any, Routing]:
        """The residual stream after the block, the mixer's state, and how the tokens were routed."""
        mixed_BND, state = self.mixer(self.mixer_norm(x_BND), *mixer_inputs)
        x_BND = x_BND + mixed_BND
        m_BND, routing = self.moe(self.moe_norm(x_BND), None if padding is None else padding.real_BN)
        return x_BND + m_BND, state, routing
