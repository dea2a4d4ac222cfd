"""The tables and figures of docs/quality.md, from the committed results."""

import io
import statistics
from pathlib import Path
from typing import Any

from markers import between_markers
from quality_study.contestants import CONTESTANTS
from quality_study.studies import PUBLISHED, STUDIES, Study
from quality_study.summary import Difference, Row, difference, rows, standard_error
from resnet_bk.files import read_json, write_text

ROOT = Path(__file__).parents[2]
RESULTS = [ROOT / "benchmarks" / "results" / kind / "quality.json" for kind in ("gpu", "cpu")]
DOCUMENT, PICTURE = ROOT / "docs" / "quality.md", ROOT / "docs" / "images" / "quality-by-position.svg"
OURS, BASELINE = "resolvent", "attention"
SHOWN = ("resolvent", "attention", "gated", "hybrid")
BY_POSITION = ("embedded-1m", "embedded-30m")


def write(*, check: bool) -> int:
    """Writes both; with ``check`` only says, by 1, that the text is not that of the results."""
    results = all_results()
    text = DOCUMENT.read_text(encoding="utf-8")
    wanted = between_markers(text, "findings", findings(results))
    for name in PUBLISHED:
        if f"<!-- {name}: begin -->" in wanted:
            wanted = between_markers(wanted, name, table(results, STUDIES[name]))
    if check:
        if wanted != text:
            print("docs/quality.md is not that of its results: python benchmarks/quality.py document")
        return int(wanted != text)
    write_text(DOCUMENT, wanted)
    write_text(PICTURE, picture(results))
    return 0


def all_results() -> dict[str, Any]:
    """The cells of all machines: no study is on two of them."""
    return {"cells": {name: cell for path in RESULTS for name, cell in read_json(path)["cells"].items()}}


def findings(results: dict[str, Any]) -> str:
    """A sentence for each study of text: who is ahead, by how much, with the interval."""
    sentences = []
    for name in PUBLISHED:
        study = STUDIES[name]
        found = {row.contestant: row for row in rows(results, study) if row.share == 1}
        if study.corpus is None or not {OURS, BASELINE} <= set(found):
            continue
        sentences.append(f"- {study.label}: {_verdict(found)}")
    return "\n".join(sentences)


def _verdict(found: dict[str, Row]) -> str:
    ours, theirs = found[OURS].losses, found[BASELINE].losses
    gap = difference(ours, theirs)
    if gap is None:
        return (
            f"test loss {statistics.mean(ours):.3f} against the Transformer's {statistics.mean(theirs):.3f}, with "
            f"{len(ours)} and {len(theirs)} seeds, which carries no claim."
        )
    interval = (
        f"{abs(gap.value):.3f} (95%: {min(abs(gap.low), abs(gap.high)):.3f} to {max(abs(gap.low), abs(gap.high)):.3f})"
    )
    if gap.low <= 0 <= gap.high:
        return f"no difference is shown; ours minus the Transformer's is {_signed(gap)}."
    where, verdict = ("below", "wins") if gap.value < 0 else ("above", "loses")
    return f"the resolvent's test loss is **{where}** the Transformer's by {interval}: it **{verdict}**."


def _signed(gap: Difference) -> str:
    return f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"


def table(results: dict[str, Any], study: Study) -> str:
    """One study, as Markdown."""
    found = rows(results, study)
    if not found:
        return "Not measured."
    lines = _answers(study, found) if study.tests else _losses(results, study, found)
    failed = sorted(
        {
            name.split("/")[1]
            for name, cell in results["cells"].items()
            if name.startswith(f"{study.name}/") and "failure" in cell
        }
    )
    missing = [
        CONTESTANTS[name].label
        for name in study.contestants
        if name not in {row.contestant for row in found} and name not in failed
    ]
    if failed:
        lines += [
            "",
            "Failed: " + "; ".join(f"{CONTESTANTS[name].label}: {_failure(results, study, name)}" for name in failed),
        ]
    if missing:
        lines += ["", "Not measured: " + ", ".join(missing) + "."]
    return "\n".join(lines)


def _losses(results: dict[str, Any], study: Study, found: list[Row]) -> list[str]:
    baseline = next((row for row in found if row.contestant == BASELINE and row.share == 1), None)
    reference = baseline or next((row for row in _reference(results) if row.contestant == OURS), None)
    against = "the Transformer" if baseline is not None else "the resolvent as it is"
    lines = [
        f"| contestant | parameters | rate | test loss ± standard error | seeds | minus {against} (95%) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found:
        gap = None if reference is None or row == reference else difference(row.losses, reference.losses)
        share = "" if row.share == 1 else f", as long as the slower one ({row.share:.2f} times the steps)"
        edge = " (edge)" if row.is_at_an_edge else ""
        error = f" ± {standard_error(row.losses):.3f}" if len(row.losses) > 1 else ""
        lines.append(
            f"| {CONTESTANTS[row.contestant].label}{share} | {row.parameters:,} | {row.rate:g}{edge} | "
            f"{statistics.mean(row.losses):.3f}{error} | {len(row.losses)} | {'' if gap is None else _signed(gap)} |"
        )
    if study.published_loss:
        held_out = ", ".join(
            f"{CONTESTANTS[row.contestant].label} {statistics.mean(cell['held_out'] for cell in row.cells):.4f}"
            for row in found
        )
        lines += ["", f"On all that is held out, as nanoGPT's published {study.published_loss}: {held_out}."]
    return lines


def _reference(results: dict[str, Any]) -> list[Row]:
    return [row for row in rows(results, STUDIES["embedded-1m"]) if row.share == 1]


def _answers(study: Study, found: list[Row]) -> list[str]:
    lines = [
        f"| contestant | rate | seeds | {' | '.join(study.tests)} |",
        f"| --- | --- | --- |{' --- |' * len(study.tests)}",
    ]
    for row in found:
        shares = [f"{100 * statistics.mean(cell['answers'][test] for cell in row.cells):.1f}%" for test in study.tests]
        lines.append(
            f"| {CONTESTANTS[row.contestant].label} | {row.rate:g} | {len(row.cells)} | {' | '.join(shares)} |"
        )
    return lines


def _failure(results: dict[str, Any], study: Study, contestant: str) -> str:
    return next(
        str(cell["failure"]["message"])
        for name, cell in results["cells"].items()
        if name.startswith(f"{study.name}/{contestant}/") and "failure" in cell
    )


def picture(results: dict[str, Any]) -> str:
    """Loss over the position in windows four times as long as training's, as SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "quality", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = plt.subplots(1, len(BY_POSITION), figsize=(8, 3.6), layout="constrained")
        for axis, name in zip(axes, BY_POSITION, strict=True):
            study = STUDIES[name]
            for row in rows(results, study):
                if row.contestant not in SHOWN or row.share != 1:
                    continue
                means = [
                    statistics.mean(values) for values in zip(*(cell["by_position"] for cell in row.cells), strict=True)
                ]
                width = 4 * study.length / len(means)
                places = [width * (index + 0.5) for index in range(len(means))]
                marker = "osD^"[SHOWN.index(row.contestant)]
                axis.plot(places, means, marker=marker, markersize=3, label=CONTESTANTS[row.contestant].label)
            axis.axvline(study.length, color="0.6", linestyle=":")
            axis.set(title=study.label, xlabel="position in the window (tokens)", ylabel="test loss (nats a token)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
