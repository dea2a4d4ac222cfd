"""Tests and intervals against tables and against chance itself."""

import numpy as np
import pytest

from resnet_bk.chance import holm, t_probability
from resnet_bk.report.inference import (
    mean_difference,
    median_ratio,
    normal_p,
    permutation_p,
    slope_difference,
    standard_error,
)


@pytest.mark.parametrize(
    ("degrees", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042)]
)
def test_students_t_covers_what_tables_say(degrees, t):
    assert 1 - t_probability(t, degrees) == pytest.approx(0.95, abs=1e-4)


def test_a_paired_difference_has_students_interval():
    figure, p = mean_difference([4.0, 4.2, 4.1], [4.5, 4.6, 4.7], paired=True)
    differences = np.array([0.5, 0.4, 0.6])
    reach = 4.302653 * differences.std(ddof=1) / np.sqrt(3)
    assert (figure.value, figure.low, figure.high) == pytest.approx((0.5, 0.5 - reach, 0.5 + reach))
    assert p == pytest.approx(0.0131, abs=1e-3)


def test_an_unpaired_difference_pools_the_variance():
    figure, p = mean_difference([1.0, 2.0, 3.0], [2.0, 3.0, 4.0, 5.0], paired=False)
    pooled = (2.0 + 5.0) / 5
    reach = 2.570582 * np.sqrt(pooled * (1 / 3 + 1 / 4))
    assert (figure.value, figure.high - figure.value) == pytest.approx((1.5, reach))
    assert p == pytest.approx(0.1577, abs=1e-3)


def test_runs_that_are_equal_bit_for_bit_do_not_differ():
    figure, p = mean_difference([4.0, 4.1], [4.0, 4.1], paired=True)
    assert (figure.low, figure.high, p) == (0.0, 0.0, 1.0)
    assert permutation_p([1.0, 1.1, 1.2], [1.2, 1.0, 1.1]) == 1.0


def test_holm_counts_all_comparisons():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_the_permutation_test_is_wrong_no_more_often_than_it_says():
    chance = np.random.default_rng(3)
    ps = [permutation_p(*np.exp(0.1 * chance.standard_normal((2, 12)))) for _ in range(60)]
    assert np.mean(np.array(ps) < 0.05) <= 0.15
    assert 0.3 < np.mean(ps) < 0.7


def test_the_permutation_test_sees_a_real_difference():
    chance = np.random.default_rng(3)
    first, second = np.exp(0.03 * chance.standard_normal((2, 30)))
    assert permutation_p(first, 1.05 * second) < 0.001
    assert median_ratio(first, 1.05 * second).low > 1


def test_an_interval_and_its_error_belong_together():
    assert standard_error(-1.959964, 1.959964) == pytest.approx(1)
    assert normal_p(1.959964, 1.0) == pytest.approx(0.05, abs=1e-6)
    assert normal_p(0.0, 0.0) == 1.0 and normal_p(0.1, 0.0) == 0.0


def test_another_slope_has_the_error_of_what_the_line_leaves_over():
    values = [128, 256, 512, 1024]
    chance = np.random.default_rng(5)
    noise = 0.02 * chance.standard_normal(4)
    figure, p = slope_difference(values, np.ones(4), np.array(values) ** 0.3 * np.exp(noise))
    x = np.log(values)
    fit, covariance = np.polyfit(x, 0.3 * x + noise, 1, cov=True)
    assert figure.value == pytest.approx(fit[0])
    assert figure.high - figure.value == pytest.approx(4.302653 * np.sqrt(covariance[0, 0]))
    assert p < 0.01
    assert slope_difference(values, values, values)[1] == 1.0
