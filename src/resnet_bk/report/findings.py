"""What a report has to say, as sentences made of its figures: gains, losses, and what limits the figures."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import fmean

from resnet_bk.report.sections.convergence import Windows, final_loss, losses_by_window
from resnet_bk.report.sections.memory import LEAK
from resnet_bk.report.sections.scaling import crossover_sentence
from resnet_bk.report.sections.stability import worst
from resnet_bk.report.wording import interval, inverse, listing, megabytes, shortened, signed_interval
from resnet_bk.schema import (
    AxisScaling,
    CellStatus,
    Comparison,
    ConvergenceResult,
    FailureKind,
    PhaseRatio,
    Report,
)

SEED_MIXER, BLEND, BIDIRECTIONAL = "seed-mixer", "blend", "bidirectional"
BUSY = 0.03  # the share of its time that a cell may wait for a processor before its figures are doubtful
TIMED = ("timing", "convergence", "scaling")  # sections that tell times; what others tell is the same on a busy machine
AGREEMENT = 1e-3  # between counted FLOPs and those by formula
MESSAGE_LETTERS = 110  # of what a failed cell said
GROWN = 2.0  # times as long, from which on a time has grown enough to ask by which power
NAMED = 3  # cells of one kind that a sentence names; a table at the end has the others
PHASES = {
    "forward": "the forward pass",
    "backward": "the backward pass",
    "optimizer": "the optimizer",
    "step": "a whole training step",
    "prefill": "reading a prompt",
    "decode": "decoding",
    "forward, cold cache": "the forward pass with a cold cache",
}
CONSEQUENCES: dict[FailureKind, str] = {
    "out of memory": "ran out of memory",
    "timeout": "took longer than a cell may",
    "not a number": "gave what is not a number",
    "crash": "crashed",
    "error": "ended with an error",
    "withheld": "had to be withheld",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A sentence or two. The smaller its ``rank`` the more important it is; ``grave`` if it limits other figures or is
    a defect."""

    rank: int
    text: str
    grave: bool = False


def findings_of(report: Report) -> list[Finding]:
    """All of them, the most important first."""
    sources: list[Callable[[Report], Iterator[Finding]]] = [
        _failures,
        _foreign_load,
        _broken_checks,
        _learning,
        _reading,
        _speed,
        _memory,
        _flops,
        _scaling,
        _stability,
        _variants,
        _missing,
    ]
    found = [finding for source in sources for finding in source(report)]
    return sorted(found, key=lambda finding: finding.rank)


def _failures(report: Report) -> Iterator[Finding]:
    """Cells without a figure, by what happened to them."""
    failed = {name: status.failure for name, status in report.cells.items() if status.failure is not None}
    if not failed:
        return
    told = []
    for kind, consequence in CONSEQUENCES.items():
        names = [
            f"{name} ({shortened(failure.message, MESSAGE_LETTERS)})" if kind in ("error", "withheld") else name
            for name, failure in failed.items()
            if failure.kind == kind
        ]
        if names:
            told.append(f"{_some(names)} {consequence}")
    count = f"{len(failed)} of {len(report.cells)} measurements gave no figure"
    yield Finding(rank=5, text=f"{count}: {'; '.join(told)}.", grave=True)


def _some(names: list[str]) -> str:
    """The first of many names."""
    more = len(names) - NAMED
    return listing(names) if more <= 0 else f"{', '.join(names[:NAMED])} and {more} more"


def _foreign_load(report: Report) -> Iterator[Finding]:
    """Moments in which others had the processor, or the GPU slowed itself down."""
    if busy := busy_cells(report):
        most = max(status.waited or 0 for status in busy.values())
        yield Finding(
            rank=8,
            text="The machine was busy with other work: threads that were ready waited for a processor that others "
            f"had, at worst {most:.0%} of the time, in {_some(list(busy))}. Times from there are doubtful.",
            grave=True,
        )
    samples = report.results.timing.gpu if report.results.timing else []
    if throttled := sum(sample.throttled for sample in samples):
        yield Finding(
            rank=9,
            text=f"The GPU lowered its own clock in {throttled} of {len(samples)} samples taken between rounds.",
            grave=True,
        )


def busy_cells(report: Report) -> dict[str, CellStatus]:
    """Those whose times are doubtful: they waited for a processor more than a few percent of their time."""
    return {
        name: status
        for name, status in report.cells.items()
        if name.partition("/")[0] in TIMED and (status.waited or 0) > BUSY
    }


