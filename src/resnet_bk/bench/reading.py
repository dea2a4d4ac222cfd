"""How a model reads held-out text: in windows of training's length, in longer ones, and in those with attention that
sees the last tokens alone."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from resnet_bk.bench.subject import language_model_loss, position_limit
from resnet_bk.bench.windowed_attention import has_attention, windowed
from resnet_bk.ops.loss import IGNORE_INDEX
from resnet_bk.schema import WindowLoss
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.data import evaluation_batches
from resnet_bk.training.data.dataset import Tokens
from resnet_bk.training.micro_step import autocast, moved

Batches = Iterable[tuple[Tensor, Tensor]]

WINDOW_TIMES = (1, 4, 16)  # the training length: windows in which the test text is read
LONGEST_WINDOW = 8192  # tokens; what needs memory by the square of the length still has it there


def windows_of(tokens: Tokens, training: TrainingConfig, max_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and targets ``(B, N)`` of windows as long as training's, spread over the text."""
    return evaluation_batches(
        tokens, batch_size=training.batch_size, sequence_length=training.sequence_length, max_tokens=max_tokens
    )


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Batches, training: TrainingConfig, device: torch.device) -> float:
    """Nats a token of any language model in evaluation mode."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for input_ids, targets in batches:
        predicted = int((targets != IGNORE_INDEX).sum())
        if not predicted:
            continue
        with autocast(device, training.precision):
            loss = language_model_loss(model, moved(input_ids, device), moved(targets, device))
        total, count = total + float(loss) * predicted, count + predicted
    model.train(was_training)
    return total / count


def losses_by_window(
    model: nn.Module, tokens: Tokens, training: TrainingConfig, max_tokens: int, device: torch.device
) -> list[WindowLoss]:
    """Losses of the same tokens in windows of each length that the text has room for and the model takes.

    They are of pieces as long as the longest window, spread over the text: ``max_tokens``, rounded up to whole ones.
    """
    trained = training.sequence_length
    room = min(len(tokens) - 1, LONGEST_WINDOW)
    lengths = [times * trained for times in WINDOW_TIMES if times == 1 or times * trained <= room]
    pieces = list(windows_of(tokens, replace(training, sequence_length=lengths[-1]), max_tokens))
    found = [
        WindowLoss(length=length, loss=finite(mean_loss(model, _cut(pieces, length, training), training, device)))
        for length in lengths
        if length == trained or length <= _longest_taken(model, trained)
    ]
    longest = found[-1].length
    if longest > trained and has_attention(model):
        with windowed(model, trained):
            loss = mean_loss(model, _cut(pieces, longest, training), training, device)
        found.append(WindowLoss(length=longest, attention_window=trained, loss=finite(loss)))
    return found


def finite(value: float) -> float | None:
    """None for what is no number."""
    return value if math.isfinite(value) else None


def _cut(pieces: Batches, length: int, training: TrainingConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces in windows of ``length``, which divides theirs; as many tokens at once as in training."""
    rows = max(1, training.batch_size * training.sequence_length // length)
    for piece in pieces:
        input_ids, targets = (tokens.view(-1, length) for tokens in piece)
        for first in range(0, len(targets), rows):
            yield input_ids[first : first + rows], targets[first : first + rows]


def _longest_taken(model: nn.Module, trained: int) -> int:
    """A module from elsewhere may have a table that it tells nobody of, and a GPU's process ends behind it."""
    return position_limit(model) or (LONGEST_WINDOW if isinstance(model, PreTrainedModel) else trained)
