"""From samples to figures with intervals, and what may be claimed of them. Every generator is a fixed one.

Two models are compared by rounds, in each of which both are measured, so that a slow moment hits both; rounds come in
blocks, each with models built anew, since one and the same model is some percent faster or slower wherever in memory
it happens to lie.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from resnet_bk.chance import holm, slope, t_quantile
from resnet_bk.schema import Comparison, Interval, Summary

Samples = NDArray[np.float64]
Key = TypeVar("Key")
SIGNIFICANCE, CONFIDENCE = 0.05, 0.95


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Samples of both that were taken in the same rounds, and the block of each round."""

    ours: Sequence[float]
    baseline: Sequence[float]
    blocks: Sequence[int]


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


def compare(pairs: Mapping[Key, Pairs], *, margin: float, resamples: int) -> dict[Key, Comparison]:
    """How many times the baseline's figure is ours, for every one of a family of comparisons.

    A difference is claimed if chance alone would seldom show one as consistent, all comparisons of the family counted
    together (Holm), and if the whole interval lies further from equality than ``margin``, a share.
    """
    adjusted = dict(zip(pairs, holm([sign_flip_p(found) for found in pairs.values()]), strict=True))
    found = {}
    for key, pair in pairs.items():
        ratio = paired_ratio(pair, resamples=resamples)
        apart = ratio.low > 1 + margin or ratio.high < 1 / (1 + margin)
        found[key] = Comparison(
            value=ratio.value,
            low=ratio.low,
            high=ratio.high,
            p=sign_flip_p(pair),
            claimed=apart and adjusted[key] <= SIGNIFICANCE,
        )
    return found


def paired_ratio(pairs: Pairs, *, resamples: int) -> Interval:
    """The baseline's figure over ours: the median of a block's rounds, and of blocks the geometric mean.

    The interval is Student's of the blocks' logarithms, which differ by the noise of rounds and by that of building
    anew; to draw so few blocks with replacement would make it too short. Of a single block it is a bootstrap of its
    rounds.
    """
    logs = np.log(_ratios(pairs))
    medians = [float(np.median(logs[block])) for block in _blocks(pairs)]
    value = statistics.fmean(medians)
    if len(medians) == 1:
        low, high = _bounds(bootstrap_medians(logs, resamples))
    else:
        error = statistics.stdev(medians) / math.sqrt(len(medians))
        reach = t_quantile(CONFIDENCE, len(medians) - 1) * error
        low, high = value - reach, value + reach
    return Interval(value=math.exp(value), low=math.exp(low), high=math.exp(high))


def sign_flip_p(pairs: Pairs) -> float:
    """Probability that ratios lean to one side as much as these, or more, if each were as likely to be its inverse.

    The statistic is the sum of the ranks of the log-ratios' sizes, within their block, with the ratios' signs; the
    distribution over all flips of signs is exact. Ranks, because one round that something else disturbed must not
    decide. Source: F. Wilcoxon, "Individual Comparisons by Ranking Methods" (1945).
    """
    logs = np.log(_ratios(pairs))
    doubled = np.zeros(logs.size, dtype=np.int64)  # ranks of ties are halves
    for block in _blocks(pairs):
        sizes = np.abs(logs[block])
        below = (sizes[:, None] > sizes[None, :]).sum(1)
        equal = (sizes[:, None] == sizes[None, :]).sum(1)
        doubled[block] = np.where(sizes > 0, 2 * below + equal + 1, 0)
    observed = abs(int((doubled * np.sign(logs)).sum()))
    ways = np.ones(1)  # share of the flips by twice the sum of the positive ranks
    for rank in doubled:
        ways = np.concatenate([ways, np.zeros(rank)]) / 2 + np.concatenate([np.zeros(rank), ways]) / 2
    sums = 2 * np.arange(ways.size) - int(doubled.sum())
    return min(1.0, float(ways[np.abs(sums) >= observed].sum()))


def power_law(values: Sequence[int], figures: Sequence[float]) -> Interval:
    """Slope of log(figure) over log(value) by least squares, of three or more, with Student's interval.

    That is of what the line leaves over: of how much a figure differs from one process to another, which the samples of
    one do not tell, and of what is no power law.
    """
    found, error = slope([math.log(value) for value in values], [math.log(figure) for figure in figures])
    reach = t_quantile(CONFIDENCE, len(values) - 2) * error
    return Interval(value=found, low=found - reach, high=found + reach)


def bootstrap_medians(values: Samples, resamples: int) -> Samples:
    """Medians of ``resamples`` draws with replacement."""
    generator = np.random.default_rng(0)
    drawn = values[generator.integers(values.size, size=(resamples, values.size))]
    medians: Samples = np.median(drawn, axis=1)
    return medians


def _ratios(pairs: Pairs) -> Samples:
    return np.asarray(pairs.baseline, dtype=np.float64) / np.asarray(pairs.ours, dtype=np.float64)


def _blocks(pairs: Pairs) -> list[NDArray[np.intp]]:
    blocks = np.asarray(pairs.blocks)
    return [np.flatnonzero(blocks == block) for block in np.unique(blocks)]


def _bounds(draws: Samples) -> tuple[float, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
