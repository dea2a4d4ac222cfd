"""Local attention against all pairs in double precision."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_bk.models.configuration import LONGEST_WINDOW
from resnet_bk.ops import local_attention as module
from resnet_bk.ops.local_attention import DIGIT, local_attention

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
RATES = torch.tensor([0.3, 0.01], dtype=torch.float64)


def all_pairs(q, k, v, window, documents=None, rates=RATES):
    """By the definition."""
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    token = torch.arange(q.shape[2])
    distance = token[:, None] - token
    allowed = (distance >= 0) & (distance < window)
    if documents is not None:
        allowed = (allowed & (documents[:, :, None] == documents[:, None, :])).unsqueeze(1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 - rates[:, None, None] * distance
    return (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def tokens(rows, length, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, length, 2, 4, generator=generator, dtype=dtype) for _ in range(3)]


@pytest.fixture(scope="module", autouse=True)
def short_blocks():
    """Windows of these tests are cut into blocks where four divides them, and are one where it does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHORTEST_BLOCK", 1)
        yield


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 70),
    window=st.integers(1, 40),
    documents=st.booleans(),
    fades=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_attention_within_the_window(rows, length, window, documents, fades, seed):
    q, k, v = tokens(rows, length, seed)
    ids = None
    if documents:
        ids = (torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.2).long().cumsum(1)
    rates = RATES if fades else None
    found = local_attention(q, k, v, window=window, rates=rates, documents=ids)
    torch.testing.assert_close(found, all_pairs(q, k, v, window, ids, RATES * fades))


@settings(max_examples=60, deadline=None)
@given(length=st.integers(2, 40), window=st.integers(1, 20), fades=st.booleans(), data=st.data())
def test_it_goes_on_behind_what_came_before(length, window, fades, data):
    cut = data.draw(st.integers(1, length - 1))
    q, k, v = tokens(2, length)
    kept = min(cut, window - 1)
    rates = RATES if fades else None
    rest = local_attention(q[:, cut:], k[:, cut - kept :], v[:, cut - kept :], window=window, rates=rates)
    torch.testing.assert_close(rest, all_pairs(q, k, v, window, rates=RATES * fades)[:, cut:])


@pytest.mark.parametrize("rates", [RATES, None])
def test_of_the_past_a_row_reads_what_is_filled(rates):
    q, k, v = tokens(2, 9)
    fading = RATES * (rates is not None)
    for first in (6, 8):  # three queries, and one
        filled = torch.tensor([first, 2])
        found = local_attention(q[:, first:], k, v, window=9, rates=rates, filled=filled)
        torch.testing.assert_close(found[:1], all_pairs(q, k, v, 9, rates=fading)[:1, first:])
        kept = [x[:, first - 2 :] for x in (q, k, v)]
        torch.testing.assert_close(found[1:], all_pairs(*kept, 9, rates=fading)[1:, 2:])


def by_definition(q, k, v, ends_q, ends_k, longest_q, longest_k, *, scale, window_size):
    """``varlen_attn``, row by row, with gradients."""
    (left, right), found = window_size, []
    assert (longest_q, longest_k) == (int(ends_q.diff().max()), int(ends_k.diff().max()))
    for row in range(len(ends_q) - 1):
        own, read = slice(ends_q[row], ends_q[row + 1]), slice(ends_k[row], ends_k[row + 1])
        scores = torch.einsum("nhk,mhk->hnm", q[own], k[read]) * scale
        distance = torch.arange(longest_k - longest_q, longest_k).unsqueeze(1) - torch.arange(longest_k)
        scores = scores.masked_fill((distance < -right) | (distance > left), -torch.inf)
        found.append(torch.einsum("hnm,mhk->nhk", scores.softmax(-1), v[read]))
    return torch.cat(found)


@pytest.mark.parametrize("fades", [True, False])
@pytest.mark.parametrize(("length", "before", "window"), [(21, 0, 8), (2, 7, 8), (16, 3, 8), (30, 7, 64)])
def test_by_the_kernel_for_windows_it_is_the_same(monkeypatch, length, before, window, fades):
    """That kernel is torch's and a GPU's, and is held against this below."""
    monkeypatch.setattr(module, "varlen_attn", by_definition)
    inputs = [x.requires_grad_() for x in (*tokens(3, before + length), *([RATES.clone()] if fades else []))]

    def outcome():
        q, k, v, *rates = inputs
        mixed = local_attention(q[:, before:], k, v, window=window, rates=rates[0] if fades else None)
        return mixed, *torch.autograd.grad(mixed.sin().sum(), inputs)

    wanted = outcome()
    monkeypatch.setattr(module, "_flash_serves", lambda q, *, fades: True)
    for mine, other in zip(outcome(), wanted, strict=True):
        torch.testing.assert_close(mine, other)


