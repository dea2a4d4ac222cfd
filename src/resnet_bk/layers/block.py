"""Blocks: how a mixer and a mixture of experts change the residual stream."""

from torch import Tensor, nn

from resnet_bk.layers.bk import BKMixer
from resnet_bk.layers.context import MixerState, SequenceContext
from resnet_bk.layers.mixture import MixtureOfExperts, Routing
from resnet_bk.layers.norm import LayerNorm


class BKBlock(nn.Module):
    """The seed's block: h = LN(x), m = MoE(h), v = w . m, x <- x + m + W_o [Re G(v), Im G(v)].

    In training ``dropout`` sets that share of both sums' numbers to 0.
    """

    def __init__(
        self, *, hidden_size: int, layer_norm_eps: float, mixer: BKMixer, moe: MixtureOfExperts, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm = LayerNorm(hidden_size, eps=layer_norm_eps)
        self.moe = moe
        self.mixer = mixer

    def forward(
        self, x_BND: Tensor, context: SequenceContext, state: MixerState | None
    ) -> tuple[Tensor, MixerState | None, Routing]:
        """The residual stream after the block, the chains' state, and how the tokens were routed."""
        x_BND, normed_BND = self.norm.of_stream(x_BND)
        m_BND, routing = self.moe(normed_BND, real_tokens(context), context.batch_rows, context.noise_TE)
        mixed_BND, state = self.mixer(m_BND, context, state)
        return x_BND + self.dropout(m_BND) + self.dropout(mixed_BND), state, routing


class MixerBlock(nn.Module):
    """A block with any other mixer: x <- x + mixer(LN1 x), x <- x + MoE(LN2 x), either with ``dropout``."""

    def __init__(
        self, *, hidden_size: int, layer_norm_eps: float, mixer: nn.Module, moe: MixtureOfExperts, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.mixer_norm = LayerNorm(hidden_size, eps=layer_norm_eps)
        self.mixer = mixer
        self.moe_norm = LayerNorm(hidden_size, eps=layer_norm_eps)
        self.moe = moe

    def forward(
        self, x_BND: Tensor, context: SequenceContext, state: MixerState | None
    ) -> tuple[Tensor, MixerState, Routing]:
        """The residual stream after the block, the mixer's state, and how the tokens were routed."""
        x_BND, normed_BND = self.mixer_norm.of_stream(x_BND)
        mixed_BND, state = self.mixer(normed_BND, context, state)
        x_BND, normed_BND = self.moe_norm.of_stream(x_BND, self.dropout(mixed_BND))
        m_BND, routing = self.moe(normed_BND, real_tokens(context), context.batch_rows, context.noise_TE)
        return x_BND + self.dropout(m_BND), state, routing


def real_tokens(context: SequenceContext) -> Tensor | None:
    """Which tokens are real, ``(B, N)``; None if all are."""
    return None if context.padding is None else context.padding.real_BN
