"""What was learned from the same tokens."""

from collections.abc import Callable
from math import sqrt
from statistics import fmean, stdev
from typing import TypeVar

from resnet_bk.report.blocks import Block, Note, Paragraph, Plot, Section, Table
from resnet_bk.report.figures import COLOURS, GREY, MARKERS, drawing, plain_ticks
from resnet_bk.report.wording import listing, signed_interval
from resnet_bk.schema import Arm, Comparison, ConvergenceResult, CurvePoint, Report, SweepPoint

BAND = 0.18
LEGIBLE = 1e5
T = TypeVar("T")
Windows = tuple[int, int | None]  # their length, and how many tokens attention sees there if fewer than in training


def build(report: Report, result: ConvergenceResult) -> Section:
    """Losses, what may be said of them, curves over tokens and time, the sweep, gradients and spikes."""
    blocks: list[Block] = [_method(report, result)]
    if result.arms:
        blocks += [_table(result), *_claims(report, result), _losses_plot(result), *_windows(report, result)]
    blocks += _grave_notes(result)
    if result.arms:
        blocks += [_spikes(result), _gradients_plot(result)]
    if result.sweep:
        blocks.append(_sweep(result))
    blocks += _caveats(result)
    return Section(title="Convergence", blocks=blocks)


def final_loss(arm: Arm) -> float | None:
    """Test loss at the end, None if it was no number."""
    return arm.test_loss


def _method(report: Report, result: ConvergenceResult) -> Paragraph:
    work = report.workload
    rates = (
        f"Learning rates are chosen on {result.validation_tokens:,} validation tokens: each model is trained with "
        "several at the first seed, and the one with the lowest validation loss is kept for all seeds."
        if result.sweep
        else "Each model has the learning rate in the table, fixed beforehand."
    )
    return Paragraph(
        text=f"Every model is trained for {result.steps:,} steps of {result.tokens_per_step:,} tokens of "
        f"{work.description}; runs with the same seed see the same batches in the same order, under the same schedule "
        f"and clipping. {rates} What is reported is the loss on {result.test_tokens:,} other held-out tokens, the test "
        f"text, on which nothing was chosen ({work.tokenizer}; {work.split}; the held-out text is parted in two). "
        "Losses are in nats per token. A model without any context, which only knows how often each of the test "
        f"tokens occurs, has {result.unigram_entropy:.3f}. Seconds are those of training alone, without evaluations "
        "and without what compiles at the first step."
    )


def _table(result: ConvergenceResult) -> Table:
    rows = []
    for arm in result.arms:
        loss = final_loss(arm)
        below = "" if loss is None or arm.leaks else f"{result.unigram_entropy - loss:+.3f}"
        rows.append(
            [
                _name(arm),
                f"{arm.parameters:,}",
                str(arm.seed),
                f"{arm.learning_rate:g}",
                _told(arm.validation[-1].loss),
                _told(loss),
                below,
                f"{arm.validation[-1].seconds:,.0f}",
            ]
        )
    return Table(
        caption="Losses at the end, in nats per token",
        header=["model", "parameters", "seed", "rate", "validation", "test", "below unigram", "seconds"],
        rows=rows,
    )


def _claims(report: Report, result: ConvergenceResult) -> list[Block]:
    """Differences with what they allow to say."""
    baseline = report.baseline.label
    rows = [
        [f"{baseline} less {row.label}", *_figures(row.difference), _verdict(row.difference, row.label, baseline)]
        for row in result.differences
    ]
    if result.gradient_difference is not None:
        verdict = _verdict(result.gradient_difference, "The exact gradient", "The analytic gradient")
        rows.append(["Analytic gradient less exact gradient", *_figures(result.gradient_difference), verdict])
    if rows:
        return [
            Table(
                caption="Differences of test loss, in nats per token, with 95% intervals",
                header=["difference", "mean of the seeds", "p", "in words"],
                rows=rows,
                align=["left", "right", "right", "left"],
            ),
            Note(
                text=f"Differences are taken within each of the {len(result.seeds)} seeds, in which both models see "
                "the same batches; intervals and p are of Student's t over seeds. What is claimed holds after Holm's "
                f"correction for {_number(len(rows), 'comparison')}. So few seeds give wide intervals, and no "
                "difference seen does not mean that there is none."
            ),
        ]
    if len(result.seeds) == 1:
        return [
            Note(
                text=f"One seed ({result.seeds[0]}): differences of the size that a seed makes cannot be told from "
                "noise here, so nothing is claimed of which model learns better. The profile standard takes three "
                "seeds."
            )
        ]
    return [
        Note(
            text=f"No difference is claimed: not all {len(result.seeds)} seeds of the {baseline} and of another model "
            "have ended with a number."
        )
    ]


