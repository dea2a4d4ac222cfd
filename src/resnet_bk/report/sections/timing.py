"""Wall-clock time of the phases of a step."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from resnet_bk.report.blocks import Block, Note, Paragraph, Plot, Section, Table
from resnet_bk.report.figures import COLOURS, GREY, MARKERS, OURS, drawing
from resnet_bk.report.wording import interval, listing, milliseconds, quantity, verdict
from resnet_bk.schema import GpuSample, PhaseTime, Report, TimingResult

MEANINGS = {
    "forward": "forward, with the loss",
    "backward": "backward",
    "optimizer": "clipping and AdamW",
    "step": "whole training step",
    "prefill": "reading a prompt",
    "decode": "one token of generation",
    "forward, cold cache": "forward, caches emptied before",
}
NOISY = 0.1
SEVERAL_DECADES = 300.0  # largest over smallest time, from which on only powers of ten have room on the axis


def build(report: Report, result: TimingResult) -> Section:
    """Times, their spread, and the ratios with intervals."""
    blocks: list[Block] = [Paragraph(text=_method(report, result))]
    if result.ratios:
        blocks.append(_ratios(report, result))
    blocks += [_plot(report, result), _times(report, result)]
    if result.utilisation:
        blocks += [_utilisation(report, result), Note(text=_what_utilisation_means(result))]
    if result.gpu:
        blocks.append(Paragraph(text=_gpu_in_words(result.gpu)))
    return Section(title="Wall-clock time", blocks=[*blocks, *_caveats(report, result), *_failures(report)])


def _method(report: Report, result: TimingResult) -> str:
    work = report.workload
    where = f"{work.device} with {work.threads} threads" if work.device == "cpu" else work.device
    text = (
        f"One batch is {work.batch_size} sequences of {work.sequence_length} tokens in {work.precision} on {where}. "
        f"All models are in one process and take turns, {result.rounds} rounds in an order that is reversed every "
        f"other round. They were built anew {_times_in_words(result.builds)}, since where in memory a model lies "
        f"changes its speed; rounds that warmed each of the builds up and do not count: "
        f"{listing([str(rounds) for rounds in result.warmup_rounds])}. Times include waiting for the device. A step is "
        "timed apart from its phases, so that nobody waits in between. Intervals are 95% bootstrap intervals of the "
        "median."
    )
    if work.precision != "fp32" and any(row.phase in ("prefill", "decode") for row in result.phases):
        text += f" Reading a prompt and decoding are in fp32, as resnet-bk generate does them, not in {work.precision}."
    if not result.ratios:
        return text
    return (
        f"{text} A ratio is taken within each round, so that a slow moment of the machine hits all models; told is the "
        "mean of the builds' medians, on a logarithmic scale, with Student's interval over the builds. p is of a "
        "signed-rank test over all flips of the rounds' signs, ranked within builds. A difference is claimed if p "
        f"stays below 0.05 by Holm's correction for {len(result.ratios)} comparisons, and if the whole interval is "
        f"more than {result.margin:.0%} away from 1."
    )


def _times_in_words(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def _ratios(report: Report, result: TimingResult) -> Table:
    ours, baseline = report.ours.label, report.baseline.label
    return Table(
        caption=f"{baseline}'s time over {ours}'s, with 95% intervals; above 1 {ours} is faster",
        header=["phase", "ratio", "p", "what may be claimed"],
        rows=[
            [MEANINGS[row.phase], interval(row.ratio), _p(row.ratio.p), verdict(row.ratio, ours, baseline)]
            for row in result.ratios
        ],
        align=["left", "right", "right", "left"],
    )


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _times(report: Report, result: TimingResult) -> Table:
    rows = [
        [
            phase.phase,
            report.labels[phase.contestant],
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


def _utilisation(report: Report, result: TimingResult) -> Table:
    peaks = result.peaks
    return Table(
        caption=f"Training speed, and shares of what this machine does at best: {quantity(peaks.flops)}FLOP a second "
        f"of matrix products, {quantity(peaks.copy_bandwidth)}B a second of copying",
        header=["", "tokens a second", "FLOPs", "bandwidth, AdamW", "bandwidth, decode", "first step, s"],
        rows=[
            [
                report.labels[row.contestant],
                f"{row.tokens_per_second:,.0f}",
                _share(row.step_flops),
                _share(row.optimizer_bandwidth),
                _share(row.decode_bandwidth),
                f"{row.first_step_seconds:.2f}",
            ]
            for row in result.utilisation
        ],
    )


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"


def _what_utilisation_means(result: TimingResult) -> str:
    text = (
        "The share of FLOPs is of forward and backward, as counted, over the median step; what a backward pass "
        "computes again is in it, as model FLOP utilisation would not have it. Bandwidths are those bytes that cannot "
        "stay where they are: 28 a parameter for AdamW, though clipping, which is timed with it, moves more; for "
        "decoding the weights that one token needs, once. Above 100% the caches have helped. The first step compiles "
        "and allocates; the first model pays for what all share."
    )
    if any(row.step_flops is None for row in result.utilisation):
        text += " A model with an operator that nobody can count has no share of FLOPs."
    return text


def _gpu_in_words(samples: Sequence[GpuSample]) -> str:
    clocks, heat = [sample.sm_clock_mhz for sample in samples], [sample.temperature for sample in samples]
    power = [sample.power_watts for sample in samples if sample.power_watts is not None]
    text = (
        f"The GPU's driver was asked {_times_in_words(len(samples))}, before and after the rounds of each build: clock "
        f"{min(clocks):,.0f} to {max(clocks):,.0f} MHz, temperature {min(heat):.0f} to {max(heat):.0f} °C"
    )
    return text + (f", power {min(power):.0f} to {max(power):.0f} W." if power else ".")


def _caveats(report: Report, result: TimingResult) -> list[Block]:
    blocks: list[Block] = []
    if throttled := sum(sample.throttled for sample in result.gpu):
        blocks.append(
            Note(
                text=f"In {throttled} of {len(result.gpu)} samples the driver had lowered the GPU's clock, for heat or "
                "power. Times are then longer than the GPU's best; models take turns, so that it hits all of them.",
                grave=True,
            )
        )
    if noisy := [phase for phase in result.phases if _spread(phase) > NOISY]:
        blocks.append(
            Note(
                text=f"The quartiles of {len(noisy)} of {len(result.phases)} measurements are more than "
                f"{NOISY:.0%} of the median apart: the machine was busy, or the work is too short for its clock."
            )
        )
    timed = {phase.contestant for phase in result.phases if phase.phase == "decode"}
    missing = [report.labels[key] for key in dict.fromkeys(phase.contestant for phase in result.phases)]
    missing = [label for label in missing if label not in {report.labels[key] for key in timed}]
    if missing:
        blocks.append(Note(text=f"No time of generation: {listing(missing)} cannot go on from a prompt and a cache."))
    if not result.ratios:
        blocks.append(Note(text=f"No ratios: {report.ours.label} and {report.baseline.label} were not both timed."))
    return blocks


def _failures(report: Report) -> list[Block]:
    told = [
        f"{report.labels.get(name.partition('/')[2], name)} ({status.failure.kind}: {status.failure.message})"
        for name, status in report.failures_of("timing").items()
        if status.failure
    ]
    return [Note(text=f"Not timed: {'; '.join(told)}.", grave=True)] if told else []


def _spread(phase: PhaseTime) -> float:
    return (phase.seconds.third_quartile - phase.seconds.first_quartile) / phase.seconds.median


def _plot(report: Report, result: TimingResult) -> Plot:
    phases = list(dict.fromkeys(row.phase for row in result.phases))
    columns = 2 if result.ratios else 1
    with drawing(columns=columns, height=0.9 + 0.28 * len(phases)) as canvas:
        _draw_times(canvas.axes[0], report, result, phases)
        canvas.legend_above()
        if result.ratios:
            _draw_ratios(canvas.axes[1], result, phases)
        for axes in canvas.axes:
            axes.set_yticks(range(len(phases)), [str(phase) for phase in phases], fontsize=8)
            axes.set_ylim(len(phases) - 0.5, -0.5)
            axes.grid(visible=False, axis="y")
        for axes in canvas.axes[1:]:
            axes.tick_params(labelleft=False)
    told = "; ".join(
        f"{row.phase}, {report.labels[row.contestant]}: {milliseconds(row.seconds.median)}" for row in result.phases
    )
    caption = "Medians with 95% intervals"
    if result.ratios:
        caption += (
            "; right: the ratio of each phase, filled where a difference may be claimed, the grey band being what "
            "a model may differ from itself"
        )
    return Plot(caption=caption, alternative=f"Milliseconds of each phase. {told}", svg=canvas.svg)


def _draw_times(axes: Axes, report: Report, result: TimingResult, phases: list[Any]) -> None:
    keys = list(dict.fromkeys(row.contestant for row in result.phases))
    for place, key in enumerate(keys):
        rows = [row for row in result.phases if row.contestant == key]
        medians = [1e3 * row.seconds.median for row in rows]
        below = [1e3 * max(0.0, row.seconds.median - row.seconds.low) for row in rows]
        above = [1e3 * max(0.0, row.seconds.high - row.seconds.median) for row in rows]
        heights = [phases.index(row.phase) + 0.22 * (place - (len(keys) - 1) / 2) for row in rows]
        axes.errorbar(
            medians,
            heights,
            xerr=[below, above],
            fmt=MARKERS.get(key, "o"),
            color=COLOURS.get(key, GREY),
            label=report.labels[key],
            markersize=4,
            capsize=2,
        )
    axes.set_xscale("log")
    medians = [row.seconds.median for row in result.phases]
    wide = max(medians) / min(medians) > SEVERAL_DECADES
    _plain_logarithmic(axes, (1.0,) if wide else (1.0, 2.0, 5.0))
    axes.set_xlabel("milliseconds")


def _draw_ratios(axes: Axes, result: TimingResult, phases: list[Any]) -> None:
    for claimed, filling in ((True, OURS), (False, "white")):
        rows = [row for row in result.ratios if row.ratio.claimed is claimed]
        if rows:
            axes.errorbar(
                [row.ratio.value for row in rows],
                [phases.index(row.phase) for row in rows],
                xerr=[
                    [max(0.0, row.ratio.value - row.ratio.low) for row in rows],
                    [max(0.0, row.ratio.high - row.ratio.value) for row in rows],
                ],
                fmt="o",
                color=OURS,
                markerfacecolor=filling,
                label="claimed" if claimed else "not claimed",
                markersize=5,
                capsize=2,
            )
    axes.axvspan(1 / (1 + result.margin), 1 + result.margin, color=GREY, alpha=0.25, linewidth=0)
    axes.axvline(1.0, color=GREY, linewidth=0.8)
    axes.set_xscale("log")
    ends = [end for row in result.ratios for end in (row.ratio.low, row.ratio.high, 1.0)]
    wide = max(ends) / min(ends)
    _plain_logarithmic(axes, (1.0,) if wide > SEVERAL_DECADES else (1.0, 2.0, 5.0) if wide > 4 else _FINE)
    axes.set_xlim(min(ends) / 1.15, max(ends) * 1.15)
    axes.set_xlabel("ratio of times (above 1: ours is faster)")


_FINE = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0)


def _plain_logarithmic(axes: Axes, steps: Sequence[float]) -> None:
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)
