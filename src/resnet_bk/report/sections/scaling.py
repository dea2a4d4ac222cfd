"""Time and memory over the length of a sequence, the batch, and the sizes of the model."""

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from resnet_bk.report.blocks import Block, Note, Paragraph, Plot, Section, Table
from resnet_bk.report.figures import COLOURS, MARKERS, drawing, length_ticks
from resnet_bk.report.wording import interval, listing, megabytes, milliseconds
from resnet_bk.schema import AxisScaling, Quantity, Report, ScalingPoint, ScalingResult, Summary

LETTERS = {
    "sequence_length": "N",
    "batch_size": "batch",
    "hidden_size": "width",
    "num_layers": "layers",
    "num_experts": "experts",
}
TITLES = {
    "sequence_length": "Length of the sequence",
    "batch_size": "Size of the batch",
    "hidden_size": "Width",
    "num_layers": "Depth",
    "num_experts": "Number of experts",
}
UNITS = {
    "sequence_length": "tokens in the sequence",
    "batch_size": "sequences in the batch",
    "hidden_size": "hidden size",
    "num_layers": "layers",
    "num_experts": "experts in a layer",
}
PHRASES = {
    "sequence_length": "tokens a sequence",
    "batch_size": "sequences a batch",
    "hidden_size": "units of width",
    "num_layers": "layers",
    "num_experts": "experts a layer",
}
EXPLAINED = {
    "sequence_length": "No model of this library has a position table here, so that nothing bounds N.",
    "hidden_size": "Heads and experts grow with the width, so that the width of a head stays.",
    "num_experts": "A token uses one expert, however many there are: time that grows with their number is overhead.",
}
ALIKE = 0.01
HEADROOM, NARROW = 0.2, 8.0
NOT_TRIED = "not tried"


def build(report: Report, result: ScalingResult) -> Section:
    """For each axis figures, a plot, exponents, and where ours becomes faster."""
    blocks: list[Block] = [
        Paragraph(
            text="Forward and backward on random tokens, the models in turns. Times are medians of the rounds of one "
            "process, with the rounds' 95% interval, which for a few of them is from the lowest to the highest; from "
            "one process to another a time may differ by more, as the same model on several axes shows. Memory is the "
            "peak of a whole step. The exponent p of figure ~ value^p is a least-squares slope over the largest values "
            "measured, with Student's interval of what the line leaves over. A model that failed at a value was not "
            "asked for larger ones."
        )
    ]
    for axis in result.axes:
        blocks += _axis(report, axis)
    blocks.append(
        Note(
            text="The models spend much of their time in parts that are the same in all: experts and the vocabulary's "
            "head. An exponent below 1 means that fixed costs still show; attention's N^2 shows only where sequences "
            "are long against the model's width."
        )
    )
    return Section(title="Scaling", blocks=blocks)


def crossover_sentence(report: Report, axis_scaling: AxisScaling) -> str:
    """From which value of an axis on ours is faster, in words and with the times there."""
    ours, baseline, name = report.ours.label, report.baseline.label, PHRASES[axis_scaling.axis]
    common = _common_values(report, axis_scaling)
    if not common:
        return f"Over {name} {ours} and {baseline} were not both measured."
    crossover = axis_scaling.crossover
    if crossover is None:
        return (
            f"Up to {common[-1]:,} {name} there is no point from which on {ours} is faster: "
            f"{_who_is_faster_at(report, axis_scaling, common[-1])}."
        )
    if crossover not in common:
        return f"{ours} is not faster up to {common[-1]:,} {name}; from {crossover:,} on {baseline} has no figure."
    largest = max(point.value for point in axis_scaling.points)
    where = f"from {crossover:,} {name} on, and at no smaller number that was tried"
    if crossover == common[0]:
        where = f"at every measured value from {crossover:,} to {largest:,} {name}"
    return f"{ours} is faster than {baseline} {where}: {_times_at(report, axis_scaling, crossover)}."


