"""What figures are made of: bounds that keep damaged files out, samples with intervals, checks, failures."""

from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import msgspec

# What a damaged or foreign report.json is refused for: figures are shares, logarithms and quotients of these.
Count = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e30)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e30)]
Number = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
T = TypeVar("T")
Filled = Annotated[list[T], msgspec.Meta(min_length=1)]

FailureKind = Literal["out of memory", "timeout", "not a number", "crash", "error", "withheld"]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Raw samples and what they amount to; ``low`` and ``high`` bound the median with 95% confidence."""

    samples: Filled[Positive]
    mean: Positive
    std: Amount
    minimum: Positive
    maximum: Positive
    median: Positive
    first_quartile: Positive
    third_quartile: Positive
    low: Positive
    high: Positive


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure and its 95% interval."""

    value: Number
    low: Number
    high: Number


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A figure of the baseline over ours, or its difference to ours, with what may be claimed of it.

    ``p`` is the probability of so large a difference where there is none, ``claimed`` whether it is one all the same
    when all comparisons of its section are counted together, and larger than what a model differs from itself.
    """

    value: Number
    low: Number
    high: Number
    p: Share
    claimed: bool


@dataclass(frozen=True, kw_only=True)
class Check:
    """Something that must hold: ``measured`` may be at most ``limit``. A measured None is not a number.

    ``contestant`` is whose check it is, None if it is of operators that all use.
    """

    name: str
    measured: float | None
    limit: float
    passed: bool
    contestant: str | None = None


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why there is no figure."""

    kind: FailureKind
    message: str


@dataclass(frozen=True, kw_only=True)
class CellStatus:
    """How one cell's measurement went; each is a process of its own.

    ``waited`` is the share of its time in which its threads were ready and had no processor, because of others; None
    where the system does not tell.
    """

    seconds: Amount
    failure: Failure | None = None
    waited: Share | None = None
