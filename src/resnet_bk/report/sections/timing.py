"""Wall-clock time of the phases of a step."""

from resnet_bk.report.blocks import Block, Note, Paragraph, Plot, Section, Table
from resnet_bk.report.figures import COLOURS, drawing, grouped_bars
from resnet_bk.report.wording import interval, milliseconds, verdict
from resnet_bk.schema import PhaseTime, Report, TimingResult

MEANINGS = {
    "forward": "forward, with the loss",
    "backward": "backward",
    "optimizer": "clipping and AdamW",
    "step": "whole training step",
    "prefill": "reading a prompt",
    "decode": "one token of generation",
}
NOISY = 0.1


def build(report: Report, result: TimingResult) -> Section:
    """Times, their spread, and the ratios with intervals."""
    labels = {contestant.key: contestant.label for contestant in report.contestants}
    work = report.workload
    blocks: list[Block] = [
        Paragraph(
            text=f"One batch is {work.batch_size} sequences of {work.sequence_length} tokens in {work.precision} on "
            f"{work.device} with {work.threads} threads. The models take turns, {result.rounds} rounds after "
            f"{result.warmup_rounds} that warm up, in an order that is reversed every other round. Times include "
            "waiting for the device. Intervals are 95% bootstrap intervals of the median; a ratio is the median of the "
            "ratios within each round, so that a slow moment of the machine hits all models."
        ),
        _ratios(report, result),
        _plot(result, labels),
        _times(result, labels),
        Paragraph(
            text="Training speed: "
            + ", ".join(
                f"{labels[key]} {speed:,.0f} tokens a second" for key, speed in result.tokens_per_second.items()
            )
            + "."
        ),
    ]
    if noisy := [phase for phase in result.phases if _spread(phase) > NOISY]:
        blocks.append(
            Note(
                text=f"The quartiles of {len(noisy)} of {len(result.phases)} measurements are more than "
                f"{NOISY:.0%} of the median apart: the machine was busy, or the work is too short for its clock. The "
                "ratios suffer less, since all models were measured in the same moments."
            )
        )
    return Section(title="Wall-clock time", blocks=blocks)


def _spread(phase: PhaseTime) -> float:
    return (phase.seconds.third_quartile - phase.seconds.first_quartile) / phase.seconds.median


def _ratios(report: Report, result: TimingResult) -> Table:
    return Table(
        caption="Transformer's time over ResNet-BK's, with 95% intervals; above 1 ResNet-BK is faster",
        header=["phase", "ratio", "in words"],
        rows=[
            [MEANINGS[row.phase], interval(row.ratio), verdict(row.ratio, report.ours.label, report.baseline.label)]
            for row in result.ratios
        ],
        align=["left", "right", "left"],
    )


def _times(result: TimingResult, labels: dict[str, str]) -> Table:
    rows = [
        [
            phase.phase,
            labels[phase.contestant],
            *(
                milliseconds(value)
                for value in (
                    phase.seconds.median,
                    phase.seconds.low,
                    phase.seconds.high,
                    phase.seconds.third_quartile - phase.seconds.first_quartile,
                    phase.seconds.mean,
                    phase.seconds.std,
                    phase.seconds.minimum,
                    phase.seconds.maximum,
                )
            ),
        ]
        for phase in result.phases
    ]
    return Table(
        caption="Milliseconds a batch (decode: a token for every sequence of the batch)",
        header=["phase", "model", "median", "95% low", "high", "IQR", "mean", "std", "min", "max"],
        rows=rows,
        align=["left", "left", *["right"] * 8],  # type: ignore[list-item]
    )


def _plot(result: TimingResult, labels: dict[str, str]) -> Plot:
    phases = [row.phase for row in result.ratios]
    series: dict[str, list[float]] = {}
    errors: dict[str, tuple[list[float], list[float]]] = {}
    for key, label in labels.items():
        summaries = [
            next(row.seconds for row in result.phases if (row.phase, row.contestant) == (phase, key))
            for phase in phases
        ]
        series[label] = [1e3 * summary.median for summary in summaries]
        below = [1e3 * (summary.median - summary.low) for summary in summaries]
        above = [1e3 * (summary.high - summary.median) for summary in summaries]
        errors[label] = (below, above)
    with drawing() as canvas:
        (axes,) = canvas.axes
        grouped_bars(axes, phases, series, [COLOURS[key] for key in labels], errors)
        axes.set_ylabel("milliseconds")
        axes.legend()
    told = "; ".join(f"{label}: {', '.join(f'{value:.1f}' for value in values)}" for label, values in series.items())
    return Plot(
        caption="Medians with 95% intervals",
        alternative=f"Bars of milliseconds for {', '.join(phases)}. {told}",
        svg=canvas.svg,
    )
