"""The loss's chunk is a choice: the same values and gradients whatever it is, and less memory with a smaller one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_bk.memory.tracking import TensorTracker
from resnet_bk.ops.loss import cross_entropy, linear_cross_entropy


def inputs(tokens, hidden, vocab, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    w = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (1, tokens), generator=generator)
    targets[torch.rand(1, tokens, generator=generator) < 0.2] = -100
    targets[0, 0] = 0
    return x, w, targets


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 30), chunk=st.integers(1, 40), hidden=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_value_and_gradients_are_those_of_the_whole(tokens, chunk, hidden, seed):
    x, w, targets = inputs(tokens, hidden, 11, torch.float64, seed)
    ours = linear_cross_entropy(x, w, targets, chunk_tokens=chunk)
    whole = cross_entropy(x @ w.t(), targets)
    torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)
    for found, exact in zip(torch.autograd.grad(ours, (x, w)), torch.autograd.grad(whole, (x, w)), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, w, targets, chunk_tokens=chunk), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_training_types_chunks_add_nothing_but_rounding(dtype):
    x, w, targets = inputs(96, 32, 200, dtype)
    found = [torch.autograd.grad(linear_cross_entropy(x, w, targets, chunk_tokens=c), (x, w)) for c in (96, 13)]
    for one, other in zip(*found, strict=True):
        difference = (one.double() - other.double()).norm() / one.double().norm()
        assert difference < (1e-6 if dtype == torch.float32 else 5e-3)


def test_a_smaller_chunk_takes_less_memory():
    x, w, targets = inputs(512, 16, 4000, torch.float32)
    peaks = []
    for chunk in (None, 128, 32):
        with TensorTracker() as tracker:
            linear_cross_entropy(x, w, targets, chunk_tokens=chunk)
        peaks.append(tracker.peak_bytes)
    assert peaks[0] > 2 * peaks[1] > 4 * peaks[2] / 1.5


def test_no_tokens_at_all_are_refused():
    x, w, targets = inputs(4, 2, 5, torch.float32)
    with pytest.raises(ValueError, match="chunk_tokens is 0; give a number of at least 1"):
        linear_cross_entropy(x, w, targets, chunk_tokens=0)


@pytest.mark.parametrize(
    "cut", [lambda y: y[:, :5], lambda y: y[:2], lambda y: torch.cat([y, y]), lambda y: y.flatten()]
)
def test_targets_of_other_tokens_are_refused(cut):
    x, w, targets = torch.randn(3, 7, 8), torch.randn(11, 8), torch.randint(11, (3, 7))
    with pytest.raises(ValueError, match=r"one target for each token"):
        linear_cross_entropy(x, w, cut(targets))
