"""FLOPs of a training step."""

from resnet_bk.report.blocks import Block, Note, Paragraph, Plot, Section, Table
from resnet_bk.report.figures import BASELINE, OURS, THIRD, drawing
from resnet_bk.report.wording import listing, quantity
from resnet_bk.schema import FlopsResult, ModelFlops, Report

AGREEMENT = 0.001  # a difference of count and formula that is a mistake in one of them


def build(report: Report, result: FlopsResult) -> Section:
    """Counts, components, and what the formulas say."""
    work, labels = report.workload, report.labels
    blocks: list[Block] = [
        Paragraph(
            text="A FLOP is one addition or multiplication, so a multiply-add is two. The operators count while one "
            f"training step of {work.batch_size} sequences of {work.sequence_length} tokens runs: matrix products by "
            "their shapes, the chains by their own formula (complex arithmetic in real operations), the carry as the "
            "matrix products of its chunks, causal attention as the N (N + 1) / 2 pairs that it needs, its backward "
            "with the recomputation that fused kernels do. AdamW and clipping are 16 operations a parameter, by "
            "formula. An operator that has no formula, and is not on a reviewed list of operators without products, "
            "stops the count."
        ),
        _totals(report, result),
        _plot(result, labels),
    ]
    if any(model.components for model in result.models):
        blocks.append(_components(result, labels))
    blocks += [*_disagreements(result, labels), *_seed_formulas(result, labels)]
    names = sorted({name.removeprefix("aten.") for model in result.models for name in model.counted_as_zero})
    if names:
        blocks.append(
            Note(
                text="Counted as nothing, by the reviewed list: elementwise work, norms, softmax, sums, sorts, gathers "
                f"and copies. These operators ran: {', '.join(names)}."
            )
        )
    return Section(title="Floating-point operations", blocks=[*blocks, *_failures(report)])


def _totals(report: Report, result: FlopsResult) -> Table:
    rows = [
        [
            report.labels[model.contestant],
            *(quantity(value) for value in (model.forward, model.backward, model.optimizer, model.step)),
            quantity(model.forward_per_token),
            quantity(model.step_per_token),
            _beside_formula(model),
        ]
        for model in result.models
    ]
    if result.forward_ratio is not None and result.ratio is not None:
        ratio = f"{report.baseline.label} / {report.ours.label}"
        rows.append([ratio, f"{result.forward_ratio:.2f}", "", "", f"{result.ratio:.2f}", "", "", ""])
    return Table(
        caption="FLOPs of one training step, counted",
        header=["", "forward", "backward", "optimizer", "step", "forward a token", "step a token", "by formula"],
        rows=rows,
    )


def _beside_formula(model: ModelFlops) -> str:
    difference = _difference(model)
    return "none" if difference is None else "the same" if difference == 0 else f"{difference:+.2%}"


def _difference(model: ModelFlops) -> float | None:
    """Of the formula to the count, of the pass where it is larger; None without a formula."""
    if model.formula_forward is None or model.formula_backward is None:
        return None
    passes = ((model.formula_forward, model.forward), (model.formula_backward, model.backward))
    return max((formula / counted - 1 for formula, counted in passes), key=abs)


def _disagreements(result: FlopsResult, labels: dict[str, str]) -> list[Block]:
    blocks: list[Block] = []
    for model in result.models:
        difference = _difference(model)
        if difference is not None and abs(difference) > AGREEMENT:
            blocks.append(
                Note(
                    text=f"{labels[model.contestant]}: count and formula differ. Forward: {model.forward:,} counted, "
                    f"{model.formula_forward:,} by formula; backward: {model.backward:,} and "
                    f"{model.formula_backward:,}. The device ran other operators than the formula assumes.",
                    grave=True,
                )
            )
    return blocks


def _seed_formulas(result: FlopsResult, labels: dict[str, str]) -> list[Block]:
    """What the earlier document would have said, and why that is another number."""
    blocks: list[Block] = []
    for model in result.models:
        if model.seed_forward is None:
            continue
        head = sum(part.forward for part in model.components if part.component == "head")
        blocks.append(
            Note(
                text="For comparison only: the document that this project began with has formulas of its own. By them "
                f"a forward pass of {labels[model.contestant]} is {quantity(model.seed_forward)}FLOP instead of "
                f"{quantity(model.forward)}FLOP. They count a multiply-add once and not twice, the recursions of one "
                "row and not of the batch, and experts of twice the hidden size whatever their width; they add ten "
                "operations for each token and expert of the routing, and leave out the potential's projection and "
                f"the head ({quantity(head)}FLOP here, with the gradients that are computed in the forward pass)."
            )
        )
    return blocks


def _failures(report: Report) -> list[Block]:
    told = [
        f"{report.labels.get(name.partition('/')[2], name)} ({status.failure.kind}: {status.failure.message})"
        for name, status in report.failures_of("flops").items()
        if status.failure
    ]
    return [Note(text=f"Not counted: {'; '.join(told)}.", grave=True)] if told else []


def _components(result: FlopsResult, labels: dict[str, str]) -> Table:
    rows = []
    for model in result.models:
        total = sum(part.forward + part.backward for part in model.components)
        for part in model.components:
            rows.append(
                [
                    labels[model.contestant],
                    part.component,
                    quantity(part.forward),
                    quantity(part.backward),
                    f"{(part.forward + part.backward) / total:.1%}",
                ]
            )
    return Table(
        caption="Where they go, by formula",
        header=["model", "component", "forward", "backward", "share"],
        rows=rows,
        align=["left", "left", "right", "right", "right"],
    )


def _plot(result: FlopsResult, labels: dict[str, str]) -> Plot:
    with drawing(height=1.9) as canvas:
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
        canvas.legend_above()
    totals = listing([f"{labels[model.contestant]} {quantity(model.step)}FLOP" for model in result.models])
    return Plot(caption="FLOPs of one training step", alternative=f"Stacked bars: {totals}", svg=canvas.svg)
