"""What is run one at a time, and the results that they are written to."""

from typing import Any, Self

import msgspec

Results = dict[str, Any]  # cells and steps by name, and the environments that they say by number


WEIGHT_DECAY = 0.1
# What is tried, as cells name it, and the plural by which a study lists its values; in the order of the sweep.
KNOBS = {
    "rate": "rates",
    "weight_decay": "weight_decays",
    "dropout": "dropouts",
    "token_dropout": "token_dropouts",
}


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One contestant of one study at one setting of each knob and with one seed; ``share`` of the study's steps, 1 but
    where time is to be equal."""

    study: str
    contestant: str
    rate: float
    dropout: float = 0.0
    weight_decay: float = WEIGHT_DECAY
    token_dropout: float = 0.0
    seed: int
    share: float = 1.0

    @property
    def name(self) -> str:
        share = "" if self.share == 1 else f"/{self.share:.3f}"
        decay = "" if self.weight_decay == WEIGHT_DECAY else f"/w{self.weight_decay:g}"
        tokens = f"/t{self.token_dropout:g}" if self.token_dropout else ""
        return f"{self.study}/{self.contestant}/{self.rate:g}/d{self.dropout:g}{decay}{tokens}/{self.seed}{share}"

    @classmethod
    def named(cls, name: str) -> Self:
        """The cell of a name; the first study's have no dropout, and none says the usual weight decay or that no tokens
        are lost."""
        study, contestant, rate, *rest = name.split("/")

        def said(letter: str, otherwise: float) -> float:
            return float(rest.pop(0)[1:]) if rest[0].startswith(letter) else otherwise

        dropout, weight_decay, token_dropout = said("d", 0.0), said("w", WEIGHT_DECAY), said("t", 0.0)
        seed, *share = rest
        return cls(
            study=study,
            contestant=contestant,
            rate=float(rate),
            dropout=dropout,
            weight_decay=weight_decay,
            token_dropout=token_dropout,
            seed=int(seed),
            share=float(share[0]) if share else 1.0,
        )


def choice(cell: Cell, found: dict[str, Any]) -> tuple[float, float]:
    """What the best cell has the least of: loss where it is chosen; among equals, as of tasks that are learned whole at
    several rates, the rate."""
    return float(found["choosing"]), cell.rate


def nothing() -> Results:
    """Results before anything has run."""
    return {"cells": {}, "steps": {}, "environments": []}


def keep(results: Results, kind: str, name: str, found: dict[str, Any], environment: dict[str, Any]) -> None:
    """Adds what was found to the ``kind`` of results, with the number of its machine."""
    known = results.setdefault("environments", [])
    if environment not in known:
        known.append(environment)
    results[kind][name] = {**found, "environment": known.index(environment)}


def merge(into: Results, other: Results) -> list[str]:
    """Adds what ``other`` has; returns the names of what both had measured otherwise, where ``into`` stays as it is.

    A failure gives way to a measurement. Which of two measurements stays depends on the order alone, not on them.
    """
    differing = []
    for kind in ("cells", "steps"):
        for name, found in other[kind].items():
            environment = other["environments"][found["environment"]]
            mine = into[kind].get(name)
            if mine is None or ("failure" in mine and "failure" not in found):
                keep(into, kind, name, found, environment)
            elif "failure" not in found and not _is_same(mine, found):
                differing.append(name)
    return differing


def _is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return {**one, "environment": None} == {**other, "environment": None}
