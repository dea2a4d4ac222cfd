"""What changed from one run to another, and which of it is more than noise."""

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from resnet_bk.chance import holm
from resnet_bk.report.findings import busy_cells
from resnet_bk.report.inference import (
    mean_difference,
    median_ratio,
    normal_p,
    permutation_p,
    slope_difference,
    standard_error,
)
from resnet_bk.schema import Arm, Check, Comparison, Exponent, Interval, Report, ScalingPoint

SIGNIFICANCE = 0.05
# Another process on the same machine has another layout of memory, another neighbour, another temperature.
TIME_MARGIN = 0.05
EXPONENT_MARGIN = 0.05
SAME_WORK = ("vocab_size", "batch_size", "sequence_length", "precision", "device")
SAME_TEXT = ("data", "description", "tokenizer", "train_tokens", "validation_tokens", "test_tokens", "split")
FINGERPRINTS = ("corpus_sha256", "tokenizer_sha256")  # not in older reports, of which nobody knows
FLOPS = ("forward", "backward", "optimizer")
MEMORY = ("after_load", "optimizer", "after_forward", "peak_forward", "peak_backward", "peak_step", "reserved")
Part = Literal["time", "speed-up", "loss", "exponent"]
MARGINS: dict[Part, float] = {"time": TIME_MARGIN, "speed-up": TIME_MARGIN, "loss": 0.0, "exponent": EXPONENT_MARGIN}
NEVER, NOT_RUN, MEASURED = "none", "not run", "measured"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Something that the runs do not have in common."""

    what: str
    first: str
    second: str


@dataclass(frozen=True, kw_only=True)
class Change:
    """A figure with noise in both runs.

    ``change`` is the second over the first for times and speed-ups, and the second less the first for losses (nats per
    token) and exponents; None where nothing can be said of it. ``p`` is of a change as large if there is none;
    ``claimed`` if it is one when all are counted together, and larger than runs differ anyway.
    """

    part: Part
    what: str
    contestant: str
    first: float
    second: float
    change: Interval | None = None
    p: float | None = None
    claimed: bool = False


@dataclass(frozen=True, kw_only=True)
class Count:
    """A figure without noise that is another: FLOPs, or bytes."""

    part: Literal["FLOPs", "memory"]
    what: str
    contestant: str
    first: int
    second: int


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """All of it. ``turns`` are gates, checks and cells that went another way; ``counts_alike`` is how many figures
    without noise are the same; ``remarks`` say what could not be compared, and why."""

    machine: list[Setting]
    versions: list[Setting]
    settings: list[Setting]
    changes: list[Change]
    counts: list[Count]
    counts_alike: int
    turns: list[Setting]
    remarks: list[str] = field(default_factory=list)

    @property
    def claimed(self) -> list[Change]:
        """Changes that exceed the noise."""
        return [change for change in self.changes if change.claimed]


def compare_runs(first: Report, second: Report) -> RunComparison:
    """The second run beside the first."""
    environment = list(_differing(_flat(first.environment), _flat(second.environment)))
    threads = _differing({"threads": first.workload.threads}, {"threads": second.workload.threads})
    hardware = [row for row in environment if row.what.startswith("hardware")]
    remarks = list(_remarks(first, second))
    labels = common_labels(first, second)
    same_work = _same_work(first, second)
    changes = [*_times(first, second, labels), *_speed_ups(first, second, labels)] if same_work else []
    if same_work and _same_text(first, second):
        changes += _losses(first, second, labels)
    changes += _exponents(first, second, labels)
    counts = list(_counts(first, second, labels)) if same_work else []
    return RunComparison(
        machine=[*hardware, *(row for row in threads if not any(known.what.endswith("threads") for known in hardware))],
        versions=[row for row in environment if row not in hardware],
        settings=[*_settings(first, second)],
        changes=_judged(changes),
        counts=[count for count in counts if count.first != count.second],
        counts_alike=sum(count.first == count.second for count in counts),
        turns=[*_turned_checks(first, second), *_turned_cells(first, second)],
        remarks=remarks,
    )


def common_labels(first: Report, second: Report) -> dict[str, str]:
    """Of the contestants that are in both runs, by key; one made of something else is another."""
    theirs = {model.key: (model.label, model.source) for model in second.contestants}
    return {
        model.key: model.label for model in first.contestants if theirs.get(model.key) == (model.label, model.source)
    }


def _judged(changes: list[Change]) -> list[Change]:
    """Counted together: among many comparisons of what is equal, some look different by chance."""
    tested = [change for change in changes if change.p is not None]
    adjusted = dict(zip(map(id, tested), holm([change.p for change in tested if change.p is not None]), strict=True))
    return [
        replace(change, claimed=adjusted.get(id(change), 1.0) <= SIGNIFICANCE and _beyond_margin(change))
        for change in changes
    ]


def _beyond_margin(change: Change) -> bool:
    if change.change is None:
        return False
    margin, value = MARGINS[change.part], change.change.value
    if change.part in ("time", "speed-up"):
        return max(value, 1 / value) > 1 + margin
    return abs(value) > margin


def _flat(document: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(document, dict) or not document:
        return {name: document}
    flat: dict[str, Any] = {}
    for key, value in document.items():
        flat |= _flat(value, f"{name} {key}".strip())
    return flat


def _differing(first: dict[str, Any], second: dict[str, Any]) -> Iterator[Setting]:
    for what in dict.fromkeys([*first, *second]):
        if first.get(what) != second.get(what):
            yield Setting(what=what, first=_told(first, what), second=_told(second, what))


def _told(values: dict[str, Any], what: str) -> str:
    value = values.get(what)
    return NEVER if value is None else str(value)


def _settings(first: Report, second: Report) -> Iterator[Setting]:
    """Profile, workload and models; of a model that is another, only that it is."""
    profiles = [{**report.profile, "purpose": None} for report in (first, second)]
    unknown = [name for name in FINGERPRINTS if not _differ(first, second, name)]
    works = [{**vars(report.workload), "threads": None, **dict.fromkeys(unknown)} for report in (first, second)]
    yield from _differing(
        _flat({"profile": profiles[0], **works[0]}),
        _flat({"profile": profiles[1], **works[1]}),
    )
    same = common_labels(first, second)
    yield from _differing(_models(first, same), _models(second, same))


def _models(report: Report, same: Container[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for model in report.contestants:
        if model.key in same:
            own = {"parameters": model.parameters, **model.config}
            facts |= {f"{model.label}'s {name}": value for name, value in own.items()}
        else:
            facts[model.key] = f"{model.label}, {model.source}"
    return facts


def _same_work(first: Report, second: Report) -> bool:
    return all(getattr(first.workload, name) == getattr(second.workload, name) for name in SAME_WORK)


def _same_text(first: Report, second: Report) -> bool:
    alike = all(getattr(first.workload, name) == getattr(second.workload, name) for name in SAME_TEXT)
    return alike and not any(_differ(first, second, name) for name in FINGERPRINTS)


def _differ(first: Report, second: Report, fingerprint: str) -> bool:
    """Whether both reports have it, and not the same."""
    both = {getattr(report.workload, fingerprint) for report in (first, second)} - {None}
    return len(both) > 1


def _remarks(first: Report, second: Report) -> Iterator[str]:
    if not _same_work(first, second):
        yield (
            "The batches are of another size, type, vocabulary or device: times, FLOPs, memory and losses are not "
            "compared."
        )
    elif not _same_text(first, second):
        yield "The text is another: losses are not compared."
    missing = {model.key for model in (*first.contestants, *second.contestants)} - set(common_labels(first, second))
    if missing:
        yield f"Not in both runs, or made of something else, and not compared: {', '.join(sorted(missing))}."
    for name, a, b in (("first", first, second), ("second", second, first)):
        absent = [part for part, result in vars(a.results).items() if result is None and vars(b.results)[part]]
        if absent:
            yield f"The {name} run has not measured {', '.join(absent)}."
    for name, report in (("first", first), ("second", second)):
        if busy := [cell for cell in busy_cells(report) if cell.partition("/")[0] in ("timing", "scaling")]:
            yield f"In the {name} run the machine was busy with other work in {len(busy)} of its measurements of time."
    learned = (first.results.convergence, second.results.convergence)
    if all(learned) and any(len(result.seeds) == 1 for result in learned if result):
        yield "Not both runs have several seeds: no difference of losses can be claimed."


def _times(first: Report, second: Report, labels: dict[str, str]) -> Iterator[Change]:
    """Samples of two runs have nothing that pairs them."""
    if first.results.timing is None or second.results.timing is None:
        return
    theirs = {(row.phase, row.contestant): row.seconds for row in second.results.timing.phases}
    for row in first.results.timing.phases:
        other = theirs.get((row.phase, row.contestant))
        if other is not None and row.contestant in labels:
            yield Change(
                part="time",
                what=row.phase,
                contestant=labels[row.contestant],
                first=row.seconds.median,
                second=other.median,
                change=median_ratio(row.seconds.samples, other.samples),
                p=permutation_p(row.seconds.samples, other.samples),
            )


def _speed_ups(first: Report, second: Report, labels: dict[str, str]) -> Iterator[Change]:
    """Ratios within a run do not feel how fast the machine was."""
    both = {first.ours.key, first.baseline.key} <= set(labels)
    if first.results.timing is None or second.results.timing is None or not both:
        return
    theirs = {row.phase: row.ratio for row in second.results.timing.ratios}
    for row in first.results.timing.ratios:
        other = theirs.get(row.phase)
        if other is None or min(row.ratio.low, other.low) <= 0:
            continue
        step = math.log(other.value / row.ratio.value)
        error = math.hypot(_log_error(row.ratio), _log_error(other))
        yield Change(
            part="speed-up",
            what=row.phase,
            contestant=f"{first.baseline.label} / {first.ours.label}",
            first=row.ratio.value,
            second=other.value,
            change=Interval(
                value=math.exp(step), low=math.exp(step - 1.96 * error), high=math.exp(step + 1.96 * error)
            ),
            p=normal_p(step, error),
        )


def _log_error(ratio: Comparison) -> float:
    return standard_error(math.log(ratio.low), math.log(ratio.high))


def _losses(first: Report, second: Report, labels: dict[str, str]) -> Iterator[Change]:
    """Test losses, over the seeds that both runs have; seeds begin and are fed alike, so that they pair."""
    a, b = first.results.convergence, second.results.convergence
    if a is None or b is None or (a.steps, a.tokens_per_step) != (b.steps, b.tokens_per_step):
        return
    for key in dict.fromkeys(arm.key for arm in a.arms):
        ours, theirs = (_by_seed(result.arms, key) for result in (a, b))
        if not ours or not theirs or (key in {model.key for model in first.contestants} and key not in labels):
            continue
        paired = ours.keys() == theirs.keys()
        first_losses, second_losses = [ours[seed] for seed in sorted(ours)], [theirs[seed] for seed in sorted(theirs)]
        change = Change(
            part="loss",
            what="test loss",
            contestant=next(arm.label for arm in a.arms if arm.key == key),
            first=sum(first_losses) / len(first_losses),
            second=sum(second_losses) / len(second_losses),
        )
        if min(len(ours), len(theirs)) > 1:
            figure, p = mean_difference(first_losses, second_losses, paired=paired)
            change = replace(change, change=figure, p=p)
        yield change


def _by_seed(arms: list[Arm], key: str) -> dict[int, float]:
    """Empty if one of them diverged: what is left would be a choice of the good ones."""
    losses = {arm.seed: arm.test_loss for arm in arms if arm.key == key}
    known = {seed: loss for seed, loss in losses.items() if loss is not None}
    return known if len(known) == len(losses) else {}


def _exponents(first: Report, second: Report, labels: dict[str, str]) -> Iterator[Change]:
    """Of axes on which all else was the same."""
    if first.results.scaling is None or second.results.scaling is None:
        return
    theirs = {(axis.axis, *sorted(axis.fixed.items())): axis for axis in second.results.scaling.axes}
    for axis in first.results.scaling.axes:
        other = theirs.get((axis.axis, *sorted(axis.fixed.items())))
        slopes = other.exponents if other else []
        found = {(row.contestant, row.quantity, row.from_value): row.exponent for row in slopes}
        for row in axis.exponents:
            slope = found.get((row.contestant, row.quantity, row.from_value))
            if other is None or slope is None or row.contestant not in labels:
                continue
            change = Change(
                part="exponent",
                what=f"{row.quantity} over {axis.axis.replace('_', ' ')}",
                contestant=labels[row.contestant],
                first=row.exponent.value,
                second=slope.value,
            )
            a, b = (_figures(points, row) for points in (axis.points, other.points))
            shared = sorted(a.keys() & b.keys())
            if len(shared) > 2:
                figure, p = slope_difference(shared, [a[value] for value in shared], [b[value] for value in shared])
                change = replace(change, change=figure, p=p)
            yield change


def _figures(points: list[ScalingPoint], row: Exponent) -> dict[int, float]:
    """What the exponent was fitted to, by place on the axis."""
    figures = {
        point.value: (point.seconds.median if point.seconds else None) if row.quantity == "time" else point.peak_memory
        for point in points
        if point.contestant == row.contestant and point.value >= row.from_value
    }
    return {value: figure for value, figure in figures.items() if figure}


def _counts(first: Report, second: Report, labels: dict[str, str]) -> Iterator[Count]:
    """Figures that are the same in every run of the same code."""
    a, b = first.results, second.results
    pairs: list[tuple[Literal["FLOPs", "memory"], tuple[str, ...], Any, Any]] = [
        ("FLOPs", FLOPS, a.flops, b.flops),
        ("memory", MEMORY, a.memory, b.memory),
    ]
    for part, names, ours, theirs in pairs:
        if ours is None or theirs is None:
            continue
        others = {model.contestant: model for model in theirs.models}
        for model in ours.models:
            other = others.get(model.contestant)
            if other is None or model.contestant not in labels:
                continue
            for name in names:
                value, theirs_value = getattr(model, name), getattr(other, name)
                if value is not None and theirs_value is not None:
                    yield Count(
                        part=part,
                        what=name.replace("_", " "),
                        contestant=labels[model.contestant],
                        first=value,
                        second=theirs_value,
                    )


def _turned_checks(first: Report, second: Report) -> Iterator[Setting]:
    """Gates and checks that held in one run only."""
    ours, theirs = ({check.name: check for check in _checks(report)} for report in (first, second))
    for name, check in ours.items():
        other = theirs.get(name)
        if other is not None and other.passed != check.passed:
            yield Setting(what=name, first=_held(check), second=_held(other))


def _checks(report: Report) -> list[Check]:
    result = report.results.stability
    return [*report.gates, *([*result.extremes, *result.determinism] if result else [])]


def _held(check: Check) -> str:
    measured = "not a number" if check.measured is None else f"{check.measured:.3g}"
    return f"{'passed' if check.passed else 'FAILED'} ({measured})"


def _turned_cells(first: Report, second: Report) -> Iterator[Setting]:
    """Cells that failed, and training runs that diverged, in one run only."""
    for what, ours, theirs in (
        ("cell", _failed(first), _failed(second)),
        ("training of", _diverged(first), _diverged(second)),
    ):
        for name in dict.fromkeys([*ours, *theirs]):
            a, b = ours.get(name, NOT_RUN), theirs.get(name, NOT_RUN)
            if a != b and {a, b} - {MEASURED, NOT_RUN}:
                yield Setting(what=f"{what} {name}", first=a, second=b)


def _failed(report: Report) -> dict[str, str]:
    return {name: status.failure.kind if status.failure else MEASURED for name, status in report.cells.items()}


def _diverged(report: Report) -> dict[str, str]:
    result = report.results.convergence
    return {
        f"{arm.label}, seed {arm.seed}": MEASURED if arm.test_loss is not None else "diverged"
        for arm in (result.arms if result else [])
    }