def _axis(report: Report, axis: AxisScaling) -> list[Block]:
    labels = report.labels
    fixed = listing([f"{name.replace('_', ' ')} {value:,}" for name, value in axis.fixed.items()])
    sentences = [
        f"{TITLES[axis.axis]}. All else is fixed: {fixed}.",
        EXPLAINED.get(axis.axis, ""),
        _parameters_in_words(axis),
    ]
    blocks: list[Block] = [Paragraph(text=" ".join(filter(None, sentences))), _table(axis, labels)]
    if any(point.seconds is not None for point in axis.points):
        blocks.append(_plot(axis, labels))
    if axis.exponents:
        blocks.append(_exponents(axis, labels))
    blocks.append(Paragraph(text=crossover_sentence(report, axis)))
    if failed := [point for point in axis.points if point.failure]:
        told = "; ".join(
            f"{labels[point.contestant]} at {LETTERS[axis.axis]} = {point.value:,}: {point.failure.kind} "
            f"({point.failure.message})"
            for point in failed
            if point.failure
        )
        blocks.append(Note(text=f"No figure: {told}."))
    return blocks


def _common_values(report: Report, axis: AxisScaling) -> list[int]:
    """Where both have a time."""
    keys = report.ours.key, report.baseline.key
    measured = [{point.value for point in axis.points if point.contestant == key and point.seconds} for key in keys]
    return sorted(measured[0] & measured[1])


def _who_is_faster_at(report: Report, axis: AxisScaling, value: int) -> str:
    ours, theirs = _both_at(report, axis, value)
    told = _times_at(report, axis, value)
    if ours.low > theirs.high:
        return f"{report.baseline.label} is faster there, {told}"
    if ours.high < theirs.low:
        return f"{report.ours.label} is faster there by too little to count, {told}"
    return f"the difference is too small or too noisy there, {told}"


def _times_at(report: Report, axis: AxisScaling, value: int) -> str:
    ours, theirs = _both_at(report, axis, value)
    return f"{_with_interval(ours)} against {_with_interval(theirs)} at {value:,}"


def _with_interval(seconds: Summary) -> str:
    median, low, high = (milliseconds(figure) for figure in (seconds.median, seconds.low, seconds.high))
    return f"{median} ms ({low} to {high})"


def _both_at(report: Report, axis: AxisScaling, value: int) -> tuple[Summary, Summary]:
    times = {point.contestant: point.seconds for point in axis.points if point.value == value}
    ours, theirs = times[report.ours.key], times[report.baseline.key]
    assert ours is not None and theirs is not None
    return ours, theirs


def _parameters_in_words(axis: AxisScaling) -> str:
    """Whether the models have as many at each value."""
    by_value: dict[int, list[int]] = {}
    for point in axis.points:
        if point.parameters is not None:
            by_value.setdefault(point.value, []).append(point.parameters)
    compared = [found for found in by_value.values() if len(found) > 1]
    if not compared:
        return ""
    largest = max(max(found) / min(found) - 1 for found in compared)
    if largest <= ALIKE:
        return "At each value the models have the same number of parameters within 1%."
    return f"The models' numbers of parameters differ, by up to {largest:.0%} at the same value."


def _table(axis: AxisScaling, labels: dict[str, str]) -> Table:
    keys = [key for key in labels if any(point.contestant == key for point in axis.points)]
    by_place = {(point.contestant, point.value): point for point in axis.points}
    rows = [
        [
            f"{value:,}",
            *(_time(by_place.get((key, value))) for key in keys),
            *(_memory(by_place.get((key, value))) for key in keys),
        ]
        for value in _values(axis)
    ]
    header = [
        LETTERS[axis.axis],
        *(f"{labels[key]}, ms" for key in keys),
        *(f"{labels[key]}, MB" for key in keys),
    ]
    return Table(caption="Median time of forward and backward, and peak memory of a step", header=header, rows=rows)


def _values(axis: AxisScaling) -> list[int]:
    return sorted({point.value for point in axis.points})


def _time(point: ScalingPoint | None) -> str:
    if point is None:
        return NOT_TRIED
    if point.failure is not None:
        return point.failure.kind
    return "" if point.seconds is None else milliseconds(point.seconds.median)


