"""Figures and intervals from samples, and what may be claimed of them."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_bk.bench.statistics import Pairs, compare, paired_ratio, power_law, sign_flip_p, summarize
from resnet_bk.chance import holm, slope

positive = st.floats(1e-6, 1e6)


@given(st.lists(positive, min_size=1, max_size=30))
@settings(deadline=None, max_examples=50)
def test_a_summary_orders_its_figures_and_keeps_every_sample(samples):
    summary = summarize(samples, resamples=100)
    assert summary.samples == samples
    assert summary.minimum <= summary.first_quartile <= summary.median <= summary.third_quartile <= summary.maximum
    assert summary.minimum <= summary.low <= summary.high <= summary.maximum
    assert summary.mean == pytest.approx(np.mean(samples))


def test_the_interval_of_the_median_covers_it_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        summary = summarize(generator.normal(5.0, 1.0, size=25), resamples=300)
        covered += summary.low <= 5.0 <= summary.high
    assert 0.88 <= covered / 200 <= 1.0


@given(st.floats(0.1, 10), st.lists(positive, min_size=2, max_size=20))
@settings(deadline=None, max_examples=50)
def test_a_slow_moment_that_hits_both_leaves_the_ratio_alone(factor, moments):
    blocks = [number % 2 for number in range(len(moments))]
    pairs = Pairs(ours=moments, baseline=[factor * moment for moment in moments], blocks=blocks)
    ratio = paired_ratio(pairs, resamples=100)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((factor, factor, factor))


@pytest.mark.parametrize("layout", [0.0, 0.004, 0.03])
@pytest.mark.parametrize("noise", [0.01, 0.05])
@pytest.mark.parametrize(("number", "builds"), [(24, 5), (32, 5), (60, 10)], ids=str)
def test_the_interval_of_a_ratio_covers_it_as_often_as_it_says(number, builds, noise, layout):
    """However much of the noise is of how models happen to be built."""
    generator = np.random.default_rng(3)
    blocks = rounds(number, builds)
    found = [
        paired_ratio(times(generator, blocks, noise=noise, layout=layout, slower=1.2), resamples=1) for _ in range(300)
    ]
    assert 0.91 <= np.mean([one.low <= 1.2 <= one.high for one in found]) <= 0.99


def test_rounds_of_a_single_build_have_a_bootstrap():
    generator = np.random.default_rng(4)
    pairs = [
        Pairs(ours=np.ones(25), baseline=1.1 * np.exp(generator.normal(0, 0.05, size=25)), blocks=[0] * 25)
        for _ in range(200)
    ]
    found = [paired_ratio(one, resamples=300) for one in pairs]
    assert 0.88 <= np.mean([one.low <= 1.1 <= one.high for one in found]) <= 1.0
    assert found[0].value == pytest.approx(np.median(pairs[0].baseline))


@given(st.floats(-1, 3), positive)
@settings(deadline=None, max_examples=50)
def test_a_power_law_is_found_again(exponent, scale):
    lengths = [128, 256, 512, 1024]
    samples = [scale * length**exponent for length in lengths]
    found = power_law(lengths, samples)
    assert found.value == pytest.approx(exponent, abs=1e-6)
    assert found.low == pytest.approx(exponent, abs=1e-6)
    assert found.high == pytest.approx(exponent, abs=1e-6)


def test_the_interval_of_an_exponent_knows_of_noise_between_processes():
    generator = np.random.default_rng(0)
    lengths = [128, 256, 512, 1024]
    found = [power_law(lengths, length * generator.lognormal(0, 0.1, size=4)) for length in [np.array(lengths)] * 300]
    assert all(one.low < one.value < one.high for one in found)
    assert 0.91 <= np.mean([one.low <= 1 <= one.high for one in found]) <= 0.99


def test_the_line_through_three_points_by_hand():
    # y = x + (0, 1, 0) - 1/3: slope 1; what is left is (-1/3, 2/3, -1/3).
    assert slope([0, 1, 2], [0, 2, 2]) == pytest.approx((1, (6 / 9 / 1 / 2) ** 0.5))


def rounds(number, builds):
    return np.sort(np.arange(number) % builds)


def times(generator, blocks, *, noise, slower=1.0, layout=0.004):
    """Seconds of two models on a machine that drifts, with heavy tails, interruptions, and builds that differ."""
    drift = np.exp(np.cumsum(generator.normal(0, 0.03, blocks.size))) * (1 + 0.3 * np.sin(np.arange(blocks.size) / 4))

    def samples(factor):
        placed = np.exp(generator.normal(0, layout, blocks.max() + 1))[blocks]
        interrupted = np.where(generator.random(blocks.size) < 0.03, 1 + generator.random(blocks.size), 1.0)
        return factor * drift * placed * interrupted * np.exp(noise * generator.standard_t(3, blocks.size))

    return Pairs(ours=samples(1.0), baseline=samples(slower), blocks=blocks)


def section(generator, blocks, *, noise, slower=1.0):
    """Seven phases, of which the first may be slower in one model."""
    pairs = {place: times(generator, blocks, noise=noise, slower=slower if place == 0 else 1.0) for place in range(7)}
    return compare(pairs, margin=0.02, resamples=200)


@pytest.mark.parametrize(("number", "builds", "noise"), [(15, 3, 0.003), (15, 3, 0.02), (50, 5, 0.01)], ids=str)
def test_a_model_against_itself_seldom_differs(number, builds, noise):
    generator = np.random.default_rng(5)
    blocks = rounds(number, builds)
    repetitions = [section(generator, blocks, noise=noise) for _ in range(20)]
    assert sum(any(found.claimed for found in phases.values()) for phases in repetitions) <= 1


@pytest.mark.parametrize(("number", "builds", "noise"), [(32, 5, 0.003), (50, 5, 0.01)], ids=str)
@pytest.mark.parametrize("slower", [1.05, 1 / 1.05])
def test_five_percent_are_found(number, builds, noise, slower):
    generator = np.random.default_rng(6)
    blocks = rounds(number, builds)
    repetitions = [section(generator, blocks, noise=noise, slower=slower) for _ in range(20)]
    assert sum(phases[0].claimed and (phases[0].value > 1) is (slower > 1) for phases in repetitions) >= 19


def test_fifteen_rounds_can_carry_a_claim_among_seven_comparisons():
    blocks = rounds(15, 3)
    clear = Pairs(ours=np.linspace(1, 1.1, 15), baseline=np.linspace(1.2, 1.3, 15), blocks=blocks)
    same = Pairs(ours=[1.0] * 15, baseline=[1.0] * 15, blocks=blocks)
    found = compare({place: clear if place == 0 else same for place in range(7)}, margin=0.02, resamples=100)
    assert [place for place, comparison in found.items() if comparison.claimed] == [0]
    assert found[0].p == pytest.approx(2 / 2**15)
    assert found[1].p == 1


def test_a_difference_within_the_margin_is_not_claimed_however_sure():
    ours = np.linspace(1, 2, 60)
    pairs = Pairs(ours=ours, baseline=1.015 * ours, blocks=rounds(60, 3))
    assert not compare({"step": pairs}, margin=0.02, resamples=100)["step"].claimed
    assert compare({"step": pairs}, margin=0.01, resamples=100)["step"].claimed


def test_builds_that_disagree_carry_no_claim():
    ratios = np.array([1.3, 1.3, 1.005])[rounds(30, 3)]
    pairs = Pairs(ours=np.ones(30), baseline=ratios * np.linspace(0.999, 1.001, 30), blocks=rounds(30, 3))
    assert sign_flip_p(pairs) < 0.05 / 7
    assert not compare({"step": pairs}, margin=0.02, resamples=300)["step"].claimed


@given(st.lists(st.sampled_from([0.5, 0.8, 1.0, 1.1, 1.25, 3.0]), min_size=1, max_size=9), st.integers(1, 3))
@settings(deadline=None, max_examples=50)
def test_the_probability_is_that_of_all_flips(ratios, builds):
    blocks = np.arange(len(ratios)) % builds
    logs = np.log(ratios)
    ranks = np.zeros(len(ratios))
    for block in set(blocks):
        sizes = np.abs(logs[blocks == block])
        ranks[blocks == block] = [(sizes < size).sum() + ((sizes == size).sum() + 1) / 2 for size in sizes]
    ranks[logs == 0] = 0
    sums = [abs(float(ranks @ signs)) for signs in itertools.product((-1, 1), repeat=len(ratios))]
    expected = np.mean(np.array(sums) >= abs(float(ranks @ np.sign(logs))) - 1e-9)
    pairs = Pairs(ours=np.ones(len(ratios)), baseline=np.array(ratios), blocks=blocks)
    assert sign_flip_p(pairs) == pytest.approx(expected)


def test_where_nothing_differs_small_probabilities_are_as_rare_as_they_say():
    generator = np.random.default_rng(2)
    blocks = rounds(15, 3)
    ps = np.array([sign_flip_p(times(generator, blocks, noise=0.05)) for _ in range(400)])
    for level in (0.05, 0.2):
        assert np.mean(ps <= level) <= level + 0.03


def test_one_wild_round_decides_nothing():
    ours = np.linspace(1, 1.02, 15)
    baseline = ours * 1.1
    calm = compare({0: Pairs(ours=ours, baseline=baseline, blocks=rounds(15, 3))}, margin=0.02, resamples=200)[0]
    baseline[7] /= 1000
    wild = compare({0: Pairs(ours=ours, baseline=baseline, blocks=rounds(15, 3))}, margin=0.02, resamples=200)[0]
    assert calm.claimed
    assert wild.claimed
    assert wild.value == pytest.approx(calm.value)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(deadline=None, max_examples=50)
def test_holm_keeps_the_order_and_lies_between_no_correction_and_bonferroni(ps):
    adjusted = holm(ps)
    for p, other in itertools.product(range(len(ps)), repeat=2):
        assert adjusted[p] <= adjusted[other] or ps[p] > ps[other] or ps[p] == ps[other]
    for p, corrected in zip(ps, adjusted, strict=True):
        assert p <= corrected <= min(1.0, len(ps) * p) + 1e-12