def _broken_checks(report: Report) -> Iterator[Finding]:
    """Of extremes, determinism and causality; gates stand above all findings."""
    result = report.results.stability
    if result is None:
        return
    failed = [check.name for check in (*result.extremes, *result.determinism) if not check.passed]
    failed += [
        f"{row.label} reads later tokens"
        for row in result.causality
        if row.causal and (row.largest_change is None or row.largest_change > row.limit)
    ]
    if failed:
        yield Finding(rank=7, text=f"Checks that failed: {'; '.join(failed)}.", grave=True)


def _learning(report: Report) -> Iterator[Finding]:
    """Which learns better, where seeds can carry that."""
    result = report.results.convergence
    if result is None:
        return
    yield from _diverged(result)
    ours, baseline = report.ours, report.baseline
    losses = {model.key: _test_losses(result, model.key) for model in (ours, baseline)}
    unigram = f"Without any context it would be {result.unigram_entropy:.3f}."
    after = f"After {result.steps * result.tokens_per_step:,} tokens"
    if not all(losses.values()):
        yield Finding(
            rank=10, text=f"There are no test losses of both {ours.label} and {baseline.label} to compare.", grave=True
        )
        return
    a, b = (sum(found) / len(found) for found in losses.values())
    lead = f"{after} the test loss is {a:.3f} ({ours.label}) against {b:.3f} ({baseline.label}) nats a token"
    difference = next((row for row in result.differences if row.key == ours.key), None)
    if len(result.seeds) == 1:
        rates = "" if len(result.learning_rates) > 1 else " and rates that are not tuned"
        said = f"{lead}. One seed{rates}: this says nothing about which model learns better. {unigram}"
    elif difference is None:
        said = f"{lead}; its seeds carry no comparison. {unigram}"
    else:
        claim = _compared(difference.difference, ours.label, baseline.label)
        whole = all(len(found) == len(result.seeds) for found in losses.values())
        seeds = f"{len(result.seeds)} seeds" if whole else "the seeds that have one"
        said = f"{lead}, means of {seeds}: {claim}. {unigram}"
    yield Finding(rank=10, text=said)


def _reading(report: Report) -> Iterator[Finding]:
    """What longer windows than training's do to both models' losses."""
    result = report.results.convergence
    if result is None:
        return
    losses = {model.label: losses_by_window(result, model.key) for model in (report.ours, report.baseline)}
    trained = report.workload.sequence_length
    shared = set.intersection(*({length for length, attention in found if not attention} for found in losses.values()))
    longest = max(shared, default=trained)
    if longest == trained or trained not in shared:
        return
    told = "; ".join(f"{label} goes {_read_on(found, trained, longest)}" for label, found in losses.items())
    text = f"Pieces of the test text, others than above, read in windows of {longest:,} tokens instead of training's"
    yield Finding(rank=12, text=f"{text} {trained:,}: the loss of {told}.")


def _read_on(found: dict[Windows, list[float]], trained: int, longest: int) -> str:
    """From training's windows to long ones; a shorter sight is told of where it helps."""
    after = fmean(found[longest, None])
    said = f"from {fmean(found[trained, None]):.3f} to {after:.3f}"
    windowed = found.get((longest, trained))
    if windowed is not None and fmean(windowed) < after:
        said += f", or to {fmean(windowed):.3f} if its attention sees the last {trained:,} alone"
    return said


def _compared(figure: Comparison, ours: str, theirs: str) -> str:
    """Which of two learns more; ``figure`` is the loss of the other less ours."""
    if not figure.claimed:
        # The interval is of this comparison alone.
        why = "" if figure.low <= 0 <= figure.high else " after Holm's correction"
        return f"no difference to {theirs} can be claimed{why}: its loss less this one is {signed_interval(figure)}"
    better, worse = (ours, theirs) if figure.value > 0 else (theirs, ours)
    low, high = sorted((abs(figure.low), abs(figure.high)))
    return (
        f"{better} learns more from the same tokens than {worse}, by {abs(figure.value):.3f} ({low:.3f} to {high:.3f})"
    )


def _turned(figure: Comparison) -> Comparison:
    """The same difference seen from the other side."""
    return replace(figure, value=-figure.value, low=-figure.high, high=-figure.low)


def _diverged(result: ConvergenceResult) -> Iterator[Finding]:
    """Runs that ended with what is not a number."""
    told = []
    for label, arms in groupby(sorted(result.arms, key=lambda arm: arm.label), key=lambda arm: arm.label):
        runs = list(arms)
        if lost := sum(final_loss(arm) is None for arm in runs):
            told.append(f"{label} in {lost} of {len(runs)} runs")
    if told:
        yield Finding(rank=9, text=f"Training diverged: {listing(told)}. Such runs have no loss.", grave=True)


