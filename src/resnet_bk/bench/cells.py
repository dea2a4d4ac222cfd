"""What a benchmark is made of: cells, each measured in a process of its own, and sections that are made of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from resnet_bk.bench.setup import Setup
from resnet_bk.schema import CellStatus


class NotANumberError(Exception):
    """A figure is not finite where it has to be."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement of a section. ``weight`` is about how many seconds it takes, beside other cells.

    One that is not ``timed`` gives the same figures beside others, and may be measured so.
    """

    section: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    timed: bool = True

    @property
    def path(self) -> str:
        """Its name among all cells."""
        return f"{self.section}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a cell ended, and what it measured: what the section's ``measure`` returned, None after a failure."""

    status: CellStatus
    result: Any


Outcomes = Mapping[str, Outcome]
"""By the cell's name within its section."""


class Section(Protocol):
    """A module of this folder."""

    NAME: str
    RESULT: Any
    """The type of what ``measure`` returns; it goes through JSON."""

    def cells(self, setup: Setup, outcomes: Outcomes) -> list[Cell]:
        """Every cell that is known to be needed by now, measured or not; asked again after each of them."""

    def measure(self, setup: Setup, cell: Cell) -> Any:
        """Runs in a process of its own."""

    def assemble(self, setup: Setup, outcomes: Outcomes) -> Any:
        """The section's result in the report; None where nothing was measured."""


def result_of(outcomes: Outcomes, name: str) -> Any:
    """What a cell measured; None if it failed or was not measured yet."""
    return outcomes[name].result if name in outcomes else None
