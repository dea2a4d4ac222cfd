"""The whole of report.json: what was compared, on what, how each cell went, the results; reading and checking it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from resnet_bk.errors import UserError
from resnet_bk.schema.figures import CellStatus, Check, Count, Filled, Size
from resnet_bk.schema.sections import (
    ConvergenceResult,
    FlopsResult,
    MemoryResult,
    ScalingResult,
    StabilityResult,
    TimingResult,
)

KIND, VERSION = "resnet-bk benchmark", 2
SECTIONS = ("flops", "timing", "memory", "convergence", "scaling", "stability")
AGAIN = "make it again with `resnet-bk bench`"


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One of the models that are compared. ``source`` is what it was built from; one that is not ours has no
    ``active_parameters``, and a ``config`` of its own kind."""

    key: str
    label: str
    source: str
    parameters: Count
    active_parameters: Count | None
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is computed on: text, tokens, batch. Fingerprints are null in reports from before they were written down."""

    preset: str
    data: str
    description: str
    tokenizer: str
    vocab_size: Count
    train_tokens: Count
    validation_tokens: Count
    test_tokens: Count
    split: str
    batch_size: Count
    sequence_length: Count
    precision: str
    device: str
    threads: Count
    seed: Size
    corpus_sha256: str | None = None
    tokenizer_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Results:
    """What each section measured; None until it has."""

    flops: FlopsResult | None = None
    timing: TimingResult | None = None
    memory: MemoryResult | None = None
    convergence: ConvergenceResult | None = None
    scaling: ScalingResult | None = None
    stability: StabilityResult | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """The whole document. The first contestant is ours, the second the baseline; the seed's mixer may be a third.

    ``cells`` are by name, ``section/what``; those of section ``gates`` run first.
    """

    kind: str
    version: int
    created: str
    command: list[str]
    profile: dict[str, Any]
    environment: dict[str, Any]
    workload: Workload
    contestants: Filled[Contestant]
    gates: list[Check]
    cells: dict[str, CellStatus]
    results: Results

    @property
    def ours(self) -> Contestant:
        """The model that is studied."""
        return self.contestants[0]

    @property
    def baseline(self) -> Contestant:
        """What it is compared with."""
        return self.contestants[1]

    @property
    def labels(self) -> dict[str, str]:
        """Of the contestants, by key."""
        return {contestant.key: contestant.label for contestant in self.contestants}

    def seconds_of(self, section: str) -> float:
        """How long the cells of a section took together."""
        return sum(status.seconds for name, status in self.cells.items() if name.partition("/")[0] == section)

    def failures_of(self, section: str) -> dict[str, CellStatus]:
        """The cells of a section that gave no figure."""
        return {
            name: status
            for name, status in self.cells.items()
            if name.partition("/")[0] == section and status.failure is not None
        }


def to_json(report: Report) -> dict[str, Any]:
    """The report as what JSON is made of."""
    document: dict[str, Any] = msgspec.to_builtins(report)
    return document


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a report (draft 2020-12), as it is published in docs/report.schema.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(Report)}


def read_report(path: Path) -> Report:
    """Reads a report.json.

    Raises:
        UserError: it is missing, damaged, or no report of this version.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; make one with `resnet-bk bench`") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give the report.json that `resnet-bk bench` wrote") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from None
    _check_kind(path, raw)
    try:
        report = msgspec.json.decode(raw, type=Report)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a whole report.json: {error}; {AGAIN}") from None
    if complaint := _inconsistency(report):
        raise UserError(f"{path} is damaged: {complaint}; {AGAIN}")
    return report


@dataclass(frozen=True, kw_only=True)
class _Head:
    kind: Any = None
    version: Any = None


def _check_kind(path: Path, raw: bytes) -> None:
    """Said before anything else: the fields of another version differ."""
    try:
        head = msgspec.json.decode(raw, type=_Head)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a whole report.json: {error}; {AGAIN}") from None
    if head.kind is None:
        raise UserError(f"{path} is no report of resnet-bk's; give the report.json that `resnet-bk bench` wrote")
    if head.kind != KIND or head.version != VERSION:
        is_newer = head.kind == KIND and isinstance(head.version, int) and head.version > VERSION
        mend = "update resnet-bk" if is_newer else AGAIN
        raise UserError(
            f"{path} is {head.kind!r} version {head.version!r}, this program reads {KIND!r} version {VERSION}; {mend}"
        )


def _inconsistency(report: Report) -> str | None:
    """What a table or plot would look for in vain."""
    keys = [contestant.key for contestant in report.contestants]
    if len(keys) < 2 or len(set(keys)) < len(keys):
        return f"its contestants are {', '.join(keys)}"
    for section, found in _measured_contestants(report.results).items():
        if not found <= set(keys):
            return f"section {section} has an unknown contestant"
    timing = report.results.timing
    measured = {(row.phase, row.contestant) for row in timing.phases} if timing else set()
    for row in timing.ratios if timing else []:
        if not {(row.phase, key) for key in keys[:2]} <= measured:
            return f"no time of phase {row.phase!r}"
        if row.ratio.value <= 0:
            return f"the ratio of phase {row.phase!r} is {row.ratio.value}"
    return None


def _measured_contestants(results: Results) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, section in (("flops", results.flops), ("memory", results.memory)):
        found[name] = {model.contestant for model in section.models} if section else set()
    found["timing"] = {row.contestant for row in results.timing.phases} if results.timing else set()
    axes = results.scaling.axes if results.scaling else []
    return found | {"scaling": {point.contestant for axis in axes for point in axis.points}}