def _test_losses(result: ConvergenceResult, key: str) -> list[float]:
    """Of the runs that have one."""
    return [loss for arm in result.arms if arm.key == key and (loss := final_loss(arm)) is not None]


def _speed(report: Report) -> Iterator[Finding]:
    """Phases in which ours is faster, slower, or neither can be said."""
    result = report.results.timing
    if result is None:
        return
    ours, baseline = report.ours.label, report.baseline.label
    faster = [row for row in result.ratios if row.ratio.claimed and row.ratio.value > 1]
    slower = [row for row in result.ratios if row.ratio.claimed and row.ratio.value < 1]
    open_ = [row for row in result.ratios if not row.ratio.claimed]
    if slower:
        yield Finding(rank=20, text=f"{ours} is slower: {baseline} is {_factors(slower, inverse)}.")
    if faster:
        yield Finding(rank=21, text=f"{ours} is faster: it is {_factors(faster, interval)}.")
    if open_:
        told = listing([f"{PHASES[row.phase]} (ratio {interval(row.ratio)})" for row in open_])
        yield Finding(rank=24, text=f"No difference in time can be claimed for {told}.")


def _factors(rows: list[PhaseRatio], shown: Callable[[Comparison], str]) -> str:
    """1.50 (1.40 to 1.60) times as fast in decoding, 1.20 (1.10 to 1.30) in the backward pass."""
    unit = " times as fast"
    return ", ".join(
        f"{shown(row.ratio)}{'' if place else unit} in {PHASES[row.phase]}" for place, row in enumerate(rows)
    )


def _memory(report: Report) -> Iterator[Finding]:
    """Leaks, and what the planner had said."""
    result, labels = report.results.memory, report.labels
    if result is None:
        return
    leaking = {labels[model.contestant]: model.grown_per_step for model in result.models if model.grown_per_step > LEAK}
    if leaking:
        told = listing([f"{label} ({megabytes(grown)} MB a step)" for label, grown in leaking.items()])
        yield Finding(rank=6, text=f"Memory grows from step to step: {told}. Something leaks.", grave=True)
    errors = {
        labels[model.contestant]: model.predicted_peak / model.peak_step - 1
        for model in result.models
        if model.predicted_peak is not None
    }
    if errors:
        told = listing([f"{error:+.1%} ({label})" for label, error in errors.items()])
        text = f"The planner had foretold the peak of a step with an error of {told}."
        # A leak is no part of a step that could be foreseen.
        if short := [label for label, error in errors.items() if error < 0 and label not in leaking]:
            text += f" It promised too little for {listing(short)}."
        yield Finding(rank=35, text=text, grave=bool(short))
    if untraced := [labels[model.contestant] for model in result.models if model.predicted_peak is None]:
        yield Finding(rank=52, text=f"The planner could not foretell the memory of {listing(untraced)}.")


def _flops(report: Report) -> Iterator[Finding]:
    """Whether counted and analytic FLOPs agree."""
    result, labels = report.results.flops, report.labels
    if result is None:
        return
    apart = []
    for model in result.models:
        if model.formula_forward is not None and model.formula_backward is not None:
            formula = model.formula_forward + model.formula_backward
            error = (model.forward + model.backward) / formula - 1
            if abs(error) > AGREEMENT:
                apart.append(f"{labels[model.contestant]} by {error:+.1%}")
    if apart:
        yield Finding(rank=15, text=f"Counted FLOPs differ from those by formula: {listing(apart)}.", grave=True)
    if foreign := [labels[model.contestant] for model in result.models if model.formula_forward is None]:
        yield Finding(
            rank=50, text=f"FLOPs of {listing(foreign)} are counted alone: there is no formula to check them by."
        )


def _scaling(report: Report) -> Iterator[Finding]:
    """The crossover, exponents of the length, and where memory or time did not suffice."""
    result, labels = report.results.scaling, report.labels
    if result is None:
        return
    for axis in result.axes:
        if axis.axis == "sequence_length":
            yield Finding(rank=30, text=f"Forward and backward together: {crossover_sentence(report, axis)}")
            yield from _growth(axis, labels)
            yield from _memory_at_the_longest(report, axis)
    lost = [
        f"{labels[point.contestant]} at {axis.axis.replace('_', ' ')} {point.value:,} ({point.failure.kind})"
        for axis in result.axes
        for point in axis.points
        if point.failure is not None
    ]
    if lost:
        yield Finding(rank=32, text=f"In scaling there is no figure of {_some(lost)}.")