def _verdict(difference: Comparison, label: str, other: str) -> str:
    if not difference.claimed:
        return "no difference that these seeds can show"
    better = label if difference.value > 0 else other
    return f"{better} is better by {abs(difference.value):.3f}"


def _figures(difference: Comparison) -> list[str]:
    return [signed_interval(difference), "< 0.0001" if difference.p < 1e-4 else f"{difference.p:.4f}"]


def losses_by_window(result: ConvergenceResult, key: str) -> dict[Windows, list[float]]:
    """What a model's runs came to in each kind of windows; nothing if one has no number."""
    runs = [
        {(point.length, point.attention_window): point.loss for point in arm.by_window}
        for arm in result.arms
        if arm.key == key and not arm.leaks
    ]
    found = {windows: [run.get(windows) for run in runs] for run in runs for windows in run}
    return {
        windows: numbers
        for windows, losses in found.items()
        if len(numbers := [loss for loss in losses if loss is not None]) == len(losses)
    }


def _windows(report: Report, result: ConvergenceResult) -> list[Block]:
    """What becomes of the loss where a text is read in longer windows; nothing where no model could be."""
    labels = {arm.key: arm.label for arm in result.arms}
    found = {key: losses for key in labels if (losses := losses_by_window(result, key))}
    # Those with all of their attention first.
    columns = sorted(
        {windows for losses in found.values() for windows in losses}, key=lambda one: (one[1] or 0, one[0])
    )
    if len(columns) < 2:
        return []
    rows = [
        [labels[key], *(_mean(losses[windows]) if windows in losses else "" for windows in columns)]
        for key, losses in found.items()
    ]
    error = ", mean of the seeds ± standard error" if len(result.seeds) > 1 else ""
    return [
        Table(
            caption=f"Pieces of the test text in longer windows: loss in nats per token{error}",
            header=["model", *(_named(*windows) for windows in columns)],
            rows=rows,
        ),
        Note(
            text=f"Training's windows have {report.workload.sequence_length:,} tokens. Each column reads the same "
            "pieces of the test text once, from all over it, which are not those of the test loss above: by how much "
            "texts differ, errors over seeds do not tell. The longer the windows are, the more stands before most "
            "tokens. Where a loss rises all the same, attention meets distances that it was not trained on; in the "
            "last column it never does, as it sees the last tokens alone: that is one pass too, in time that grows as "
            "O(N). An empty place is beyond what the model takes, or it has no attention. Nothing is claimed from "
            "these figures."
        ),
    ]


def _named(length: int, attention_window: int | None) -> str:
    attention = "" if attention_window is None else f", attention to the last {attention_window:,}"
    return f"{length:,} tokens{attention}"


def _mean(losses: list[float]) -> str:
    error = f" ± {stdev(losses) / sqrt(len(losses)):.3f}" if len(losses) > 1 else ""
    return f"{fmean(losses):.3f}{error}"


def _grave_notes(result: ConvergenceResult) -> list[Block]:
    blocks: list[Block] = []
    if leaking := sorted({arm.label for arm in result.arms if arm.leaks}):
        blocks.append(
            Note(
                text=f"The loss of {listing(leaking)} is a leak, not skill: in this variant every token reads the "
                "tokens to its right, its own target among them. It is shown because earlier work on this architecture "
                "trained it as a language model. It is no language model, and its loss must not be compared. It was "
                "therefore trained once, and its rate was not tuned.",
                grave=True,
            )
        )
    diverged = sorted({f"{arm.label} (seed {arm.seed})" for arm in result.arms if final_loss(arm) is None})
    if diverged:
        blocks.append(
            Note(
                text=f"Diverged, with a loss that is not a number: {listing(diverged)}. A mean over the other seeds "
                "would be in its favour, so no difference is given.",
                grave=True,
            )
        )
    if result.failures:
        told = "; ".join(f"{name} ({failure.kind}: {failure.message})" for name, failure in result.failures.items())
        blocks.append(Note(text=f"Runs that did not end: {told}.", grave=True))
    return blocks


