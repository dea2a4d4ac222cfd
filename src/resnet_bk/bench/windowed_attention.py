"""Attention that was trained on whole windows, with a window of its own that slides: each token sees the last ones
alone, at distances that training had, however long the text.

Rotary attention fails at distances that it was not trained on; that is no reason to cut a text into windows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeGuard, cast

from torch import Tensor, nn

from resnet_bk.layers.attention import CausalAttention
from resnet_bk.layers.context import MixerState, SequenceContext
from resnet_bk.layers.local_attention import LocalAttention
from resnet_bk.models import ResNetBKForCausalLM


class WindowedAttention(nn.Module):
    """``mixer``'s weights, rotary positions and convolution, as local attention; for evaluation.

    ``mixer`` is a :class:`CausalAttention`, or what has its parameters by the same names.
    """

    def __init__(self, mixer: nn.Module, window: int) -> None:
        super().__init__()
        weights = mixer.state_dict()
        convolution = weights.get("convolution.weight")
        self.local = LocalAttention(
            hidden_size=len(weights["output.weight"]),
            num_heads=cast(int, mixer.num_heads),
            window=window,
            conv_size=0 if convolution is None else len(convolution),
            positions="rotary",
        )
        self.local.to(weights["output.weight"]).load_state_dict(weights)
        self.local.eval()

    def forward(self, x_BND: Tensor, context: SequenceContext, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """The mixed tokens, and the last ones' keys and values."""
        found: tuple[Tensor, MixerState] = self.local(x_BND, replace(context, local_rotary=context.rotary), state)
        return found


def has_attention(model: nn.Module) -> TypeGuard[ResNetBKForCausalLM]:
    """Whether it is a model of ours with attention in a block."""
    return isinstance(model, ResNetBKForCausalLM) and any(
        isinstance(block.mixer, CausalAttention | LocalAttention) for block in model.model.layers
    )


@contextmanager
def windowed(
    model: ResNetBKForCausalLM, window: int, kinds: tuple[type[nn.Module], ...] = (CausalAttention,)
) -> Iterator[None]:
    """Within, each token sees itself and the ``window - 1`` before it by attention; by recurrence it sees all.

    ``kinds`` are the mixers that see all tokens otherwise.
    """
    before = [block.mixer for block in model.model.layers]
    windows = {mixer: mixer.window for mixer in before if isinstance(mixer, LocalAttention)}
    for block, mixer in zip(model.model.layers, before, strict=True):
        if isinstance(mixer, kinds):
            block.mixer = WindowedAttention(mixer, window)
    for mixer in windows:
        mixer.window = min(window, mixer.window)
    try:
        yield
    finally:
        for mixer, its_own in windows.items():
            mixer.window = its_own
        for block, mixer in zip(model.model.layers, before, strict=True):
            block.mixer = mixer
