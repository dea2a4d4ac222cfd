"""What chance alone would show: Student's t, slopes and their errors, and many comparisons counted together. For bench
and report alike."""

import math
import statistics
from collections.abc import Sequence

FRACTION_TERMS, FRACTION_ERROR, SMALLEST = 1000, 1e-15, 1e-300
BISECTIONS = 200


def holm(ps: Sequence[float]) -> list[float]:
    """Each p as it counts beside the others. Source: S. Holm, "A Simple Sequentially Rejective Multiple Test Procedure"
    (1979)."""
    adjusted = [1.0] * len(ps)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[index]))
        adjusted[index] = largest
    return adjusted


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Of the least-squares line through three or more points, with its standard error, which is of what the line leaves
    over."""
    fit = statistics.linear_regression(x, y)
    left = sum((b - fit.intercept - fit.slope * a) ** 2 for a, b in zip(x, y, strict=True))
    middle = statistics.fmean(x)
    return fit.slope, math.sqrt(left / (len(x) - 2) / sum((a - middle) ** 2 for a in x))


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
