"""Batches of token windows: training batches as a pure function of (seed, step), evaluation batches in order."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnet_bk.errors import UserError
from resnet_bk.ops.loss import IGNORE_INDEX
from resnet_bk.training.data.dataset import Tokens


def training_batch(
    tokens: Tokens, *, batch_size: int, sequence_length: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Batch number ``step``: token ids and their targets (the next tokens), both int64 ``(B, N)``.

    Each epoch cuts the text into windows at a new random offset and visits them in a new random order, so that every
    token is seen as often as any other; nothing depends on earlier calls.

    Raises:
        UserError: the text is shorter than one window and its last target.
    """
    check_long_enough(tokens, sequence_length)
    windows_per_epoch = (len(tokens) - 1) // sequence_length
    rows = []
    for draw in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(draw, windows_per_epoch)
        offset, order = _epoch(seed, epoch, windows_per_epoch, (len(tokens) - 1) % sequence_length)
        start = offset + int(order[place]) * sequence_length
        rows.append(tokens[start : start + sequence_length + 1])
    batch = torch.from_numpy(np.stack(rows).astype(np.int64))
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def evaluation_batches(
    tokens: Tokens, *, batch_size: int, sequence_length: int, max_tokens: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows in order that predict each token but the first once; ``-100`` fills the last one's targets.

    ``max_tokens``, rounded up to whole windows, takes only as many of them, spread evenly over the text: the first ones
    alone would be those of a few documents. A window is no longer than the text.
    """
    sequence_length = max(1, min(sequence_length, len(tokens) - 1))
    all_windows = -(-(len(tokens) - 1) // sequence_length)
    num_windows = all_windows if max_tokens is None else min(all_windows, -(-max_tokens // sequence_length))
    starts = [window * all_windows // num_windows * sequence_length for window in range(num_windows)]
    for begin in range(0, num_windows, batch_size):
        rows = starts[begin : begin + batch_size]
        input_ids = np.zeros((len(rows), sequence_length), dtype=np.int64)
        targets = np.full((len(rows), sequence_length), IGNORE_INDEX, dtype=np.int64)
        for row, start in enumerate(rows):
            piece = tokens[start : start + sequence_length + 1]
            input_ids[row, : len(piece) - 1], targets[row, : len(piece) - 1] = piece[:-1], piece[1:]
        yield torch.from_numpy(input_ids), torch.from_numpy(targets)


def check_long_enough(tokens: Tokens, sequence_length: int) -> None:
    """Raises a UserError if the text is shorter than one window and its last target."""
    if len(tokens) < sequence_length + 1:
        raise UserError(
            f"the text has {len(tokens):,} tokens, fewer than sequence_length + 1 = {sequence_length + 1:,}; "
            "give more text or a shorter --sequence-length"
        )


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, num_windows: int, slack: int) -> tuple[int, NDArray[np.int64]]:
    generator = np.random.default_rng([seed, epoch])
    return int(generator.integers(slack + 1)), generator.permutation(num_windows)
