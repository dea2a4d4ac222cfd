"""Numerical stability, causality, determinism, float16."""

from resnet_bk.report.blocks import Block, Note, Paragraph, Plot, Section, Table
from resnet_bk.report.figures import BASELINE, FOURTH, OURS, THIRD, drawing
from resnet_bk.report.wording import error, listing
from resnet_bk.schema import AccuracyPoint, CausalityMeasurement, Report, StabilityResult

COLOURS = (OURS, BASELINE, THIRD, FOURTH)


def build(report: Report, result: StabilityResult) -> Section:
    """Errors against complex128, extremes, causality, determinism, float16."""
    blocks: list[Block] = []
    if result.accuracy:
        blocks += [
            Paragraph(
                text="bk_core in float32 against its definition by determinants in complex128, on the same random "
                f"potential, on {report.workload.device}. The error is the largest one, relative to the largest exact "
                "magnitude, of the values and of the gradient of the potential. The worst over all strengths of the "
                "potential is shown for each length and eta."
            ),
            _errors(result),
            _plot(result),
        ]
    if result.causality:
        blocks += [_causality(result), *_leaks(result)]
    if checks := [*result.extremes, *result.determinism]:
        blocks.append(
            Table(
                caption="Extremes and determinism",
                header=["check", "measured", "passed"],
                rows=[[found.name, error_count(found.measured), "yes" if found.passed else "NO"] for found in checks],
            )
        )
    if failed := [found.name for found in checks if not found.passed]:
        blocks.append(Note(text=f"Failed: {'; '.join(failed)}.", grave=True))
    if result.half_precision:
        blocks += [_half_precision(report, result), *_half_notes(report, result)]
    if failures := report.failures_of("stability"):
        told = "; ".join(
            f"{name.partition('/')[2]} ({status.failure.kind}: {status.failure.message})"
            for name, status in failures.items()
            if status.failure
        )
        blocks.append(Note(text=f"Not measured: {told}.", grave=True))
    return Section(title="Numerical stability", blocks=blocks)


def error_count(measured: float | None) -> str:
    """A number of wrong values."""
    return "not a number" if measured is None else f"{measured:,.0f}"


def worst(points: list[AccuracyPoint]) -> float | None:
    """Largest error of values and gradients; None if one is not finite, or there is none."""
    return _largest([found for point in points for found in (point.value_error, point.gradient_error)])


def _causality(result: StabilityResult) -> Table:
    rows = [
        [
            row.label,
            "yes" if row.causal else "no",
            error(row.largest_change),
            f"{row.limit:.0e}",
            _causality_verdict(row),
        ]
        for row in result.causality
    ]
    return Table(
        caption="Does a later token change an earlier logit? Largest change, in float64 (in float32 where the limit is "
        "larger)",
        header=["model", "meant to be causal", "largest change", "limit", "verdict"],
        rows=rows,
        align=["left", "left", "right", "right", "left"],
    )


def _causality_verdict(row: CausalityMeasurement) -> str:
    if row.largest_change is None:
        return "not a number"
    leaks = row.largest_change > row.limit
    if not row.causal:
        return "reads its targets, as it must" if leaks else "unexpectedly causal"
    return "LEAKS" if leaks else "causal"


def _leaks(result: StabilityResult) -> list[Block]:
    leaking = [row.label for row in result.causality if row.causal and _causality_verdict(row) != "causal"]
    if not leaking:
        return []
    text = f"Not shown to be causal: {listing(leaking)}. A loss of a model that reads ahead is no measure of anything."
    return [Note(text=text, grave=True)]


def _half_precision(report: Report, result: StabilityResult) -> Table:
    labels = report.labels
    rows = [
        [
            labels.get(row.contestant, row.contestant),
            f"{row.steps:,}",
            f"{row.skipped:,}",
            f"{row.skipped / row.steps:.1%}",
            f"{row.scale:,.10g}",
            "not a number" if row.loss is None else f"{row.loss:.3f}",
        ]
        for row in result.half_precision
    ]
    return Table(
        caption="Training in float16 with dynamic loss scaling",
        header=["model", "steps", "skipped for an overflow", "share", "scale at the end", "last training loss"],
        rows=rows,
    )


def _half_notes(report: Report, result: StabilityResult) -> list[Block]:
    blocks: list[Block] = [
        Note(
            text="A step whose scaled gradients leave float16's range is skipped and the scale halved; it begins at "
            "65,536. A few skipped steps at the beginning are how the scale is found."
        )
    ]
    broken = [report.labels.get(row.contestant, row.contestant) for row in result.half_precision if row.loss is None]
    if broken:
        text = f"Not trainable in float16, as the loss is not a number at the end: {listing(broken)}."
        blocks.append(Note(text=text, grave=True))
    return blocks


def _groups(result: StabilityResult) -> dict[tuple[str, int, float], list[AccuracyPoint]]:
    groups: dict[tuple[str, int, float], list[AccuracyPoint]] = {}
    for point in result.accuracy:
        groups.setdefault((point.form, point.sequence_length, point.eta), []).append(point)
    return groups


def _errors(result: StabilityResult) -> Table:
    rows = []
    for (form, length, eta), points in _groups(result).items():
        values = [point.value_error for point in points]
        gradients = [point.gradient_error for point in points]
        rows.append([form, f"{length:,}", f"{eta:g}", *(error(_largest(column)) for column in (values, gradients))])
    return Table(
        caption="Largest relative errors of float32",
        header=["form", "N", "eta", "values", "gradient"],
        rows=rows,
        align=["left", "right", "right", "right", "right"],
    )


def _largest(errors: list[float | None]) -> float | None:
    finite = [found for found in errors if found is not None]
    return max(finite) if finite and len(finite) == len(errors) else None


def _plot(result: StabilityResult) -> Plot:
    groups = _groups(result)
    series = sorted({(form, length) for form, length, _ in groups})
    with drawing(height=3.0) as canvas:
        (axes,) = canvas.axes
        lengths = sorted({length for _, length in series})
        for form, length in series:
            etas = sorted(
                eta for known_form, known_length, eta in groups if (known_form, known_length) == (form, length)
            )
            errors = [worst(groups[form, length, eta]) for eta in etas]
            axes.plot(
                [eta for eta, found in zip(etas, errors, strict=True) if found is not None],
                [found for found in errors if found is not None],
                marker="o" if form == "causal" else "s",
                linestyle="-" if form == "causal" else "--",
                markersize=4,
                color=COLOURS[lengths.index(length) % len(COLOURS)],
                label=f"{form}, N = {length:,}",
            )
        axes.axhline(2**-24, color="#666666", linestyle=":", linewidth=1, label="rounding of float32")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("eta, the distance of the energy from the real axis")
        axes.set_ylabel("largest relative error")
        canvas.legend_above()
    return Plot(
        caption="Largest error of values and gradients over eta",
        alternative="Errors rise as eta falls; the table above has the figures",
        svg=canvas.svg,
    )
