"""What the cells of a study come to: each contestant at its best rate and dropout, over its seeds."""

import dataclasses
import math
import statistics
from dataclasses import dataclass
from typing import Any, Self

from msgspec.structs import replace

from quality_study.cells import KNOBS, Cell, Results, choice
from quality_study.studies import Study
from resnet_bk.chance import t_quantile

CONFIDENCE = 0.95
SEVERAL = 3  # seeds


@dataclass(frozen=True, kw_only=True)
class Row:
    """A contestant as it was best: ``best`` is its first seed's cell, ``cells`` what its seeds came to, in their order.
    ``tried`` are the values of each knob that were."""

    best: Cell
    tried: dict[str, tuple[float, ...]]
    cells: tuple[dict[str, Any], ...]

    @property
    def contestant(self) -> str:
        return self.best.contestant

    @property
    def share(self) -> float:
        """The part of the study's steps."""
        return self.best.share

    @property
    def losses(self) -> list[float]:
        return [cell["test"] for cell in self.cells]

    @property
    def parameters(self) -> int:
        return int(self.cells[0]["parameters"])

    def only(self, what: str) -> Self:
        """With those seeds alone that measured it."""
        return dataclasses.replace(self, cells=tuple(cell for cell in self.cells if what in cell))

    def is_at_edge(self, knob: str) -> bool:
        """Whether a value of the knob beyond those that were tried might have done better. There is none below 0."""
        value, tried = getattr(self.best, knob), self.tried[knob]
        return value > 0 and len(tried) > 1 and value in (min(tried), max(tried))


def rows(results: Results, study: Study) -> list[Row]:
    """All contestants that have something, in the study's order; behind them those with equal time."""
    found: dict[tuple[str, float], dict[Cell, dict[str, Any]]] = {}
    for name, result in results["cells"].items():
        cell = Cell.named(name)
        if cell.study == study.name and "choosing" in result:
            found.setdefault((cell.contestant, cell.share), {})[cell] = result
    order = [(name, share) for share in sorted({share for _, share in found}) for name in study.contestants]
    return [_row(study, found[key]) for key in order if key in found]


def _row(study: Study, cells: dict[Cell, dict[str, Any]]) -> Row:
    swept = [cell for cell in cells if cell.seed == study.seeds[0]] or list(cells)
    first = min(swept, key=lambda cell: choice(cell, cells[cell]))
    # One seed is little to choose by: what has been trained with several takes the place of what is worse on average.
    several = [cell for cell in swept if len(_seeds_of(study, cells, cell)) >= SEVERAL]
    best = min([first, *several], key=lambda cell: _choosing(study, cells, cell))
    mine = _seeds_of(study, cells, best)
    return Row(
        best=best,
        tried={knob: tuple(sorted({getattr(cell, knob) for cell in swept})) for knob in KNOBS},
        cells=tuple(cells[cell] for cell in mine),
    )


def _seeds_of(study: Study, cells: dict[Cell, dict[str, Any]], cell: Cell) -> list[Cell]:
    """All that were trained at its setting."""
    return [other for seed in study.seeds if (other := replace(cell, seed=seed)) in cells]


def _choosing(study: Study, cells: dict[Cell, dict[str, Any]], cell: Cell) -> tuple[float, float]:
    """:func:`choice`, with the mean over a setting's seeds."""
    return statistics.mean(choice(one, cells[one])[0] for one in _seeds_of(study, cells, cell)), cell.rate


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
    """Ours minus theirs by Welch's test; None where one has a single seed, or nothing differs between those of both."""
    if min(len(ours), len(theirs)) < 2:
        return None
    squares = standard_error(ours) ** 2, standard_error(theirs) ** 2
    error = math.sqrt(sum(squares))
    if not error:
        return None
    parts = [square**2 / (len(side) - 1) for square, side in zip(squares, (ours, theirs), strict=True)]
    degrees = max(1, math.floor(sum(squares) ** 2 / sum(parts)))
    value = statistics.mean(ours) - statistics.mean(theirs)
    reach = t_quantile(CONFIDENCE, degrees) * error
    return Difference(value=value, low=value - reach, high=value + reach, errors=value / error)
