"""The first page: what was found, in plain words, losses to the baseline included."""

from resnet_bk.report.blocks import Block, Bullets, Note, Paragraph, Section, Table
from resnet_bk.report.findings import findings_of, lines_of, within
from resnet_bk.report.wording import interval, mixer_in_words, verdict
from resnet_bk.schema import Comparison, Contestant, Report

LINES, LETTERS = 44, 110  # what one page holds of sentences, beside the title and the ratios
CELL_LETTERS, TITLE_LETTERS, TITLE_LINES = 60, 38, 2  # what of these is longer takes lines from the sentences
NOT_MEASURED = "not measured"
ALIKE = 0.01  # a share
RATIOS = {"forward": "forward time", "backward": "backward time", "step": "time of a step"}


def build(report: Report) -> Section:
    """Ratios, then sentences; nothing here that a section does not show."""
    ours, baseline, work = report.ours, report.baseline, report.workload
    introduction = Paragraph(
        text=f"{_introduced(ours)} against {_introduced(baseline)}{_others(report)}, on {work.description}, cut into "
        f"{work.vocab_size:,} tokens. Profile {report.profile['name']}: {report.profile['purpose']}."
    )
    gates = _gates(report)
    ratios = _ratios(report)
    taken = sum(lines_of(block.text, LETTERS) for block in (introduction, gates))
    taken += sum(len(words) > CELL_LETTERS for *_, words in ratios)
    taken += TITLE_LINES if len(f"{ours.label} against {baseline.label}") > TITLE_LETTERS else 0
    found, left = within(findings_of(report), LINES - taken, LETTERS)
    said = [finding.text for finding in found if not finding.grave]
    if left:
        said.append(f"Less important findings that do not fit on this page: {left}. The sections have them.")
    blocks: list[Block] = [
        introduction,
        gates,
        Table(
            caption=f"{baseline.label}'s figure over {ours.label}'s, with 95% intervals; above 1 is in {ours.label}'s "
            "favour",
            header=["", "ratio", "in words"],
            rows=ratios,
            align=["left", "right", "left"],
        ),
    ]
    if said:
        blocks.append(Bullets(items=said))
    if grave := [finding.text for finding in found if finding.grave]:
        blocks.append(Bullets(items=grave, grave=True))
    return Section(title="Findings", blocks=blocks)


def _introduced(contestant: Contestant) -> str:
    return f"{contestant.label} ({mixer_in_words(contestant)}; {contestant.parameters:,} parameters)"


def _others(report: Report) -> str:
    others = report.contestants[2:]
    return "".join(f", with {_introduced(other)} beside them" for other in others)


def _gates(report: Report) -> Note | Paragraph:
    failed = [gate.name for gate in report.gates if not gate.passed]
    if failed:
        return Note(
            text=f"A gate failed: {'; '.join(failed)}. Speed and losses of what failed are withheld.", grave=True
        )
    if missing := report.failures_of("gates"):
        return Note(
            text=f"No end of {', '.join(missing)}: what they would have shown is not known, and figures of their "
            "models are withheld.",
            grave=True,
        )
    if not report.gates:
        return Note(text="The gates did not run: nothing here is known to be right.", grave=True)
    return Paragraph(
        text=f"All {len(report.gates)} gates held before anything was timed: operators agree with double precision, "
        "and no model reads ahead."
    )


def _ratios(report: Report) -> list[list[str]]:
    """The ratios that every report names: FLOPs, forward, backward, step, memory."""
    results, ours, baseline = report.results, report.ours.label, report.baseline.label
    timing = results.timing.ratios if results.timing else []
    by_phase: dict[str, Comparison] = {row.phase: row.ratio for row in timing}
    rows = [["FLOPs of a step", *_exact(results.flops.ratio if results.flops else None, ours, baseline)]]
    for phase, name in RATIOS.items():
        ratio = by_phase.get(phase)
        rows.append(
            [name, "", NOT_MEASURED] if ratio is None else [name, interval(ratio), verdict(ratio, ours, baseline)]
        )
    rows.append(["peak memory of a step", *_exact(results.memory.ratio if results.memory else None, ours, baseline)])
    return rows


def _exact(ratio: float | None, ours: str, baseline: str) -> list[str]:
    """A count has no interval."""
    if ratio is None:
        return ["", NOT_MEASURED]
    less, more, factor = (ours, baseline, ratio) if ratio > 1 else (baseline, ours, 1 / ratio)
    words = f"{more} needs {factor:.2f} times what {less} does" if factor >= 1 + ALIKE else "the same within 1%"
    return [f"{ratio:.2f}", f"{words} (counted)"]
