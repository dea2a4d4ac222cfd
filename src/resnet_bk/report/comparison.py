"""Two runs beside each other, as a document."""

from collections.abc import Sequence
from statistics import median

from resnet_bk.report.blocks import Block, Bullets, Paragraph, Plot, Section, Table
from resnet_bk.report.compare import SIGNIFICANCE, TIME_MARGIN, Change, Count, Part, RunComparison, Setting
from resnet_bk.report.document import Document, provenance
from resnet_bk.report.figures import GREY, OURS, drawing
from resnet_bk.report.wording import interval, listing, milliseconds, quantity, shortened, signed_interval
from resnet_bk.schema import Report

NAMED = 4
SMALLEST_SHOWN = 1e-3
PARTS: dict[Part, str] = {
    "time": "Wall-clock time",
    "speed-up": "Speed-up within each run",
    "loss": "Test losses",
    "exponent": "Scaling exponents",
}
METHODS: dict[Part, str] = {
    "time": "Median time in each run, and the second over the first with a 95% bootstrap interval; above 1 the second "
    "run is slower. Samples of different runs have nothing that pairs them, so that p is of a permutation test of the "
    "medians.",
    "speed-up": "The baseline's time over ours, measured in turns within one run, so that a slower machine slows both. "
    "The change is the second run's ratio over the first's, with an interval made of both runs' intervals.",
    "loss": "Mean test loss over seeds in nats per token, and the second less the first with Student's 95% interval. "
    "Where both runs have the same seeds they are paired.",
    "exponent": "The second run's exponent less the first's: the slope of the logarithm of the runs' quotient, with "
    "Student's 95% interval of what the line leaves over at the places that both have measured.",
}


def compose(first: Report, second: Report, found: RunComparison) -> Document:
    """What the second run has that the first has not."""
    sections = [_findings(first, found)]
    sections += [_part(part, title, found) for part, title in PARTS.items() if _of(found, part)]
    if found.counts or found.counts_alike:
        sections.append(_counts(found))
    if found.turns:
        sections.append(
            Section(
                title="Checks and cells",
                blocks=[_settings("What went another way", found.turns)],
            )
        )
    if differing := [*found.machine, *found.versions, *found.settings]:
        sections.append(
            Section(title="What the runs do not share", blocks=[_settings("Machine, versions and settings", differing)])
        )
    for name, report in (("first", first), ("second", second)):
        made = provenance(report)
        sections.append(Section(title=f"How the {name} run was made", blocks=made.blocks))
    return Document(
        title="Two runs compared", subtitle=f"{_named('first', first)}; {_named('second', second)}", sections=sections
    )


def sentences(found: RunComparison) -> tuple[list[str], list[str]]:
    """What changed, and what limits that: the environment comes first."""
    grave = []
    if found.machine:
        told = _differences(found.machine)
        grave.append(f"The runs are of different machines ({told}): differences of time are not of the code.")
    commits = [row for row in found.versions if row.what == "commit"]
    if versions := [row for row in found.versions if row not in commits]:
        grave.append(f"Versions differ: {_differences(versions)}.")
    if found.settings:
        grave.append(f"Settings differ: {_differences(found.settings)}.")
    grave += found.remarks
    said = [f"The commits are {row.first} and {row.second}." for row in commits] or ["Both are of the same commit."]
    said += _changes(found)
    if moved := _moved_together(found):
        grave.append(moved)
    return said, grave


def changed_rows(found: RunComparison) -> list[list[str]]:
    """Model, figure, first, second and change of all that exceeds the noise, for a table."""
    rows = [
        [
            change.contestant,
            f"{change.part}, {change.what}{', ms' if change.part == 'time' else ''}",
            _figure(change, change.first),
            _figure(change, change.second),
            _shown(change),
        ]
        for change in found.claimed
    ]
    rows += [_count_row(count) for count in found.counts]
    return rows + [["", row.what, row.first, row.second, ""] for row in found.turns]


def _differences(rows: Sequence[Setting]) -> str:
    told = [f"{row.what} {shortened(row.first, 40)} against {shortened(row.second, 40)}" for row in rows[:NAMED]]
    return "; ".join(told) + (f"; and {len(rows) - NAMED} more" if len(rows) > NAMED else "")


