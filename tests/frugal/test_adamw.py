"""The update in pieces, and moments in half the memory."""

import pytest
import torch

from resnet_bk.frugal import adamw
from resnet_bk.frugal.adamw import AdamWSettings, update
from resnet_bk.threads import ELEMENTS_WORTH_A_THREAD

SETTINGS = AdamWSettings(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


def state(numel, moments=torch.float32):
    weights = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    return [weights, torch.zeros(numel, dtype=moments), torch.zeros(numel, dtype=moments), torch.zeros(())]


def gradient(numel, step):
    return torch.randn(numel, generator=torch.Generator().manual_seed(1000 * numel + step))


@pytest.mark.parametrize("numel", [1, 7, 1000, 3 * 2**12 + 5])
def test_gradients_in_bfloat16_give_what_their_values_in_float32_give(numel, monkeypatch):
    monkeypatch.setattr(adamw, "PIECE", 2**12)
    whole, pieces = state(numel), state(numel)
    for step in range(5):
        half = gradient(numel, step).bfloat16()
        for (weights, *moments), given in ((whole, half.float()), (pieces, half)):
            update(weights, given, *moments, SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
    assert whole[-1] == 5


def first_moments(slopes, seed=0):
    """The gradient itself, as the first moment of a step that forgets all others, rounded."""
    moments = [torch.zeros(slopes.shape, dtype=torch.bfloat16) for _ in range(2)]
    settings = AdamWSettings(lr=0.0, beta1=0.0, beta2=0.0, eps=1e-8, weight_decay=0.0)
    update(torch.zeros(slopes.shape), slopes, *moments, torch.zeros(()), settings, seed=(seed,))
    return moments


def test_stochastic_rounding_picks_a_neighbour_and_is_right_on_average():
    x = torch.randn(1000).repeat_interleave(500).view(1000, 500)
    for exact, rounded in zip((x, x * x), first_moments(x), strict=True):
        error = (rounded.float() - exact).abs()
        spacing = 2.0 ** (exact.abs().log2().floor() - 7)
        assert (error < spacing).all()
        # 500 draws of at most half a spacing's deviation each: the mean's is 0.022 spacings at most.
        bias = (rounded.float().mean(1) - exact[:, 0]) / spacing[:, 0]
        assert bias.abs().max() < 6 * 0.0224
        assert bias.mean().abs() < 6 * 0.0224 / 1000**0.5


def test_both_moments_are_rounded_by_bits_of_their_own():
    x = torch.full((20_000,), 1 + 2**-9)  # both a quarter of a spacing above a number of bfloat16, or half of one
    first, second = (rounded > 1 for rounded in first_moments(x))
    together = torch.corrcoef(torch.stack([first, second]).float())[0, 1]
    assert together.abs() < 6 / 20_000**0.5


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, float("inf"), float("-inf")])
def test_what_bfloat16_has_is_not_rounded(value):
    assert (first_moments(torch.full((1000,), value))[0].float() == value).all()


def test_what_is_no_number_stays_none():
    assert first_moments(torch.full((100,), float("nan")))[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_step_is_torchs_but_for_rounding(dtype):
    numel = 2 * ELEMENTS_WORTH_A_THREAD + 3  # more than one thread's
    exact, half = state(numel), state(numel, torch.bfloat16)
    for step in range(3):
        slopes = gradient(numel, step).to(dtype)
        update(exact[0], slopes.float(), *exact[1:], SETTINGS)
        update(half[0], slopes, *half[1:], SETTINGS, seed=(step,))
        if step == 0:  # no moment has been rounded yet where it is used
            torch.testing.assert_close(half[0], exact[0], rtol=1e-6, atol=1e-7)
    assert half[3] == exact[3] == 3
    for ours, theirs in zip(half[1:3], exact[1:3], strict=True):
        assert (ours.float() - theirs).norm() < 0.01 * theirs.norm()


def test_moments_in_bfloat16_follow_those_in_float32():
    numel = 5000
    exact, half = state(numel), state(numel, torch.bfloat16)
    for step in range(300):
        for (weights, *moments), seed in ((exact, 0), (half, step)):
            update(weights, gradient(numel, step), *moments, SETTINGS, seed=(seed,))
    # A gradient of variance 1: the second moment's mean is 1. Rounded to nearest it would stay where steps of
    # (1 - beta2) of the difference are less than half a spacing.
    assert half[2].float().mean() == pytest.approx(float(exact[2].mean()), rel=2e-3)
    moved = exact[0] - state(numel)[0]
    assert (half[0] - exact[0]).norm() < 0.02 * moved.norm()


def test_the_seed_decides_the_rounding():
    results = []
    for seed in (1, 1, 2):
        weights, *moments = state(100, torch.bfloat16)
        update(weights, gradient(100, 0), *moments, SETTINGS, seed=(seed,))
        results.append(moments[0].clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
