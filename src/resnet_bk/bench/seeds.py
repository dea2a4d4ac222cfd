"""Comparing what several seeds gave: differences within a seed, and Student's t over seeds."""

import math
from collections.abc import Mapping

from resnet_bk.bench.statistics import holm
from resnet_bk.schema import Comparison

CONFIDENCE, LEVEL = 0.95, 0.05
FRACTION_TERMS, FRACTION_ERROR, SMALLEST = 1000, 1e-15, 1e-300
BISECTIONS = 200

Losses = Mapping[int, float | None]
"""By seed; None of a run that diverged."""


def compare(pairs: Mapping[str, tuple[Losses, Losses]]) -> dict[str, Comparison]:
    """The first losses less the second ones, paired by seed, for each name for which that means something.

    It means nothing with fewer than two seeds in common, nor where a run diverged: leaving that seed out would be in
    favour of what diverged. All that are returned count as one family for what is ``claimed``.
    """
    samples = {name: differences for name, pair in pairs.items() if len(differences := _paired(*pair)) > 1}
    found = {name: _t_test(differences) for name, differences in samples.items()}
    corrected = holm([p for *_, p in found.values()])
    return {
        name: Comparison(value=value, low=low, high=high, p=p, claimed=beside_others <= LEVEL)
        for (name, (value, low, high, p)), beside_others in zip(found.items(), corrected, strict=True)
    }


def t_probability(t: float, degrees: int) -> float:
    """How likely Student's t is at least as far from 0 as ``t``, on either side."""
    if math.isinf(t):
        return 0.0
    return incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


def t_quantile(confidence: float, degrees: int) -> float:
    """The t that Student's t stays within, on both sides, with this probability."""
    low, high = 0.0, 1.0
    while t_probability(high, degrees) > 1 - confidence:
        high *= 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) > 1 - confidence else (low, middle)
    return (low + high) / 2


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), for 0 <= x <= 1."""
    if x <= 0 or x >= 1:
        return min(max(x, 0.0), 1.0)
    # The continued fraction is quick on this side only; the other is its mirror image.
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(logarithm) / a * _continued_fraction(a, b, x)


def _continued_fraction(a: float, b: float, x: float) -> float:
    """Of the incomplete beta function (Abramowitz and Stegun 26.5.8), by Lentz's method."""
    c, d = 1.0, 1 / _not_zero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, FRACTION_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for coefficient in (even, odd):
            d, c = 1 / _not_zero(1 + coefficient * d), _not_zero(1 + coefficient / c)
            value *= c * d
        if abs(c * d - 1) < FRACTION_ERROR:
            return value
    raise ArithmeticError(f"the incomplete beta function did not converge at a = {a}, b = {b}, x = {x}")


def _not_zero(x: float) -> float:
    return x if abs(x) > SMALLEST else SMALLEST


def _paired(first: Losses, second: Losses) -> list[float]:
    common = [(loss, second[seed]) for seed, loss in first.items() if seed in second]
    differences = [a - b for a, b in common if a is not None and b is not None]
    return differences if len(differences) == len(common) else []


def _t_test(differences: list[float]) -> tuple[float, float, float, float]:
    """Mean, its interval, and the probability of one so far from 0."""
    count = len(differences)
    mean = math.fsum(differences) / count
    error = math.sqrt(math.fsum((x - mean) ** 2 for x in differences) / (count - 1) / count)
    if error == 0:
        return mean, mean, mean, 1.0 if mean == 0 else 0.0
    reach = t_quantile(CONFIDENCE, count - 1) * error
    return mean, mean - reach, mean + reach, t_probability(mean / error, count - 1)