def _caveats(result: ConvergenceResult) -> list[Block]:
    blocks: list[Block] = []
    if any(arm.key == "blend" for arm in result.arms):
        blocks.append(
            Note(
                text="The analytic gradient is the rule of the earlier work: it keeps only a token's own gradient and "
                "mixes in 1/G^2, which is large wherever G is small; the exact gradient is the adjoint of the whole "
                f"chain. Same model, same data{', same number of rates' if result.sweep else ''}."
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
    if result.arms and not result.sweep:
        blocks.append(
            Note(
                text="No model is tuned here: each rate is one that did well in an earlier sweep at preset seed, or of "
                "a model from elsewhere a usual one, and with others the order may be another. The profile standard "
                "sweeps for each model."
            )
        )
    return blocks


def _at_the_edge(result: ConvergenceResult) -> list[str]:
    """Models whose best rate is not enclosed by others that were tried."""
    return [
        points[0].label
        for points in _by_key(result.sweep, lambda point: point.key).values()
        if len(points) > 1 and (best := _best(points)) is not None and _is_an_end(best, points)
    ]


def _is_an_end(best: SweepPoint, points: list[SweepPoint]) -> bool:
    rates = [point.learning_rate for point in points]
    return best.learning_rate in (min(rates), max(rates))


def _best(points: list[SweepPoint]) -> SweepPoint | None:
    finite = [(point.loss, point.learning_rate, point) for point in points if point.loss is not None]
    return min(finite, key=lambda entry: entry[:2])[2] if finite else None


def _sweep(result: ConvergenceResult) -> Table:
    """A row for each model: its rates, and which of them was kept."""
    groups = _by_key(result.sweep, lambda point: point.key)
    width = max(len(points) for points in groups.values())
    rows = []
    for points in groups.values():
        best = _best(points)
        told = [
            f"{point.learning_rate:g}: {_sweep_loss(point)}{' (best)' if point is best else ''}"
            for point in sorted(points, key=lambda point: point.learning_rate)
        ]
        rows.append([points[0].label, *told, *[""] * (width - len(told))])
    return Table(
        caption="Sweep: validation loss by learning rate, first seed",
        header=["model", "rate: loss", *[""] * (width - 1)],
        rows=rows,
        align=["left"] * (width + 1),
    )


def _sweep_loss(point: SweepPoint) -> str:
    return point.failure.kind if point.failure is not None else _told(point.loss)


def _spikes(result: ConvergenceResult) -> Table:
    rows = []
    for arms in _by_key(result.arms, lambda arm: arm.key).values():
        norms = [point.gradient_norm for arm in arms for point in arm.train if point.gradient_norm is not None]
        rows.append(
            [
                _name(arms[0]),
                _largest([arm.largest_jump for arm in arms]),
                _figure(fmean(norms)) if norms else "not a number",
                _largest([arm.largest_gradient_norm for arm in arms]),
            ]
        )
    return Table(
        caption="Spikes and gradients over all seeds: rise of a step's training loss over the median of the 20 before "
        "it; norm of the gradient before clipping",
        header=["model", "largest rise", "mean norm", "largest norm"],
        rows=rows,
    )


def _largest(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _figure(max(known)) if len(known) == len(values) else "not known"


def _figure(value: float) -> str:
    """What diverges has a norm of many digits, none of which matters."""
    return f"{value:.2f}" if abs(value) < LEGIBLE else f"{value:.1e}"


def _losses_plot(result: ConvergenceResult) -> Plot:
    groups = _by_key(result.arms, lambda arm: arm.key)
    with drawing(columns=2, height=3.2) as canvas:
        for axes, horizontal in zip(canvas.axes, ("tokens", "seconds"), strict=True):
            for key, arms in groups.items():
                curves = [[point for point in arm.validation if point.loss is not None] for arm in arms]
                x, low, middle, high = _band(curves, horizontal, lambda point: point.loss)
                colour = COLOURS.get(key, GREY)
                axes.plot(
                    x,
                    middle,
                    color=colour,
                    marker=MARKERS.get(key, "."),
                    markersize=3.5,
                    linestyle="--" if arms[0].leaks else "-",
                    label=_name(arms[0]),
                )
                axes.fill_between(x, low, high, color=colour, alpha=BAND, linewidth=0)
            axes.axhline(result.unigram_entropy, color=GREY, linestyle=":", linewidth=1, label="unigram entropy")
            plain_ticks(axes.xaxis)
            axes.set_xlabel("tokens trained on" if horizontal == "tokens" else "seconds of training")
        canvas.axes[0].set_ylabel("validation loss, nats a token")
        canvas.legend_above()
    ends = "; ".join(f"{arms[0].label} {_mean_told([final_loss(arm) for arm in arms])}" for arms in groups.values())
    bands = "" if len(result.seeds) == 1 else ": mean of the seeds, band from the lowest to the highest"
    return Plot(
        caption=f"Validation loss over tokens (left) and over time (right){bands}",
        alternative=f"Falling curves. Test loss at the end: {ends}; unigram {result.unigram_entropy:.2f}",
        svg=canvas.svg,
    )


def _gradients_plot(result: ConvergenceResult) -> Plot:
    groups = _by_key(result.arms, lambda arm: arm.key)
    panels: list[tuple[str, Callable[[CurvePoint], float | None]]] = [
        ("training loss, nats a token", lambda point: point.loss),
        ("norm of the gradient", lambda point: point.gradient_norm),
    ]
    with drawing(columns=2, height=3.0) as canvas:
        for axes, (name, figure) in zip(canvas.axes, panels, strict=True):
            for key, arms in groups.items():
                curves = [[point for point in arm.train if figure(point) is not None] for arm in arms]
                x, low, middle, high = _band(curves, "tokens", figure)
                colour, style = COLOURS.get(key, GREY), "--" if arms[0].leaks else "-"
                axes.plot(x, middle, color=colour, linewidth=1, linestyle=style, label=_name(arms[0]))
                axes.fill_between(x, low, high, color=colour, alpha=BAND, linewidth=0)
            plain_ticks(axes.xaxis)
            axes.set_xlabel("tokens trained on")
            axes.set_ylabel(name)
        if any(point.gradient_norm for arm in result.arms for point in arm.train):
            canvas.axes[1].set_yscale("log")
        canvas.legend_above()
    bands = "" if len(result.seeds) == 1 else "; mean of the seeds, band from the lowest to the highest"
    return Plot(
        caption=f"Training loss (left) and gradient norm before clipping (right), a point the mean of its steps{bands}",
        alternative="Curves of training loss and of gradient norms; the table above has the largest",
        svg=canvas.svg,
    )


def _band(
    curves: list[list[CurvePoint]], horizontal: str, figure: Callable[[CurvePoint], float | None]
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Where, lowest, mean and highest at each step that every seed has reached."""
    by_step = [{point.step: point for point in curve} for curve in curves]
    steps = sorted(set.intersection(*(set(points) for points in by_step)))
    rows = [[points[step] for points in by_step] for step in steps]
    values = [[value for point in row if (value := figure(point)) is not None] for row in rows]
    where = [fmean(getattr(point, horizontal) for point in row) for row in rows]
    return where, [min(row) for row in values], [fmean(row) for row in values], [max(row) for row in values]


def _by_key(items: list[T], key: Callable[[T], str]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _name(arm: Arm) -> str:
    return arm.label + (" (leak)" if arm.leaks else "")


def _told(loss: float | None) -> str:
    return "not a number" if loss is None else f"{loss:.3f}"


def _mean_told(losses: list[float | None]) -> str:
    finite = [loss for loss in losses if loss is not None]
    return f"{fmean(finite):.2f}" if len(finite) == len(losses) else "not a number"


def _number(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