def _memory(point: ScalingPoint | None) -> str:
    if point is None:
        return NOT_TRIED
    return "" if point.peak_memory is None else megabytes(point.peak_memory)


def _exponents(axis: AxisScaling, labels: dict[str, str]) -> Table:
    rows = {(row.contestant, row.quantity): row for row in axis.exponents}
    quantities: tuple[Quantity, ...] = ("time", "memory")

    def told(key: str, quantity: Quantity) -> str:
        row = rows.get((key, quantity))
        return "" if row is None else interval(row.exponent)

    return Table(
        caption=f"Exponents over {UNITS[axis.axis]}",
        header=["model", f"from {LETTERS[axis.axis]} =", *quantities],
        rows=[
            [
                labels[row.contestant],
                f"{row.from_value:,}",
                *(told(row.contestant, quantity) for quantity in quantities),
            ]
            for row in axis.exponents
            if row.quantity == "time"
        ],
        align=["left", "right", "right", "right"],
    )


def _plot(axis: AxisScaling, labels: dict[str, str]) -> Plot:
    values = _values(axis)
    with drawing(columns=2, height=2.8) as canvas:
        left, right = canvas.axes
        for key, label in labels.items():
            points = [point for point in axis.points if point.contestant == key and point.seconds is not None]
            if points:
                _lines(left, right, key, label, points)
        for axes, quantity in ((left, "milliseconds"), (right, "MB at the peak")):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xlim(values[0] / 1.2, values[-1] * 1.2)
            length_ticks(axes.xaxis, values)
            axes.set_xlabel(UNITS[axis.axis])
            axes.set_ylabel(quantity)
            _heights(axes, headroom=HEADROOM if any(point.failure for point in axis.points) else 0.0)
            _failures(axes, axis)
        canvas.legend_above()
    return Plot(
        caption=f"Time (left, with the rounds' intervals) and memory (right) over {UNITS[axis.axis]}, logarithmic axes"
        + ("; a cross at the upper edge is a failure" if any(point.failure for point in axis.points) else ""),
        alternative="Lines over the axis; the table above has the figures",
        svg=canvas.svg,
    )


def _heights(axes: Axes, headroom: float) -> None:
    """Ticks of the upright axis, and room above the curves, as a share of its height."""
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top * (top / bottom) ** headroom)
    if top / bottom < NARROW:  # powers of two are too far apart
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def _lines(left: Axes, right: Axes, key: str, label: str, points: list[ScalingPoint]) -> None:
    values = [point.value for point in points]
    style = {"color": COLOURS[key], "marker": MARKERS[key], "markersize": 4, "label": label}
    seconds = [point.seconds for point in points if point.seconds]
    left.plot(values, [1e3 * found.median for found in seconds], **style)  # type: ignore[arg-type]
    lows, highs = [1e3 * found.low for found in seconds], [1e3 * found.high for found in seconds]
    left.fill_between(values, lows, highs, color=COLOURS[key], alpha=0.15, linewidth=0)
    right.plot(values, [(point.peak_memory or 0) / 1e6 for point in points], **style)  # type: ignore[arg-type]


def _failures(axes: Axes, axis: AxisScaling) -> None:
    """A cross at the upper edge, one beneath the other where several failed at the same value."""
    at_value: dict[int, int] = {}
    for point in axis.points:
        if point.failure is None:
            continue
        rank = at_value[point.value] = at_value.get(point.value, -1) + 1
        height = 0.96 - 0.09 * rank
        style = {"color": COLOURS[point.contestant], "clip_on": False, "transform": axes.get_xaxis_transform()}
        axes.plot([point.value], [height], marker="X", markersize=7, linestyle="none", **style)  # type: ignore[arg-type]
        axes.annotate(
            f"{point.failure.kind} ",
            (point.value, height),
            xycoords=axes.get_xaxis_transform(),
            ha="right",
            va="center",
            fontsize=7,
            color=COLOURS[point.contestant],
            xytext=(-5, 0),
            textcoords="offset points",
        )
