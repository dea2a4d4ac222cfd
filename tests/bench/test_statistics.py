"""Figures and intervals from samples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_bk.bench.statistics import paired_ratio, power_law, summarize

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
    ratio = paired_ratio([factor * moment for moment in moments], moments, resamples=100)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((factor, factor, factor))


@given(st.floats(-1, 3), positive)
@settings(deadline=None, max_examples=50)
def test_a_power_law_is_found_again(exponent, scale):
    lengths = [128, 256, 512, 1024]
    samples = [[scale * length**exponent] * 3 for length in lengths]
    found = power_law(lengths, samples, resamples=50)
    assert found.value == pytest.approx(exponent, abs=1e-6)
    assert found.low == pytest.approx(exponent, abs=1e-6)
    assert found.high == pytest.approx(exponent, abs=1e-6)


def test_noise_widens_the_interval_of_an_exponent():
    generator = np.random.default_rng(0)
    lengths = [128, 256, 512, 1024]
    noisy = [list(length * generator.lognormal(0, 0.3, size=9)) for length in lengths]
    found = power_law(lengths, noisy, resamples=500)
    assert found.high - found.low > 0.05
    assert found.low < found.value < found.high
