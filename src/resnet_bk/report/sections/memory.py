"""Memory of a training step."""

from resnet_bk.report.blocks import Block, Note, Paragraph, Plot, Section, Table
from resnet_bk.report.figures import COLOURS, drawing, grouped_bars
from resnet_bk.report.wording import listing, megabytes
from resnet_bk.schema import MemoryResult, ModelMemory, Report

MOMENTS = {
    "after_load": "after load: weights and batch",
    "optimizer": "the optimizer's state",
    "after_forward": "live after forward",
    "peak_forward": "most during forward",
    "peak_backward": "most during backward",
    "peak_step": "most during the step",
}
BARS = {
    "after_load": "after\nload",
    "optimizer": "optimizer",
    "after_forward": "after\nforward",
    "peak_forward": "peak\nforward",
    "peak_backward": "peak\nbackward",
    "peak_step": "peak\nstep",
    "predicted_peak": "planner's\npeak",
}
# Bytes of a step. A counter or a scalar that a framework keeps is no leak; what a model leaks is tensors.
LEAK = 1024
# A share of the peak: small tensors of a few bytes each are not all foreseen.
FORESEEN = 0.001


def build(report: Report, result: MemoryResult) -> Section:
    """Bytes at each moment, how far off the planner was, and what leaks."""
    labels = report.labels
    blocks: list[Block] = [
        Paragraph(
            text=f"Counted: {result.counter}. Each model has a process of its own. The step told is a second one, when "
            "the optimizer's state exists. A MB is 10^6 bytes. The prediction is what the planner says of the step "
            "without running it."
        ),
        _table(result, labels),
        Paragraph(text=_in_words(report, result)),
        _plot(result, labels),
        *_grave(report, result),
        Note(
            text="What the process held is its most resident memory, beyond what it had before the model: the "
            "libraries and compiled kernels that a model loads at its first step, freed memory that the system's "
            "allocator keeps, and what watching takes are in it. Temporaries inside an operator are not seen on a CPU."
        ),
    ]
    return Section(title="Memory", blocks=blocks)


def _table(result: MemoryResult, labels: dict[str, str]) -> Table:
    models = result.models
    rows = [[meaning, *(megabytes(getattr(model, name)) for model in models)] for name, meaning in MOMENTS.items()]
    rows.append(["the planner's prediction of that", *(_or_none(model.predicted_peak) for model in models)])
    rows.append(["its error", *(_error(model.predicted_peak, model.peak_step) for model in models)])
    if any(model.reserved is not None for model in models):
        rows.append(["reserved by the allocator", *(_or_none(model.reserved) for model in models)])
        rows.append(["the planner's prediction of that", *(_or_none(model.predicted_reserved) for model in models)])
        rows.append(["its error", *(_error(model.predicted_reserved, model.reserved) for model in models)])
    rows.append(["most that the process held", *(megabytes(model.process) for model in models)])
    rows.append(["left behind by each further step", *(megabytes(model.grown_per_step) for model in models)])
    return Table(
        caption="MB of one training step",
        header=["", *(labels[model.contestant] for model in models)],
        rows=rows,
    )


def _in_words(report: Report, result: MemoryResult) -> str:
    sentences = []
    if result.ratio is not None:
        sentences.append(
            f"At its peak {report.baseline.label} holds {result.ratio:.2f} times what {report.ours.label} holds."
        )
    for model in result.models:
        label = report.labels[model.contestant]
        if model.parts:
            told = listing([f"{megabytes(part.num_bytes)} MB of {part.kind}" for part in model.parts])
            sentences.append(f"By the planner the peak of {label} is {told}.")
        elif model.predicted_peak is None:
            sentences.append(f"The planner could not trace {label}.")
    return " ".join(sentences)


def _grave(report: Report, result: MemoryResult) -> list[Block]:
    labels = report.labels
    blocks: list[Block] = []
    if leaking := [model for model in result.models if model.grown_per_step > LEAK]:
        told = listing([f"{labels[model.contestant]} {model.grown_per_step / 1e6:,.3g} MB" for model in leaking])
        text = f"More is left behind with every step, by {told}. That is a leak: the figures depend on the step."
        blocks.append(Note(text=text, grave=True))
    if short := [labels[model.contestant] for model in result.models if _promised_less(model)]:
        text = f"The planner promised less than {listing(short)} needed. That is a defect of the planner."
        blocks.append(Note(text=text, grave=True))
    if failures := report.failures_of("memory"):
        told = "; ".join(
            f"{_label(labels, name)} ({status.failure.kind}: {status.failure.message})"
            for name, status in failures.items()
            if status.failure
        )
        blocks.append(Note(text=f"Not measured: {told}.", grave=True))
    return blocks


def _promised_less(model: ModelMemory) -> bool:
    # What leaks is no part of a step that could be foreseen.
    foreseeable = (1 - FORESEEN) * model.peak_step - 2 * max(0.0, model.grown_per_step)
    return model.predicted_peak is not None and model.predicted_peak < foreseeable


def _label(labels: dict[str, str], cell: str) -> str:
    key = cell.partition("/")[2]
    return labels.get(key, key)


def _or_none(num_bytes: int | None) -> str:
    return "none" if num_bytes is None else megabytes(num_bytes)


def _error(predicted: int | None, measured: int | None) -> str:
    return "" if predicted is None or not measured else f"{(predicted - measured) / measured:+.1%}"


def _plot(result: MemoryResult, labels: dict[str, str]) -> Plot:
    series = {labels[model.contestant]: [(getattr(model, name) or 0) / 1e6 for name in BARS] for model in result.models}
    with drawing(height=2.3) as canvas:
        (axes,) = canvas.axes
        grouped_bars(axes, list(BARS.values()), series, [COLOURS[model.contestant] for model in result.models])
        axes.set_ylabel("MB")
        axes.tick_params(axis="x", labelsize=8)
        canvas.legend_above()
    told = "; ".join(f"{label}: {', '.join(f'{value:.0f}' for value in values)}" for label, values in series.items())
    return Plot(caption="Memory through one step", alternative=f"Bars of MB. {told}", svg=canvas.svg)
