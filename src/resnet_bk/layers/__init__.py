"""Thin modules over ops: mixers, the mixture of experts, blocks."""

from resnet_bk.layers.attention import CausalAttention as CausalAttention
from resnet_bk.layers.bk import BKMixer as BKMixer
from resnet_bk.layers.block import BKBlock as BKBlock
from resnet_bk.layers.block import MixerBlock as MixerBlock
from resnet_bk.layers.mixture import MixtureOfExperts as MixtureOfExperts

__all__ = ["BKBlock", "BKMixer", "CausalAttention", "MixerBlock", "MixtureOfExperts"]