def _changes(found: RunComparison) -> list[str]:
    said = []
    times = _of(found, "time")
    slower = [change for change in times if change.claimed and change.change and change.change.value > 1]
    faster = [change for change in times if change.claimed and change.change and change.change.value < 1]
    for rows, word in ((slower, "slower"), (faster, "faster")):
        if rows:
            told = "; ".join(f"{row.contestant}, {row.what} {_shown(row)}" for row in rows[: 2 * NAMED])
            said.append(f"The second run is {word}: {told}{_more(rows, 2 * NAMED)}. (Its time over the first's.)")
    for part, words in (("speed-up", "time ratio"), ("loss", "test loss"), ("exponent", "exponent")):
        rows = [change for change in found.claimed if change.part == part]
        if rows:
            told = "; ".join(
                f"{row.contestant}, {row.what} from {row.first:.3f} to {row.second:.3f} ({_shown(row)})"
                for row in rows[:NAMED]
            )
            said.append(f"Another {words}: {told}{_more(rows, NAMED)}.")
    if found.counts:
        told = "; ".join(f"{row.contestant}, {row.part} {row.what} {_share(row)}" for row in found.counts[:NAMED])
        said.append(f"Counts that changed: {told}{_more(found.counts, NAMED)}.")
    elif found.counts_alike:
        said.append(f"All {found.counts_alike} counts of FLOPs and bytes are the same.")
    said += [
        f"{row.what}: {row.first} in the first run, {row.second} in the second." for row in found.turns[: 2 * NAMED]
    ]
    tested = [change for change in found.changes if change.p is not None]
    if tested:
        held = [change for change in tested if not change.claimed]
        said.append(
            f"Of {len(tested)} figures with noise {len(tested) - len(held)} differ by more than noise"
            + (f"; of the other {len(held)} no difference can be claimed." if held else ".")
        )
    return said


def _more(rows: Sequence[object], shown: int) -> str:
    return f"; and {len(rows) - shown} more" if len(rows) > shown else ""


def _moved_together(found: RunComparison) -> str | None:
    """A slower machine slows all models; a change of one model's code does not."""
    times = [change for change in _of(found, "time") if change.change is not None]
    claimed = [change for change in times if change.claimed]
    ratios = [change.change.value for change in claimed if change.change]
    contestants = {change.contestant for change in times}
    one_way = all(ratio > 1 for ratio in ratios) or all(ratio < 1 for ratio in ratios)
    everyone = {change.contestant for change in claimed} == contestants and len(contestants) > 1
    if not one_way or not everyone or len(claimed) < len(times) / 2:
        return None
    return (
        f"The times of all models moved together (median {median(ratios):.2f}): that looks like the machine and not "
        "like the code. The speed-ups within each run tell them apart."
    )


def _findings(first: Report, found: RunComparison) -> Section:
    said, grave = sentences(found)
    blocks: list[Block] = [
        Paragraph(
            text=f"{first.ours.label} against {first.baseline.label}, measured twice. A difference is claimed if it is "
            f"more than chance shows in {SIGNIFICANCE:.0%} of such comparisons, all counted together (Holm), and, for "
            f"times, more than the {TIME_MARGIN:.0%} by which one run differs from the next anyway. A p in a table is "
            "of that figure alone."
        )
    ]
    if grave:
        blocks.append(Bullets(items=grave, grave=True))
    blocks.append(Bullets(items=said))
    return Section(title="Findings", blocks=blocks)


def _named(name: str, report: Report) -> str:
    commit = report.environment.get("commit") or "no commit"
    return f"{name}: {report.created.partition('T')[0]}, {commit}, profile {report.profile.get('name')}"


def _of(found: RunComparison, part: Part) -> list[Change]:
    return [change for change in found.changes if change.part == part]


def _shown(change: Change) -> str:
    if change.change is None:
        return "too few to tell"
    return interval(change.change) if change.part in ("time", "speed-up") else signed_interval(change.change)


