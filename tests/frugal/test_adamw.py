"""The update in pieces, and moments in half the memory."""

import pytest
import torch

from resnet_bk.frugal import adamw
from resnet_bk.frugal.adamw import AdamWSettings, Noise, round_stochastically, update

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


def test_stochastic_rounding_picks_a_neighbour_and_is_right_on_average():
    x = torch.randn(1000).repeat_interleave(500).view(1000, 500)
    rounded = torch.empty(1000, 500, dtype=torch.bfloat16)
    round_stochastically(x, rounded, Noise(x.numel(), (0,)))
    error = (rounded.float() - x).abs()
    spacing = 2.0 ** (x.abs().log2().floor() - 7)
    assert (error < spacing).all()
    # 500 draws of at most half a spacing's deviation each: the mean's is 0.022 spacings at most.
    bias = (rounded.float().mean(1) - x[:, 0]) / spacing[:, 0]
    assert bias.abs().max() < 6 * 0.0224
    assert bias.mean().abs() < 6 * 0.0224 / 1000**0.5


def test_noise_is_uniform_and_another_for_each_piece_and_seed():
    length = 2**16
    noise = Noise(length, (1, 2))
    one, other = noise.take(length), noise.take(length)
    assert not torch.equal(one, other)
    assert torch.equal(Noise(length, (1, 2)).take(length), one)
    assert not torch.equal(Noise(length, (1, 3)).take(length), one)
    for draws in (one, other):
        assert draws.min() >= 0 and draws.max() < 2**16
        # Means of every bit: a half, with a deviation of 1/512.
        bits = torch.stack([(draws >> bit & 1).float().mean() for bit in range(16)])
        assert (bits - 0.5).abs().max() < 6 / 512


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, float("inf"), float("-inf")])
def test_what_bfloat16_has_is_not_rounded(value):
    out = torch.empty(1000, dtype=torch.bfloat16)
    round_stochastically(torch.full((1000,), value), out, Noise(1000, (0,)))
    assert (out.float() == value).all()


def test_what_is_no_number_stays_none():
    out = torch.empty(100, dtype=torch.bfloat16)
    round_stochastically(torch.full((100,), float("nan")), out, Noise(100, (0,)))
    assert out.isnan().all()


def test_moments_in_bfloat16_follow_those_in_float32(monkeypatch):
    monkeypatch.setattr(adamw, "PIECE", 2**10)
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
