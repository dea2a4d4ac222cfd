"""Which windows a batch has: a function of (seed, step), each window once an epoch, targets the next tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_training import refused

from resnet_bk.ops.loss import IGNORE_INDEX
from resnet_bk.training.data import evaluation_batches, training_batch


def numbered(length):
    """Tokens that tell their place."""
    return np.arange(length, dtype=np.uint16)


def starts(tokens, *, batch_size, sequence_length, seed, steps):
    """Where each row of the first ``steps`` batches starts, in order."""
    options = {"batch_size": batch_size, "sequence_length": sequence_length, "seed": seed}
    return [int(row[0]) for step in range(steps) for row in training_batch(tokens, **options, step=step)[0]]


CASES = {
    "sequence_length": st.integers(1, 12),
    "slack": st.integers(0, 11),
    "windows": st.integers(1, 30),
    "seed": st.integers(0, 2**32),
}


def text_of(windows, sequence_length, slack):
    return numbered(windows * sequence_length + 1 + slack % sequence_length)


@given(**CASES, batch_size=st.integers(1, 7))
@settings(deadline=None)
def test_targets_are_the_next_tokens(sequence_length, slack, windows, seed, batch_size):
    tokens = text_of(windows, sequence_length, slack)
    for step in (0, 3, 1000):
        options = {"batch_size": batch_size, "sequence_length": sequence_length, "seed": seed}
        input_ids, targets = training_batch(tokens, **options, step=step)
        assert input_ids.dtype == targets.dtype == torch.int64
        assert input_ids.shape == targets.shape == (batch_size, sequence_length)
        assert torch.equal(targets, input_ids + 1)
        assert torch.equal(input_ids, input_ids[:, :1] + torch.arange(sequence_length))


@given(**CASES)
@settings(deadline=None)
def test_an_epoch_visits_every_window_exactly_once(sequence_length, slack, windows, seed):
    tokens = text_of(windows, sequence_length, slack)
    visited = starts(tokens, batch_size=1, sequence_length=sequence_length, seed=seed, steps=3 * windows)
    for epoch in range(3):
        cut = sorted(visited[epoch * windows : (epoch + 1) * windows])
        assert 0 <= cut[0] <= slack % sequence_length
        assert cut == [cut[0] + place * sequence_length for place in range(windows)]


@given(**CASES, batch_size=st.integers(1, 7))
@settings(deadline=None)
def test_the_batch_size_only_groups_the_windows(sequence_length, slack, windows, seed, batch_size):
    tokens = text_of(windows, sequence_length, slack)
    options = {"sequence_length": sequence_length, "seed": seed}
    grouped = starts(tokens, batch_size=batch_size, steps=9, **options)
    assert grouped == starts(tokens, batch_size=1, steps=9 * batch_size, **options)


def test_a_batch_does_not_depend_on_earlier_calls():
    tokens, options = numbered(400), {"batch_size": 5, "sequence_length": 7}
    first = {step: training_batch(tokens, **options, seed=3, step=step) for step in range(60)}
    for seed in range(10):
        training_batch(tokens, **options, seed=seed, step=seed)
    torch.manual_seed(9)
    np.random.default_rng(9).random()
    for step in (59, 0, 31, 12):
        again = training_batch(tokens.copy(), **options, seed=3, step=step)
        assert torch.equal(again[0], first[step][0]) and torch.equal(again[1], first[step][1])


def test_epochs_and_seeds_differ_in_order_and_offset():
    tokens = numbered(30 * 16 + 16)
    epochs = [
        tuple(starts(tokens, batch_size=30, sequence_length=16, seed=seed, steps=2)[30 * epoch : 30 * (epoch + 1)])
        for seed in range(8)
        for epoch in range(2)
    ]
    assert len(set(epochs)) == 16
    assert len({min(epoch) for epoch in epochs}) > 4, "the offset moves, so that no token is always a first one"
    assert all(list(epoch) != sorted(epoch) for epoch in epochs)


def test_a_text_of_one_window_and_one_target_is_enough_and_one_token_less_is_refused():
    options = {"batch_size": 2, "sequence_length": 8, "seed": 0, "step": 5}
    input_ids, targets = training_batch(numbered(9), **options)
    assert input_ids.tolist() == [list(range(8))] * 2
    assert targets.tolist() == [list(range(1, 9))] * 2
    with refused(r"the text has 8 tokens, fewer than sequence_length \+ 1 = 9; give more text or a shorter"):
        training_batch(numbered(8), **options)


@given(
    length=st.integers(2, 200),
    batch_size=st.integers(1, 5),
    sequence_length=st.integers(1, 20),
    max_tokens=st.none() | st.integers(1, 250),
)
@settings(deadline=None, max_examples=200)
def test_evaluation_predicts_each_token_but_the_first_once_in_order(length, batch_size, sequence_length, max_tokens):
    predicted = []
    options = {"batch_size": batch_size, "sequence_length": sequence_length, "max_tokens": max_tokens}
    for input_ids, targets in evaluation_batches(numbered(length), **options):
        assert input_ids.shape == targets.shape
        assert 1 <= input_ids.shape[0] <= batch_size
        assert input_ids.shape[1] == min(sequence_length, length - 1), "no longer than the text"
        real = targets != IGNORE_INDEX
        assert torch.equal(targets[real], input_ids[real] + 1), "each target follows its input"
        predicted += targets[real].tolist()
    if max_tokens is None or max_tokens >= length - 1:
        assert predicted == list(range(1, length))
        return
    windows = -(-max_tokens // sequence_length)
    assert windows * sequence_length - (sequence_length - 1) <= len(predicted) <= windows * sequence_length
    assert predicted == sorted(set(predicted)), "in order, none twice"
    starts = [token for token in predicted if (token - 1) % sequence_length == 0]
    gaps = np.diff([*starts, starts[0] + length - 1])
    assert gaps.max() - gaps.min() <= 2 * sequence_length, "spread evenly"


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_large_token_ids_keep_their_value(dtype):
    tokens = np.array([0, np.iinfo(dtype).max, 1, np.iinfo(dtype).max - 1], dtype=dtype)
    input_ids, targets = training_batch(tokens, batch_size=1, sequence_length=3, seed=0, step=0)
    assert [*input_ids[0].tolist(), int(targets[0, -1])] == tokens.tolist()
    ((input_ids, targets),) = evaluation_batches(tokens, batch_size=1, sequence_length=3)
    assert [*input_ids[0].tolist(), int(targets[0, -1])] == tokens.tolist()