def _probability(p: float | None) -> str:
    if p is None:
        return ""
    return f"{p:.1g}" if p >= SMALLEST_SHOWN else f"< {SMALLEST_SHOWN:g}"


def _figure(change: Change, value: float) -> str:
    return milliseconds(value) if change.part == "time" else f"{value:.3f}"


def _part(part: Part, title: str, found: RunComparison) -> Section:
    changes = _of(found, part)
    unit = ", ms" if part == "time" else ""
    blocks: list[Block] = [Paragraph(text=METHODS[part])]
    if part in ("time", "speed-up"):
        blocks.append(_plot(changes, part))
    blocks.append(
        Table(
            caption=f"{title}, first and second run",
            header=["model", "figure", f"first{unit}", f"second{unit}", "change", "p", "claimed"],
            rows=[
                [
                    change.contestant,
                    change.what,
                    _figure(change, change.first),
                    _figure(change, change.second),
                    _shown(change),
                    _probability(change.p),
                    "yes" if change.claimed else "no",
                ]
                for change in changes
            ],
            align=["left", "left", "right", "right", "right", "right", "left"],
        )
    )
    return Section(title=title, blocks=blocks)


def _plot(changes: list[Change], part: Part) -> Plot:
    rows = [change for change in changes if change.change is not None]
    names = [change.what if part == "speed-up" else f"{change.contestant}: {change.what}" for change in rows]
    with drawing(height=0.8 + 0.2 * len(rows)) as canvas:
        (axes,) = canvas.axes
        axes.axvspan(1 / (1 + TIME_MARGIN), 1 + TIME_MARGIN, color=GREY, alpha=0.15, linewidth=0)
        axes.axvline(1, color=GREY, linewidth=1)
        for place, change in enumerate(rows):
            figure = change.change
            assert figure is not None
            axes.errorbar(
                [figure.value],
                [place],
                xerr=[[figure.value - figure.low], [figure.high - figure.value]],
                fmt="o" if change.claimed else "D",
                markerfacecolor=OURS if change.claimed else "white",
                color=OURS if change.claimed else GREY,
                capsize=2,
                markersize=4,
                label="more than noise" if change.claimed else "no claim",
            )
        axes.set_yticks(range(len(rows)), names, fontsize=7.5)
        axes.invert_yaxis()
        axes.set_xlabel("second run over first run")
    told = listing([f"{name} {_shown(change)}" for name, change in zip(names, rows, strict=True)])
    return Plot(
        caption="The second run's figure over the first's with 95% intervals; filled points are claimed, the band is "
        "what one run differs from the next anyway",
        alternative=f"Points with intervals: {told}",
        svg=canvas.svg,
    )


def _counts(found: RunComparison) -> Section:
    blocks: list[Block] = [
        Paragraph(
            text=f"FLOPs and bytes are counted and have no noise, so that any change is one. {found.counts_alike} are "
            f"the same, {len(found.counts)} are not."
        )
    ]
    if found.counts:
        blocks.append(
            Table(
                caption="Counts that changed",
                header=["model", "figure", "first", "second", "change"],
                rows=[_count_row(row) for row in found.counts],
                align=["left", "left", "right", "right", "right"],
            )
        )
    return Section(title="FLOPs and memory", blocks=blocks)


def _count_row(count: Count) -> list[str]:
    amounts = _amount(count, count.first), _amount(count, count.second)
    return [count.contestant, f"{count.part}, {count.what}", *amounts, _share(count)]


def _amount(count: Count, value: int) -> str:
    return f"{quantity(value)}{'FLOP' if count.part == 'FLOPs' else 'B'}"


def _share(count: Count) -> str:
    if count.first == 0:
        return "from nothing"
    share = count.second / count.first - 1
    return f"{share:+.2%}" if abs(share) >= 5e-5 else f"{count.second - count.first:+,d}"


def _settings(caption: str, rows: Sequence[Setting]) -> Table:
    return Table(
        caption=caption,
        header=["", "first", "second"],
        rows=[[row.what, shortened(row.first, 120), shortened(row.second, 120)] for row in rows],
        align=["left", "left", "left"],
    )
