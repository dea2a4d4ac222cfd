"""Whether two runs differ, from what each of them wrote. Every generator is a fixed one."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from resnet_bk.chance import slope, t_probability, t_quantile
from resnet_bk.schema import Interval

Samples = NDArray[np.float64]
RELABELLINGS, RESAMPLES, AT_ONCE = 10_000, 2000, 1000
NORMAL_QUANTILE = 1.959964


def permutation_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Probability that medians differ as much if it were chance which sample is of which run.

    The share of 10,000 random relabellings with a difference of the medians of the logarithms at least as large, the
    labels as they are counted among them. Source: R. A. Fisher, "The Design of Experiments" (1935).
    """
    logs = np.log(np.concatenate([first, second]))
    size = len(first)
    # Equal up to rounding is equal: the same samples in another order give the same difference but for that.
    least = abs(np.median(logs[:size]) - np.median(logs[size:])) - 1e-12
    order = np.argsort(logs)
    is_first = _relabellings(size, logs.size)[:, order]
    differences = _medians(logs[order], is_first) - _medians(logs[order], ~is_first)
    return (1 + int((np.abs(differences) >= least).sum())) / (RELABELLINGS + 1)


@lru_cache(maxsize=4)
def _relabellings(size: int, total: int) -> NDArray[np.bool_]:
    """Of each, which of all samples are the first run's; so many samples have the same ones."""
    generator = np.random.default_rng(0)
    places = np.tile(np.arange(total), (AT_ONCE, 1))
    drawn = [generator.permuted(places, axis=1)[:, :size] for _ in range(RELABELLINGS // AT_ONCE)]
    is_first = np.zeros((RELABELLINGS, total), dtype=np.bool_)
    np.put_along_axis(is_first, np.concatenate(drawn), values=True, axis=1)
    return is_first


def _medians(ordered: Samples, chosen: NDArray[np.bool_]) -> Samples:
    """Of the samples that each row has chosen, as many as any other, from those in order."""
    count = np.cumsum(chosen, axis=1, dtype=np.int32)
    size = int(count[0, -1])
    below, above = ((count > place).argmax(axis=1) for place in ((size - 1) // 2, size // 2))
    medians: Samples = (ordered[below] + ordered[above]) / 2
    return medians


def median_ratio(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The second's median over the first's, with a percentile bootstrap of both."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    generator = np.random.default_rng(0)
    medians = [
        np.median(values[generator.integers(values.size, size=(RESAMPLES, values.size))], axis=1) for values in (a, b)
    ]
    low, high = np.percentile(medians[1] / medians[0], [2.5, 97.5])
    return Interval(value=float(np.median(b) / np.median(a)), low=float(low), high=float(high))


def normal_p(difference: float, standard_error: float) -> float:
    """Two-sided; of figures whose error is known."""
    if standard_error == 0:
        return 1.0 if difference == 0 else 0.0
    return math.erfc(abs(difference) / standard_error / math.sqrt(2))


def standard_error(low: float, high: float) -> float:
    """Of a figure with that 95% interval."""
    return (high - low) / (2 * NORMAL_QUANTILE)


def mean_difference(first: Sequence[float], second: Sequence[float], *, paired: bool) -> tuple[Interval, float]:
    """The second's mean less the first's with Student's interval, and its p; each needs two or more.

    Source: Student, "The Probable Error of a Mean" (1908).
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    difference = float(b.mean() - a.mean())
    if paired:
        degrees = a.size - 1
        error = float((b - a).std(ddof=1)) / math.sqrt(a.size)
    else:
        degrees = a.size + b.size - 2
        pooled = float(((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()) / degrees
        error = math.sqrt(pooled * (1 / a.size + 1 / b.size))
    return _students(difference, error, degrees)


def slope_difference(
    values: Sequence[float], first: Sequence[float], second: Sequence[float]
) -> tuple[Interval, float]:
    """By how much the second's exponent over three or more ``values`` is larger, with Student's interval, and its p.

    The slope of log(second / first) over log(value). Its error is of what is left over, so that it knows how much a
    point differs from one run to another, which samples of one run do not tell.
    """
    logs = [math.log(b / a) for a, b in zip(first, second, strict=True)]
    return _students(*slope([math.log(value) for value in values], logs), len(values) - 2)


def _students(value: float, error: float, degrees: int) -> tuple[Interval, float]:
    """A figure with its interval, and the p of its being 0."""
    reach = t_quantile(0.95, degrees) * error
    figure = Interval(value=value, low=value - reach, high=value + reach)
    if error == 0:
        return figure, 1.0 if value == 0 else 0.0
    return figure, t_probability(value / error, degrees)
