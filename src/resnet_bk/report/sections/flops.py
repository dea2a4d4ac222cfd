"""FLOPs of a training step."""

from resnet_bk.report.blocks import Block, Note, Paragraph, Plot, Section, Table
from resnet_bk.report.figures import BASELINE, OURS, THIRD, drawing
from resnet_bk.report.wording import quantity
from resnet_bk.schema import FlopsResult, ModelFlops, Report


def build(report: Report, result: FlopsResult) -> Section:
    """Counts and components of both models."""
    labels = {contestant.key: contestant.label for contestant in report.contestants}
    work = report.workload
    blocks: list[Block] = [
        Paragraph(
            text="A FLOP is one addition or multiplication, so a multiply-add is two. The operators count while one "
            f"training step of {work.batch_size} sequences of {work.sequence_length} tokens runs: matrix products by "
            "their shapes, the chains by their own formula (complex arithmetic in real operations), the carry as the "
            "matrix products of its chunks, causal attention as the N (N + 1) / 2 pairs that it needs, its backward "
            "with the recomputation that fused kernels do. AdamW and clipping are 16 operations a parameter, by "
            "formula."
        ),
        _totals(result, labels),
        _plot(result, labels),
        _components(result, labels),
    ]
    for model in result.models:
        counted, formula = model.forward + model.backward, model.formula_forward + model.formula_backward
        if counted != formula:
            blocks.append(
                Note(
                    text=f"{labels[model.contestant]}: counted {counted:,} and by formula {formula:,} FLOPs differ by "
                    f"{abs(counted - formula) / formula:.1%}. The device ran other operators than the formula assumes.",
                    grave=True,
                )
            )
    names = sorted({name.removeprefix("aten.") for model in result.models for name in model.counted_as_zero})
    blocks.append(
        Note(
            text="Not counted, because torch has no formula for them: elementwise work, norms, softmax, sums, sorts, "
            f"gathers and copies. These operators ran: {', '.join(names)}."
        )
    )
    return Section(title="Floating-point operations", blocks=blocks)


def _totals(result: FlopsResult, labels: dict[str, str]) -> Table:
    rows = [
        [
            labels[model.contestant],
            *(quantity(value) for value in (model.forward, model.backward, model.optimizer, model.step)),
            quantity(model.forward_per_token),
            "the same" if _agrees(model) else "differs",
        ]
        for model in result.models
    ]
    rows.append(["Transformer / ResNet-BK", "", "", "", f"{result.ratio:.2f}", "", ""])
    return Table(
        caption="FLOPs of one training step, counted",
        header=["", "forward", "backward", "optimizer", "step", "forward a token", "by formula"],
        rows=rows,
    )


def _agrees(model: ModelFlops) -> bool:
    return (model.forward, model.backward) == (model.formula_forward, model.formula_backward)


def _components(result: FlopsResult, labels: dict[str, str]) -> Table:
    rows = []
    for model in result.models:
        total = model.formula_forward + model.formula_backward
        for part in model.components:
            share = (part.forward + part.backward) / total
            rows.append(
                [
                    labels[model.contestant],
                    part.component,
                    quantity(part.forward),
                    quantity(part.backward),
                    f"{share:.1%}",
                ]
            )
    return Table(
        caption="Where they go, by formula",
        header=["model", "component", "forward", "backward", "share"],
        rows=rows,
        align=["left", "left", "right", "right", "right"],
    )


def _plot(result: FlopsResult, labels: dict[str, str]) -> Plot:
    with drawing(height=1.7) as canvas:
        (axes,) = canvas.axes
        names = [labels[model.contestant] for model in result.models]
        left = [0.0] * len(names)
        for phase, colour in (("forward", OURS), ("backward", BASELINE), ("optimizer", THIRD)):
            values = [getattr(model, phase) / 1e9 for model in result.models]
            axes.barh(names, values, left=left, color=colour, label=phase, height=0.6)
            left = [start + value for start, value in zip(left, values, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel("GFLOP a training step")
        axes.grid(visible=False, axis="y")
        axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    totals = "; ".join(f"{labels[model.contestant]} {quantity(model.step)}FLOP" for model in result.models)
    return Plot(caption="FLOPs of one training step", alternative=f"Stacked bars: {totals}", svg=canvas.svg)
