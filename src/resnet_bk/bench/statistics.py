"""From samples to figures with intervals. Percentile bootstrap of the median, from a fixed generator."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from resnet_bk.schema import Interval, Summary

Samples = NDArray[np.float64]


def summarize(samples: Sequence[float], *, resamples: int) -> Summary:
    """All that a table needs of at least one sample."""
    values = np.asarray(samples, dtype=np.float64)
    low, high = _bounds(bootstrap_medians(values, resamples))
    first, median, third = np.percentile(values, [25, 50, 75])
    return Summary(
        samples=values.tolist(),
        mean=float(values.mean()),
        std=float(values.std(ddof=1)) if values.size > 1 else 0.0,
        minimum=float(values.min()),
        maximum=float(values.max()),
        median=float(median),
        first_quartile=float(first),
        third_quartile=float(third),
        low=low,
        high=high,
    )


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float], *, resamples: int) -> Interval:
    """Median of the ratios of samples that were taken in turns, so that a slow moment of the machine hits both."""
    ratios = np.asarray(numerator, dtype=np.float64) / np.asarray(denominator, dtype=np.float64)
    low, high = _bounds(bootstrap_medians(ratios, resamples))
    return Interval(value=float(np.median(ratios)), low=low, high=high)


def power_law(lengths: Sequence[int], samples: Sequence[Sequence[float]], *, resamples: int) -> Interval:
    """Slope of log(median) over log(length), by least squares; the interval is the noise of the samples."""
    logs = np.log(np.asarray(lengths, dtype=np.float64))
    medians = np.stack([bootstrap_medians(np.asarray(row, dtype=np.float64), resamples) for row in samples])
    value = _slope(logs, np.log([[np.median(row)] for row in samples]))[0]
    low, high = _bounds(_slope(logs, np.log(medians)))
    return Interval(value=float(value), low=low, high=high)


def bootstrap_medians(values: Samples, resamples: int) -> Samples:
    """Medians of ``resamples`` draws with replacement."""
    generator = np.random.default_rng(0)
    drawn = values[generator.integers(values.size, size=(resamples, values.size))]
    medians: Samples = np.median(drawn, axis=1)
    return medians


def _slope(logs: Samples, log_figures: Samples) -> Samples:
    centred = logs - logs.mean()
    slopes: Samples = (centred @ log_figures) / (centred @ centred)
    return slopes


def _bounds(draws: Samples) -> tuple[float, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
