"""Attention that was trained on whole windows, read with a window of its own that slides: each token sees the last ones
alone, at distances that training had, however long the text."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from quality_study.mixers import PositionedAttention
from resnet_bk.layers.attention import CausalAttention
from resnet_bk.layers.context import MixerState, SequenceContext
from resnet_bk.layers.local_attention import LocalAttention
from resnet_bk.models import ResNetBKForCausalLM


class Windowed(nn.Module):
    """The same weights, rotary positions and convolution, as local attention."""

    def __init__(self, mixer: CausalAttention | PositionedAttention, window: int) -> None:
        super().__init__()
        size = mixer.convolution.size if mixer.convolution is not None else 0
        self.local = LocalAttention(
            hidden_size=mixer.output.weight.shape[0],
            num_heads=mixer.num_heads,
            window=window,
            conv_size=size,
            positions="rotary",
        )
        self.local.to(mixer.output.weight.device).load_state_dict(mixer.state_dict())
        self.local.eval()

    def forward(self, x_BND: Tensor, context: SequenceContext, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """The mixed tokens, and the last ones' keys and values."""
        found: tuple[Tensor, MixerState] = self.local(x_BND, replace(context, local_rotary=context.rotary), state)
        return found


def can_be_windowed(model: ResNetBKForCausalLM) -> bool:
    """Whether local attention can do what all of its attention does."""
    return all(mixer.positions.are_rotary_alone for mixer in _mixers(model) if isinstance(mixer, PositionedAttention))


@contextmanager
def windowed(model: ResNetBKForCausalLM, window: int) -> Iterator[None]:
    """Within, each token sees itself and the ``window - 1`` before it by attention; by recurrence it sees all."""
    before = list(_mixers(model))
    for block, mixer in zip(model.model.layers, before, strict=True):
        if isinstance(mixer, CausalAttention | PositionedAttention):
            block.mixer = Windowed(mixer, window)
    windows = {mixer: mixer.window for mixer in before if isinstance(mixer, LocalAttention)}
    for mixer in windows:
        mixer.window = min(window, mixer.window)
    try:
        yield
    finally:
        for mixer, its_own in windows.items():
            mixer.window = its_own
        for block, mixer in zip(model.model.layers, before, strict=True):
            block.mixer = mixer


def _mixers(model: ResNetBKForCausalLM) -> Iterator[nn.Module]:
    return (block.mixer for block in model.model.layers)
