"""Time and memory over the length of a sequence."""

from matplotlib.ticker import FuncFormatter, NullFormatter

from resnet_bk.report.blocks import Block, Note, Paragraph, Plot, Section, Table
from resnet_bk.report.figures import COLOURS, MARKERS, drawing, length_ticks
from resnet_bk.report.wording import interval, megabytes, milliseconds
from resnet_bk.schema import Report, ScalingPoint, ScalingResult


def build(report: Report, result: ScalingResult) -> Section:
    """Figures at each length, exponents, crossover."""
    labels = {contestant.key: contestant.label for contestant in report.contestants}
    blocks: list[Block] = [
        Paragraph(
            text="Forward and backward of one sequence (batch 1) of random tokens, all models without a position "
            "table so that nothing bounds N. The exponent p of time ~ N^p is a least-squares slope over the longest "
            "lengths measured; its interval is the noise of the samples, not the error of assuming a power law."
        ),
        _table(result, labels),
        _plot(result, labels),
        Table(
            caption="Exponents",
            header=["model", "figure", "from N =", "exponent"],
            rows=[
                [labels[row.contestant], row.quantity, f"{row.from_length:,}", interval(row.exponent)]
                for row in result.exponents
            ],
            align=["left", "left", "right", "right"],
        ),
        Paragraph(text=crossover_sentence(report, result)),
        Note(
            text="At these lengths the models spend much of their time in parts that are linear in N and the same in "
            "all: experts and the vocabulary's head. An exponent below 1 means that fixed costs still show; "
            "attention's N^2 shows only where sequences are long against the model's width."
        ),
    ]
    return Section(title="Scaling with sequence length", blocks=blocks)


def crossover_sentence(report: Report, result: ScalingResult) -> str:
    """From which length on ours is faster, in words."""
    ours, baseline = report.ours.label, report.baseline.label
    longest = max(point.sequence_length for point in result.points)
    if result.crossover is None:
        return (
            f"Up to N = {longest:,}, one sequence at a time, {baseline} is faster: there is no crossover in the range."
        )
    shortest = min(point.sequence_length for point in result.points)
    if result.crossover == shortest:
        return f"{ours} is faster at every length from {shortest:,} to {longest:,}, one sequence at a time."
    return f"{ours} is faster from N = {result.crossover:,} on, {baseline} below that (one sequence at a time)."


def _table(result: ScalingResult, labels: dict[str, str]) -> Table:
    by_place = {(point.contestant, point.sequence_length): point for point in result.points}
    rows = [
        [
            f"{length:,}",
            *(_time(by_place.get((key, length))) for key in labels),
            *(_memory(by_place.get((key, length))) for key in labels),
        ]
        for length in sorted({point.sequence_length for point in result.points})
    ]
    header = ["N", *(f"{label}, ms" for label in labels.values()), *(f"{label}, MB" for label in labels.values())]
    return Table(caption="Median time of forward and backward, and peak memory of a step", header=header, rows=rows)


def _time(point: ScalingPoint | None) -> str:
    if point is None:
        return "not tried"
    return point.failure or ("" if point.seconds is None else milliseconds(point.seconds.median))


def _memory(point: ScalingPoint | None) -> str:
    if point is None:
        return "not tried"
    return "" if point.peak_memory is None else megabytes(point.peak_memory)


def _plot(result: ScalingResult, labels: dict[str, str]) -> Plot:
    with drawing(columns=2, height=2.8) as canvas:
        left, right = canvas.axes
        for key, label in labels.items():
            points = [point for point in result.points if point.contestant == key and point.seconds is not None]
            lengths = [point.sequence_length for point in points]
            style = {"color": COLOURS[key], "marker": MARKERS[key], "markersize": 4, "label": label}
            times = [1e3 * point.seconds.median for point in points if point.seconds]
            left.plot(lengths, times, **style)  # type: ignore[arg-type]
            lows = [1e3 * point.seconds.low for point in points if point.seconds]
            highs = [1e3 * point.seconds.high for point in points if point.seconds]
            left.fill_between(lengths, lows, highs, color=COLOURS[key], alpha=0.15, linewidth=0)
            right.plot(lengths, [(point.peak_memory or 0) / 1e6 for point in points], **style)  # type: ignore[arg-type]
        for axes, quantity in ((left, "milliseconds"), (right, "MB at the peak")):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            length_ticks(axes.xaxis, sorted({point.sequence_length for point in result.points}))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("tokens in the sequence")
            axes.set_ylabel(quantity)
        left.legend()
    return Plot(
        caption="Time (left, with 95% intervals) and memory (right) over the length, logarithmic axes",
        alternative="Rising lines; the table above has the figures",
        svg=canvas.svg,
    )
