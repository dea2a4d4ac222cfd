"""Comparing what several seeds gave: differences within a seed, and Student's t over seeds."""

import math
from collections.abc import Mapping

from resnet_bk.chance import holm, t_probability, t_quantile
from resnet_bk.schema import Comparison

CONFIDENCE, LEVEL = 0.95, 0.05

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
