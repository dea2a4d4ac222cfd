"""What was learned from the same tokens."""

from resnet_bk.report.blocks import Block, Note, Paragraph, Plot, Section, Table
from resnet_bk.report.figures import COLOURS, GREY, MARKERS, drawing, plain_ticks
from resnet_bk.report.wording import listing
from resnet_bk.schema import Arm, ConvergenceResult, Report


def build(report: Report, result: ConvergenceResult) -> Section:
    """Final losses and curves over tokens and over time."""
    work = report.workload
    tuned = len(result.learning_rates) > 1
    rates = (
        f"Learning rates tried: {', '.join(f'{rate:g}' for rate in result.learning_rates)}; each model keeps the one "
        "with the lowest held-out loss."
        if tuned
        else "Each model has the learning rate in the table, fixed beforehand."
    )
    blocks: list[Block] = [
        Paragraph(
            text=f"Every model is trained for {result.steps:,} steps of {result.tokens_per_step:,} tokens of "
            f"{work.description}, in the same order, and evaluated on the same {result.evaluated_tokens:,} held-out "
            f"tokens ({work.tokenizer}; {work.split}). Losses are in nats per token. A model without any context, "
            "which only knows how often each of these tokens occurs, has "
            f"{result.unigram_entropy:.3f}. {rates}"
        ),
        _table(result),
        _plot(result),
    ]
    if leaking := sorted({arm.label for arm in result.arms if arm.leaks}):
        blocks.append(
            Note(
                text=f"The loss of {listing(leaking)} is a leak, not skill: in this variant every token reads the "
                "tokens to its right, its own target among them. It is shown because earlier work on this architecture "
                "trained it as a language model. It is no language model, and its loss must not be compared.",
                grave=True,
            )
        )
    if any(arm.key == "blend" for arm in result.arms):
        blocks.append(
            Note(
                text="The analytic gradient is the rule of the earlier work: it keeps only a token's own gradient and "
                "mixes in 1/G^2, which is large wherever G is small; the exact gradient is the adjoint of the whole "
                f"chain. Same model, same data{', same rates tried' if tuned else ''}."
            )
        )
    if len(result.seeds) == 1:
        blocks.append(
            Note(
                text=f"One seed ({result.seeds[0]}): differences of the size that a seed makes cannot be told from "
                "noise here. The profile standard takes three."
            )
        )
    if edge := _at_the_edge(result):
        blocks.append(
            Note(
                text=f"The best rate of {edge[0]} is the largest or the smallest that was tried: a better one may lie "
                "beyond."
                if len(edge) == 1
                else f"The best rates of {listing(edge)} are the largest or the smallest that were tried: better ones "
                "may lie beyond."
            )
        )
    blocks.append(
        Note(
            text="The learning rate is chosen on the same held-out text that the table reports, so the losses of all "
            "models are a little too good."
            if tuned
            else "No model is tuned here: each rate is one that did well in an earlier sweep at preset seed, and with "
            "others the order may be another. The profile standard tries four for each model."
        )
    )
    return Section(title="Convergence", blocks=blocks)


def final_loss(arm: Arm) -> float | None:
    """Held-out loss at the end, None if it was no number."""
    return arm.validation[-1].loss


def _at_the_edge(result: ConvergenceResult) -> list[str]:
    """Models whose best rate is not enclosed by others that were tried."""
    rates = result.learning_rates
    if len(rates) < 2:
        return []
    ends = (min(rates), max(rates))
    return [arm.label for arm in result.arms if arm.seed == result.seeds[0] and arm.learning_rate in ends]


def _table(result: ConvergenceResult) -> Table:
    rows = []
    for arm in result.arms:
        loss = final_loss(arm)
        below = "" if loss is None or arm.leaks else f"{result.unigram_entropy - loss:+.3f}"
        rows.append(
            [
                arm.label + (" (leak)" if arm.leaks else ""),
                f"{arm.parameters:,}",
                str(arm.seed),
                f"{arm.learning_rate:g}",
                "not a number" if loss is None else f"{loss:.3f}",
                below,
                f"{arm.validation[-1].seconds:.0f}",
            ]
        )
    return Table(
        caption="Held-out loss at the end, in nats per token",
        header=["model", "parameters", "seed", "rate", "loss", "below unigram", "seconds"],
        rows=rows,
    )


def _plot(result: ConvergenceResult) -> Plot:
    with drawing(columns=2, height=3.2) as canvas:
        for axes, horizontal in zip(canvas.axes, ("tokens", "seconds"), strict=True):
            for arm in result.arms:
                points = [point for point in arm.validation if point.loss is not None]
                axes.plot(
                    [getattr(point, horizontal) for point in points],
                    [point.loss for point in points if point.loss is not None],
                    color=COLOURS[arm.key],
                    marker=MARKERS[arm.key],
                    markersize=3.5,
                    linestyle="--" if arm.leaks else "-",
                    label=(arm.label + (" (leak)" if arm.leaks else "")) if arm.seed == result.seeds[0] else None,
                )
            axes.axhline(result.unigram_entropy, color=GREY, linestyle=":", linewidth=1, label="unigram entropy")
            plain_ticks(axes.xaxis)
            axes.set_xlabel("tokens trained on" if horizontal == "tokens" else "seconds of training")
        canvas.axes[0].set_ylabel("held-out loss, nats a token")
        canvas.legend_above()
    ends = "; ".join(f"{arm.label} {loss:.2f}" for arm in result.arms if (loss := final_loss(arm)) is not None)
    return Plot(
        caption="Held-out loss over tokens (left) and over time (right)",
        alternative=f"Falling curves. At the end: {ends}; unigram {result.unigram_entropy:.2f}",
        svg=canvas.svg,
    )