@needs_cuda
@pytest.mark.parametrize("fades", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("length", "before", "window"), [(3000, 0, 1024), (700, 300, 512), (130, 0, 128), (17, 5, 8)])
def test_the_gpus_kernel_for_windows_is_as_exact_as_its_types(length, before, window, dtype, fades):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, before + length, 4, 64, generator=generator).cuda().to(dtype) for _ in range(3))
    rates = torch.tensor([0.25, 0.1, 0.01, 0.001], device="cuda")
    weight = torch.randn(2, length, 4, 64, generator=generator).cuda().to(dtype)
    assert module._flash_serves(q, fades=fades)

    def outcome(kind, rates):
        inputs = [x.to(kind).requires_grad_() for x in (q, k, v)] + [rates.requires_grad_()] * fades
        mixed = local_attention(inputs[0][:, before:], *inputs[1:3], window=window, rates=rates if fades else None)
        return mixed, *torch.autograd.grad(mixed, inputs, weight.to(kind))

    wanted, found = outcome(torch.float64, rates.double()), outcome(dtype, rates)
    bounds = [1e-2] * 4 + [5e-2] * fades if dtype == torch.bfloat16 else [2e-3] * 4 + [1e-2] * fades
    for mine, exact, bound in zip(found, wanted, bounds, strict=True):
        assert (mine.double() - exact).norm() <= bound * exact.norm()


@needs_cuda
def test_the_gpus_kernel_for_windows_reads_neither_ahead_nor_behind():
    q, k, v = (x.cuda().bfloat16() for x in tokens(1, 300))
    assert module._flash_serves(F.pad(q, (0, 4)), fades=True)
    q, k, v = (F.pad(x, (0, 4)) for x in (q, k, v))
    before = local_attention(q, k, v, window=64, rates=RATES.cuda())
    k[:, 120], v[:, 120] = k[:, 120] + 1, v[:, 120] - 1
    changed = (local_attention(q, k, v, window=64, rates=RATES.cuda()) != before).flatten(2).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == list(range(120, 184))


@pytest.mark.parametrize(("shortest", "block"), [(64, 64), (128, 256)])
def test_windows_are_cut_on_a_cpu_where_blocks_are_not_too_short(monkeypatch, shortest, block):
    window, keys = 256, []

    def attend(q, k, v, rates, mask, dropout):
        keys.append(k.shape[1])
        return q

    monkeypatch.setattr(module, "SHORTEST_BLOCK", shortest)
    monkeypatch.setattr(module, "_attend", attend)
    q, k, v = tokens(1, 516)
    local_attention(q, k, v, window=window, rates=RATES)
    assert keys == [window, window + block, window + 4]


@pytest.mark.parametrize(("length", "window"), [(5, 8), (8, 8), (21, 8)])
def test_gradients_of_every_input(length, window):
    q, k, v, rates = (x.requires_grad_() for x in (*tokens(1, length), RATES.clone()))
    assert torch.autograd.gradcheck(
        lambda q, k, v, rates: local_attention(q, k, v, window=window, rates=rates), (q, k, v, rates)
    )


@pytest.mark.parametrize("window", [4, 8, 64])
def test_no_token_reads_ahead_or_behind_the_window(window):
    q, k, v = tokens(1, 30)
    before = local_attention(q, k, v, window=window, rates=RATES)
    k[:, 12] += 1
    v[:, 12] -= 1
    changed = (local_attention(q, k, v, window=window, rates=RATES) != before).flatten(2).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == list(range(12, min(30, 12 + window)))


def test_memory_grows_with_the_window_and_not_with_all_pairs():
    window, sizes = 64, []
    for length in (window + 1024, window + 8192):
        q, k, v = (x.requires_grad_() for x in tokens(1, length, dtype=torch.float32))
        saved = {}

        def pack(x, saved=saved):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            local_attention(q, k, v, window=window, rates=RATES)
        sizes.append(sum(storage.nbytes() for storage in saved.values()))
    assert sizes[1] <= 8.2 * sizes[0]


def test_dropout_loses_weights():
    q, k, v = tokens(2, 20)
    torch.manual_seed(0)
    several = torch.stack([local_attention(q, k, v, window=8, rates=RATES, dropout=0.5) for _ in range(4000)])
    assert not torch.allclose(several[0], several[1])
    assert (several.mean(0) - all_pairs(q, k, v, 8)).abs().max() < 0.15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_places_are_exact_in_half_types(dtype):
    """Fast heads far from the first key: a place that is off by one would change a weight by a factor of e."""
    window, length = 700, 1400
    q, k, v = (x.to(dtype) for x in tokens(1, length, dtype=torch.float32))
    rates = torch.tensor([1.0, 0.03125])
    found = local_attention(q, k, v, window=window, rates=rates)
    wanted = all_pairs(q, k, v, window, rates=rates.double())
    assert (found.double() - wanted).abs().max() < (0.03 if dtype is torch.bfloat16 else 0.004)


def test_windows_are_as_long_as_places_are_exact():
    places = torch.arange(2 * LONGEST_WINDOW + 1)
    for digit in (places % DIGIT, places - places % DIGIT):
        is_exact = digit.bfloat16().double() == digit
        assert is_exact[:-1].all()
    assert places[-1] == DIGIT**2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_rates_learn_in_half_types(device, dtype):
    """Of numbers as large as places, nearly all of a rate's gradient cancels."""
    window, length = 512, 1024
    q, k, v = (x.to(device) for x in tokens(4, length, dtype=torch.float32))
    rates = torch.tensor([0.25, 0.002], device=device, requires_grad=True)
    weight = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).to(device)
    found, wanted = (
        torch.autograd.grad(
            (local_attention(q.to(kind), k.to(kind), v.to(kind), window=window, rates=rates) * weight).sum(), rates
        )[0]
        for kind in (dtype, torch.float32)
    )
    assert (found - wanted).norm() <= 0.05 * wanted.norm(), (found, wanted)
