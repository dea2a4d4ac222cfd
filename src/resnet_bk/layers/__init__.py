"""Thin modules over ops: mixers, the mixture of experts, blocks."""

from resnet_bk.layers.attention import CausalAttention as CausalAttention
from resnet_bk.layers.bk import BKMixer as BKMixer
from resnet_bk.layers.block import BKBlock as BKBlock
from resnet_bk.layers.block import MixerBlock as MixerBlock
from resnet_bk.layers.context import SequenceContext as SequenceContext
from resnet_bk.layers.convolution import ShortConvolution as ShortConvolution
from resnet_bk.layers.local_attention import LocalAttention as LocalAttention
from resnet_bk.layers.mixture import MixtureOfExperts as MixtureOfExperts
from resnet_bk.layers.resolvent import ResolventMixer as ResolventMixer

__all__ = [
    "BKBlock",
    "BKMixer",
    "CausalAttention",
    "LocalAttention",
    "MixerBlock",
    "MixtureOfExperts",
    "ResolventMixer",
    "SequenceContext",
    "ShortConvolution",
]
