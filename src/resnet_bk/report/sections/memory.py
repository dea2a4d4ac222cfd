"""Memory of a training step."""

from resnet_bk.report.blocks import Block, Note, Paragraph, Plot, Section, Table
from resnet_bk.report.figures import COLOURS, drawing, grouped_bars
from resnet_bk.report.wording import megabytes
from resnet_bk.schema import MemoryResult, Report

MOMENTS = {
    "parameters": "weights",
    "optimizer": "AdamW's moments",
    "after_forward": "live after forward",
    "peak_forward": "most during forward",
    "peak_backward": "most during backward",
    "peak_step": "most during the step",
}


def build(report: Report, result: MemoryResult) -> Section:
    """Bytes at each moment, and how far off the planner was."""
    labels = {contestant.key: contestant.label for contestant in report.contestants}
    rows = [
        [meaning, *(megabytes(getattr(model, name)) for model in result.models)] for name, meaning in MOMENTS.items()
    ]
    rows.append(["the planner's prediction", *(megabytes(model.predicted_peak) for model in result.models)])
    errors = [(model.predicted_peak - model.peak_step) / model.peak_step for model in result.models]
    rows.append(["its error", *(f"{error:+.1%}" for error in errors)])
    blocks: list[Block] = [
        Paragraph(
            text=f"Counted: {result.counter}. The step measured is a second one, when AdamW's moments exist. A MB is "
            "10^6 bytes. The prediction is what the planner says before anything runs."
        ),
        Table(
            caption="MB of one training step",
            header=["", *(labels[model.contestant] for model in result.models)],
            rows=rows,
        ),
        Paragraph(
            text=f"At its peak the Transformer holds {result.ratio:.2f} times what ResNet-BK holds. "
            + " ".join(
                f"The largest part of {labels[model.contestant]}'s need is {model.largest_part}, "
                f"{megabytes(model.largest_part_bytes)} MB by the planner."
                for model in result.models
            )
        ),
        _plot(result, labels),
    ]
    if any(error < 0 for error in errors):
        blocks.append(
            Note(text="The planner promised less than was needed. That is a defect of the planner.", grave=True)
        )
    blocks.append(
        Note(
            text=f"The whole process (Python, torch, the data, freed memory that it keeps) held "
            f"{megabytes(result.process)} MB when this section ended. Temporaries inside an operator are not seen on a "
            "CPU."
        )
    )
    return Section(title="Memory", blocks=blocks)


def _plot(result: MemoryResult, labels: dict[str, str]) -> Plot:
    names = ["parameters", "optimizer", "after_forward", "peak_forward", "peak_backward", "predicted_peak"]
    groups = ["weights", "moments", "after\nforward", "peak\nforward", "peak\nbackward", "planner's\npeak"]
    series = {labels[model.contestant]: [getattr(model, name) / 1e6 for name in names] for model in result.models}
    with drawing(height=2.3) as canvas:
        (axes,) = canvas.axes
        grouped_bars(axes, groups, series, [COLOURS[model.contestant] for model in result.models])
        axes.set_ylabel("MB")
        axes.legend()
    told = "; ".join(f"{label}: {', '.join(f'{value:.0f}' for value in values)}" for label, values in series.items())
    return Plot(caption="Memory through one step", alternative=f"Bars of MB. {told}", svg=canvas.svg)
