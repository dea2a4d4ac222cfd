"""Numerical stability, causality, determinism."""

from resnet_bk.report.blocks import Block, Note, Paragraph, Plot, Section, Table
from resnet_bk.report.figures import BASELINE, FOURTH, OURS, THIRD, drawing
from resnet_bk.report.wording import error
from resnet_bk.schema import AccuracyPoint, Report, StabilityResult

COLOURS = (OURS, BASELINE, THIRD, FOURTH)


def build(report: Report, result: StabilityResult) -> Section:
    """Errors against complex128, extremes, causality, determinism."""
    failed = [check.name for check in (*result.extremes, *result.determinism) if not check.passed]
    blocks: list[Block] = [
        Paragraph(
            text="bk_core in float32 against its definition by determinants in complex128, on the same random "
            f"potential, on {report.workload.device}. The error is the largest one, relative to the largest exact "
            "magnitude, of the values and of the gradient of the potential. The worst over all strengths of the "
            "potential is shown for each length and eta."
        ),
        _errors(result),
        _plot(result),
        Table(
            caption="Does a later token change an earlier logit? Largest change, in float64",
            header=["model", "meant to be causal", "largest change", "verdict"],
            rows=[
                [
                    row.label,
                    "yes" if row.causal else "no",
                    f"{row.largest_change:.1e}",
                    _causality_verdict(row.causal, row.largest_change),
                ]
                for row in result.causality
            ],
            align=["left", "left", "right", "left"],
        ),
        Table(
            caption="Extremes and determinism",
            header=["check", "measured", "passed"],
            rows=[
                [check.name, error_count(check.measured), "yes" if check.passed else "NO"]
                for check in (*result.extremes, *result.determinism)
            ],
        ),
    ]
    if failed:
        blocks.append(Note(text=f"Failed: {'; '.join(failed)}.", grave=True))
    return Section(title="Numerical stability", blocks=blocks)


def error_count(measured: float | None) -> str:
    """A number of wrong values."""
    return "not a number" if measured is None else f"{measured:,.0f}"


def worst(points: list[AccuracyPoint]) -> float | None:
    """Largest error of values and gradients; None if one is not finite."""
    errors = [found for point in points for found in (point.value_error, point.gradient_error)]
    finite = [found for found in errors if found is not None]
    return max(finite) if len(finite) == len(errors) else None


def _causality_verdict(causal: bool, change: float) -> str:
    if not causal:
        return "reads its targets, as it must" if change > 0 else "unexpectedly causal"
    return "causal" if change <= 1e-10 else "LEAKS"


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
    return max(finite) if len(finite) == len(errors) else None


def _plot(result: StabilityResult) -> Plot:
    groups = _groups(result)
    series = sorted({(form, length) for form, length, _ in groups})
    with drawing(height=2.4) as canvas:
        (axes,) = canvas.axes
        for (form, length), colour in zip(series, COLOURS * len(series), strict=False):
            etas = sorted(
                eta for known_form, known_length, eta in groups if (known_form, known_length) == (form, length)
            )
            errors = [worst(groups[form, length, eta]) for eta in etas]
            axes.plot(
                [eta for eta, found in zip(etas, errors, strict=True) if found is not None],
                [found for found in errors if found is not None],
                marker="o" if form == "causal" else "s",
                markersize=4,
                color=colour,
                label=f"{form}, N = {length:,}",
            )
        axes.axhline(2**-24, color="#666666", linestyle=":", linewidth=1, label="rounding of float32")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("eta, the distance of the energy from the real axis")
        axes.set_ylabel("largest relative error")
        axes.legend(fontsize=7.5)
    return Plot(
        caption="Largest error of values and gradients over eta",
        alternative="Errors rise as eta falls; the table above has the figures",
        svg=canvas.svg,
    )
