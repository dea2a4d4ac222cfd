"""How a trained model reads held-out text: in windows of several lengths, and what of it is new to it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quality_study.mixers import PositionedAttention
from quality_study.tasks import Text
from resnet_bk.bench.windowed_attention import windowed
from resnet_bk.layers.attention import CausalAttention
from resnet_bk.models import ResNetBKForCausalLM
from resnet_bk.ops.loss import IGNORE_INDEX
from resnet_bk.training.config import Precision
from resnet_bk.training.micro_step import autocast

Tokens = NDArray[np.int64]

TIMES = (1, 4, 16)  # the training length
OVERLAPPING = 8  # windows that each token is in, where they overlap
SLIDING = "sliding"
WINDOWED = "windowed"
# Mixers that see all tokens, until they get a window.
SEE_ALL = (CausalAttention, PositionedAttention)
TOKENS_AT_ONCE = 16_384
# By whether the phrase that a token ends is in the training text, and whether it was read before in the window.
KINDS = ("in both", "in the training text", "in the window", "in neither")


def loss_by_position(
    model: ResNetBKForCausalLM, tokens: Tokens, *, length: int, buckets: int, precision: Precision
) -> list[float]:
    """Mean loss of equally many positions each, over all whole windows of ``length`` tokens."""
    starts = _whole_windows(tokens, length)
    sums = torch.zeros(length, dtype=torch.float64)
    for nats in _read(model, tokens, starts, length, precision):
        sums += nats
    return (sums / len(starts)).view(buckets, -1).mean(1).tolist()


def losses_by_window(model: ResNetBKForCausalLM, tokens: Tokens, length: int, precision: Precision) -> dict[str, float]:
    """Loss of a text that is read in windows of :data:`TIMES` the training ``length``, by their length, and in windows
    of the training length that overlap, each beginning an eighth of it further (:data:`SLIDING`). And in the longest of
    the others, while attention sees the last ``length`` tokens alone (:data:`WINDOWED`), if it can."""
    found = {
        str(times * length): loss_in_windows(model, tokens, times * length, times * length, precision)
        for times in TIMES
    }
    found[SLIDING] = loss_in_windows(model, tokens, length, max(1, length // OVERLAPPING), precision)
    if _can_be_windowed(model):
        longest = max(TIMES) * length
        with windowed(model, length, SEE_ALL):
            found[WINDOWED] = loss_in_windows(model, tokens, longest, longest, precision)
    return found


def _can_be_windowed(model: ResNetBKForCausalLM) -> bool:
    """Whether local attention can do what all of its attention does."""
    mixers = [block.mixer for block in model.model.layers]
    return all(mixer.positions.are_rotary_alone for mixer in mixers if isinstance(mixer, PositionedAttention))


def loss_in_windows(
    model: ResNetBKForCausalLM, tokens: Tokens, length: int, stride: int, precision: Precision
) -> float:
    """Mean loss of all ``tokens`` but the first, each in the first window that has it; windows of ``length`` tokens
    begin ``stride`` of them further, the last one at what makes it whole."""
    predicted = len(tokens) - 1
    length = min(length, predicted)
    starts = np.minimum(np.arange(0, predicted - length + stride, stride), predicted - length)
    total, done = 0.0, 0
    for start, nats in zip(starts, _read(model, tokens, starts, length, precision), strict=True):
        total += float(nats[done - start :].sum())
        done = int(start) + length
    return total / predicted


def loss_by_kind(
    model: ResNetBKForCausalLM, tokens: Tokens, text: Text, length: int, precision: Precision
) -> dict[str, Any]:
    """Of each of :data:`KINDS` its share of the tokens that end a phrase of one window, and their mean loss; over whole
    windows of ``length`` of the ``tokens``, which were held out from the ``text``'s training part."""
    starts = _whole_windows(tokens, length)
    kinds = torch.from_numpy(kinds_of(tokens, starts, length, text))
    nats = torch.stack(list(_read(model, tokens, starts, length, precision)))
    count = int((kinds != IGNORE_INDEX).sum())
    return {
        name: {"share": int(mine.sum()) / count, "loss": float(nats[mine].mean())}
        for kind, name in enumerate(KINDS)
        if (mine := kinds == kind).any()
    }


def kinds_of(tokens: Tokens, starts: Tokens, length: int, text: Text) -> Tokens:
    """The kind of each predicted token of the windows at ``starts``, as a number of :data:`KINDS`, (W, N);
    ``IGNORE_INDEX`` where its phrase began before the window."""
    assert text.phrase > 1
    phrases = _phrases(tokens, text)
    is_learned = np.isin(phrases, _phrases(text.train, text))
    kinds = np.full((len(starts), length), IGNORE_INDEX, dtype=np.int64)
    for row, start in enumerate(starts):
        # Phrases that lie in the window: the token at ``start + text.phrase - 1`` ends the first.
        mine = slice(start, start + length + 2 - text.phrase)
        _, first, inverse = np.unique(phrases[mine], return_index=True, return_inverse=True)
        was_read = first[inverse] < np.arange(len(inverse))
        kinds[row, text.phrase - 2 :] = np.where(is_learned[mine], np.where(was_read, 0, 1), np.where(was_read, 2, 3))
    return kinds


def _phrases(tokens: Tokens, text: Text) -> Tokens:
    """One number for every ``text.phrase`` tokens in a row."""
    assert text.vocab_size**text.phrase < 2**63
    windows = np.lib.stride_tricks.sliding_window_view(tokens, text.phrase)
    numbers: Tokens = windows @ text.vocab_size ** np.arange(text.phrase)
    return numbers


def _whole_windows(tokens: Tokens, length: int) -> Tokens:
    """Where windows of ``length`` begin that lie one after another, each with a token behind it."""
    starts: Tokens = np.arange((len(tokens) - 1) // length) * length
    return starts


@torch.no_grad()
def _read(
    model: ResNetBKForCausalLM, tokens: Tokens, starts: Tokens, length: int, precision: Precision
) -> Iterator[Tensor]:
    """Nats of the ``length`` tokens behind the first of each window, (N,), float64, on the CPU."""
    model.eval()
    rows = max(1, TOKENS_AT_ONCE // length)
    for begin in range(0, len(starts), rows):
        windows = [tokens[start : start + length + 1] for start in starts[begin : begin + rows]]
        ids = torch.from_numpy(np.stack(windows))
        with autocast(model.device, precision):
            logits = model(ids[:, :-1].to(model.device), use_cache=False).logits
        nats = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), ids[:, 1:].flatten().to(model.device), reduction="none"
        )
        yield from nats.view(len(ids), -1).double().cpu()