def _growth(axis: AxisScaling, labels: dict[str, str]) -> Iterator[Finding]:
    """Exponents of the time, but of a model whose time the length has hardly changed: there is no power to tell."""
    growing, flat = [], []
    for row in [row for row in axis.exponents if row.quantity == "time"]:
        times = [point.seconds.median for point in axis.points if point.contestant == row.contestant and point.seconds]
        label = labels[row.contestant]
        if times[-1] < GROWN * times[0]:
            flat.append(f"{label} ({times[-1] / times[0]:.2f} times)")
        else:
            growing.append(f"N^{interval(row.exponent)} for {label} from N = {row.from_value:,} on")
    lengths = sorted({point.value for point in axis.points})
    if growing:
        yield Finding(rank=31, text=f"Time grows as {listing(growing)}.")
    if flat:
        text = (
            f"From N = {lengths[0]:,} to {lengths[-1]:,} the time hardly grows for {listing(flat)}: costs that do not"
        )
        yield Finding(rank=31, text=f"{text} depend on N take most of it.")


def _memory_at_the_longest(report: Report, axis: AxisScaling) -> Iterator[Finding]:
    """Of both, where both were measured."""
    peaks = {(point.contestant, point.value): point.peak_memory for point in axis.points if point.peak_memory}
    ours, baseline = report.ours, report.baseline
    if common := {value for key, value in peaks if key == ours.key} & {v for key, v in peaks if key == baseline.key}:
        longest = max(common)
        mine, theirs = peaks[ours.key, longest], peaks[baseline.key, longest]
        yield Finding(
            rank=33,
            text=f"At N = {longest:,} a training step of {ours.label} holds {megabytes(mine)} MB at its peak, that of "
            f"{baseline.label} {megabytes(theirs)} MB.",
        )


def _stability(report: Report) -> Iterator[Finding]:
    """Errors of float32, overflows of float16."""
    result = report.results.stability
    if result is None:
        return
    if result.accuracy:
        largest = worst(result.accuracy)
        told = "is not finite somewhere" if largest is None else f"is at most {largest:.1e}"
        yield Finding(
            rank=40,
            text=f"The error of bk_core in float32 against complex128 {told}, over all lengths, energies and "
            "potentials tried.",
            grave=largest is None,
        )
    if skipped := [row for row in result.half_precision if row.skipped]:
        told = listing([f"{row.skipped} of {row.steps} ({report.labels[row.contestant]})" for row in skipped])
        yield Finding(rank=55, text=f"In float16 steps were skipped for an overflow: {told}.")


def _variants(report: Report) -> Iterator[Finding]:
    """The mixer, gradient and form that this project began with."""
    result = report.results.convergence
    if result is None:
        return
    labels = {arm.key: arm.label for arm in result.arms}
    means = {key: sum(losses) / len(losses) for key in labels if (losses := _test_losses(result, key))}
    count = "one seed" if len(result.seeds) == 1 else f"mean of {len(result.seeds)} seeds"
    difference = next((row.difference for row in result.differences if row.key == SEED_MIXER), None)
    if SEED_MIXER in means:
        told = "" if difference is None else f"; {_compared(difference, labels[SEED_MIXER], report.baseline.label)}"
        yield Finding(
            rank=45, text=f"The test loss of {labels[SEED_MIXER]} is {means[SEED_MIXER]:.3f} ({count}){told}."
        )
    if BLEND in means:
        figure = result.gradient_difference
        told = "" if figure is None else f"; {_compared(_turned(figure), 'the analytic one', 'the exact gradient')}"
        if min(_test_losses(result, BLEND)) > result.unigram_entropy:
            told += ". The analytic one has learned nothing: without any context the loss would be lower"
        yield Finding(rank=46, text=f"{labels[BLEND]}: the test loss is {means[BLEND]:.3f} ({count}){told}.")
    if BIDIRECTIONAL in means:
        loss = f"{means[BIDIRECTIONAL]:.3f}"
        text = f"{labels[BIDIRECTIONAL]}: its {loss} is a leak and no result, since it reads its own targets."
        yield Finding(rank=47, text=text)


def _missing(report: Report) -> Iterator[Finding]:
    absent = [name for name, result in vars(report.results).items() if result is None]
    if absent:
        yield Finding(rank=25, text=f"Not measured: {listing(absent)}.", grave=True)


def within(findings: Iterable[Finding], lines: float, letters: int) -> tuple[list[Finding], int]:
    """As many of them as ``lines`` of so many letters hold, the most important first, and how many are left out."""
    kept, left = [], 0
    for finding in findings:
        needed = lines_of(finding.text, letters)
        if needed > lines:
            left += 1
            continue
        lines -= needed
        kept.append(finding)
    return kept, left


def lines_of(text: str, letters: int) -> float:
    """How many lines a paragraph takes, the gap after it included."""
    return 0.2 + -(-len(text) // letters)
