"""Local attention against all pairs in double precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_bk.ops.local_attention import local_attention


def all_pairs(q, k, v, window, documents=None):
    """By the definition."""
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    token = torch.arange(q.shape[2])
    distance = token[:, None] - token
    allowed = (distance >= 0) & (distance < window)
    if documents is not None:
        allowed = (allowed & (documents[:, :, None] == documents[:, None, :])).unsqueeze(1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def tokens(rows, length, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, length, 2, 4, generator=generator, dtype=dtype) for _ in range(3)]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 70),
    window=st.integers(1, 40),
    documents=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_attention_within_the_window(rows, length, window, documents, seed):
    q, k, v = tokens(rows, length, seed)
    ids = None
    if documents:
        ids = (torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.2).long().cumsum(1)
    torch.testing.assert_close(local_attention(q, k, v, window=window, documents=ids), all_pairs(q, k, v, window, ids))


@settings(max_examples=60, deadline=None)
@given(length=st.integers(2, 40), window=st.integers(1, 20), data=st.data())
def test_it_goes_on_behind_what_came_before(length, window, data):
    cut = data.draw(st.integers(1, length - 1))
    q, k, v = tokens(2, length)
    kept = min(cut, window - 1)
    past = (k[:, cut - kept : cut], v[:, cut - kept : cut]) if kept else None
    rest = local_attention(q[:, cut:], k[:, cut:], v[:, cut:], window=window, past=past)
    torch.testing.assert_close(rest, all_pairs(q, k, v, window)[:, cut:])


def test_of_the_past_a_row_reads_what_is_filled():
    q, k, v = tokens(2, 9)
    past = (k[:, :6], v[:, :6])
    found = local_attention(q[:, 6:], k[:, 6:], v[:, 6:], window=8, past=past, filled=torch.tensor([6, 2]))
    torch.testing.assert_close(found[:1], all_pairs(q, k, v, 8)[:1, 6:])
    torch.testing.assert_close(found[1:], all_pairs(q[:, 4:], k[:, 4:], v[:, 4:], 8)[1:, 2:])


@pytest.mark.parametrize(("length", "window"), [(5, 8), (8, 8), (21, 8)])
def test_gradients_of_every_input(length, window):
    q, k, v = (x.requires_grad_() for x in tokens(1, length))
    assert torch.autograd.gradcheck(lambda *x: local_attention(*x, window=window), (q, k, v))


@pytest.mark.parametrize("window", [4, 8, 64])
def test_no_token_reads_ahead_or_behind_the_window(window):
    q, k, v = tokens(1, 30)
    before = local_attention(q, k, v, window=window)
    k[:, 12] += 1
    v[:, 12] -= 1
    changed = (local_attention(q, k, v, window=window) != before).flatten(2).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == list(range(12, min(30, 12 + window)))


def test_memory_grows_with_the_window_and_not_with_all_pairs():
    sizes = []
    for length in (1024, 8192):
        q, k, v = (x.requires_grad_() for x in tokens(1, length, dtype=torch.float32))
        saved = {}

        def pack(x, saved=saved):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            local_attention(q, k, v, window=64)
        sizes.append(sum(storage.nbytes() for storage in saved.values()))
    assert sizes[1] <= 8.2 * sizes[0]


def test_dropout_loses_weights():
    q, k, v = tokens(2, 20)
    torch.manual_seed(0)
    several = torch.stack([local_attention(q, k, v, window=8, dropout=0.5) for _ in range(4000)])
    assert not torch.allclose(several[0], several[1])
    assert (several.mean(0) - all_pairs(q, k, v, 8)).abs().max() < 0.15
