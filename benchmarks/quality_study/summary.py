"""What the cells of a study come to: each contestant at its best rate, over its seeds."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from quality_study.studies import Study
from resnet_bk.chance import t_quantile

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Row:
    """A contestant at the rate that chose it; ``cells`` are its seeds', in their order. ``swept`` are the rates that
    were tried; ``share`` the part of the study's steps."""

    contestant: str
    rate: float
    share: float
    swept: tuple[float, ...]
    cells: tuple[dict[str, Any], ...]

    @property
    def losses(self) -> list[float]:
        return [cell["test"] for cell in self.cells]

    @property
    def parameters(self) -> int:
        return int(self.cells[0]["parameters"])

    @property
    def is_at_an_edge(self) -> bool:
        """Whether a rate beyond those that were tried might have done better."""
        return len(self.swept) > 1 and self.rate in (min(self.swept), max(self.swept))


def rows(results: dict[str, Any], study: Study) -> list[Row]:
    """All contestants that have something, in the study's order; behind them those with equal time."""
    found: dict[tuple[str, float], dict[tuple[float, int], dict[str, Any]]] = {}
    for name, cell in results["cells"].items():
        study_name, contestant, rate, seed, *share = name.split("/")
        if study_name == study.name and "choosing" in cell:
            key = contestant, float(share[0]) if share else 1.0
            found.setdefault(key, {})[float(rate), int(seed)] = cell
    order = [(name, share) for share in sorted({share for _, share in found}) for name in study.contestants]
    return [_row(study, *key, found[key]) for key in order if key in found]


def _row(study: Study, contestant: str, share: float, cells: dict[tuple[float, int], dict[str, Any]]) -> Row:
    first = {rate: cell for (rate, seed), cell in cells.items() if seed == study.seeds[0]}
    best = min(first, key=lambda rate: float(first[rate]["choosing"]))
    mine = [cells[best, seed] for seed in study.seeds if (best, seed) in cells]
    return Row(contestant=contestant, rate=best, share=share, swept=tuple(sorted(first)), cells=tuple(mine))


def standard_error(values: list[float]) -> float:
    """Of the mean; infinite of one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of two means: ``value`` with its interval, and in standard errors."""

    value: float
    low: float
    high: float
    errors: float


def difference(ours: list[float], theirs: list[float]) -> Difference | None:
    """Ours minus theirs by Welch's test; None where one has a single seed."""
    if min(len(ours), len(theirs)) < 2:
        return None
    squares = standard_error(ours) ** 2, standard_error(theirs) ** 2
    error = math.sqrt(sum(squares))
    parts = [square**2 / (len(side) - 1) for square, side in zip(squares, (ours, theirs), strict=True)]
    degrees = max(1, math.floor(sum(squares) ** 2 / sum(parts)))
    value = statistics.mean(ours) - statistics.mean(theirs)
    reach = t_quantile(CONFIDENCE, degrees) * error
    return Difference(value=value, low=value - reach, high=value + reach, errors=value / error)
