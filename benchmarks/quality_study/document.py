"""The tables and figures of docs/quality.md, from the committed results."""

import io
import statistics
from pathlib import Path

from markers import between_markers
from quality_study.cells import Cell, Results
from quality_study.document_reading import by_kind, by_window
from quality_study.editions import Edition, current, first
from quality_study.findings import findings, shares_of
from quality_study.studies import Study
from quality_study.summary import Row, difference, rows
from quality_study.words import markdown, signed, with_error
from resnet_bk.environment import summary_line
from resnet_bk.files import write_text

ROOT = Path(__file__).parents[2]
DOCUMENT, IMAGES = ROOT / "docs" / "quality.md", ROOT / "docs" / "images"
NOTEWORTHY = 0.05  # of right answers
CALLED = {
    "attention": "the Transformer",
    "hybrid": "the hybrid without positions",
    "resolvent": "the resolvent as it is",
}
BY_POSITION = "quality-by-position.svg"
SHOWN = ("ours", "attention", "resolvent")
FIRST_SHOWN = ("resolvent", "attention", "gated", "hybrid")


def write(*, check: bool) -> int:
    """Writes both; with ``check`` only says, by 1, that the text is not that of the results."""
    text, now, before = DOCUMENT.read_text(encoding="utf-8"), current(), first()
    wanted = text
    for name, content in {**contents(now), **tables(before), "first-sources": sources(before)}.items():
        wanted = between_markers(wanted, name, content)
    if check:
        if wanted != text:
            print("docs/quality.md is not that of its results: python benchmarks/quality.py document")
        return int(wanted != text)
    write_text(DOCUMENT, wanted)
    if _has_positions(now):
        write_text(IMAGES / BY_POSITION, picture(now, ("embedded-1m",), SHOWN))
    write_text(IMAGES / "quality-first-by-position.svg", picture(before, ("embedded-1m", "embedded-30m"), FIRST_SHOWN))
    return 0


def contents(edition: Edition) -> dict[str, str]:
    """What stands between the markers of each name, of the study as it is."""
    return {
        "findings": findings(edition),
        "sources": sources(edition),
        "by-position": by_position(edition),
        "by-window": by_window(edition),
        "by-kind": by_kind(edition),
        **tables(edition),
    }


def tables(edition: Edition) -> dict[str, str]:
    """Each study's, by the name of its markers."""
    return {f"{edition.prefix}{name}": table(edition, study) for name, study in edition.studies.items()}


def sources(edition: Edition) -> str:
    """The machines and versions that cells were measured with, each with its commits."""
    commits: dict[str, list[str]] = {}
    for name, results in edition.files.items():
        for environment in results.get("environments", []):
            measured = commits.setdefault(f"[{name}](../{name}): {summary_line(environment)}", [])
            measured += [environment["commit"]] if environment["commit"] not in measured else []
    return (
        "\n".join(
            f"- {machine}, commit{'s' if len(of_it) > 1 else ''} {', '.join(of_it)}"
            for machine, of_it in commits.items()
        )
        or "Nothing is measured yet."
    )


def table(edition: Edition, study: Study) -> str:
    """One study, as Markdown, with who failed and who is missing."""
    found = rows(edition.results, study)
    lines = [] if not found else _answers(edition, study, found) if study.tests else _losses(edition, study, found)
    failures = _failures(edition.results, study)
    measured = {row.contestant for row in found}
    missing = [edition.labels[name] for name in study.contestants if name not in {*measured, *failures}]
    if failures:
        said = "; ".join(f"{edition.labels[name]}: {message}" for name, message in failures.items())
        lines += ["", f"Failed: {said}"]
    if missing:
        lines += ["", f"Not measured yet: {'; '.join(missing)}."]
    return "\n".join(lines).strip()


def _failures(results: Results, study: Study) -> dict[str, str]:
    """What went wrong, by contestant."""
    found: dict[str, str] = {}
    for name, result in results["cells"].items():
        cell = Cell.named(name)
        if cell.study == study.name and "failure" in result:
            found.setdefault(cell.contestant, str(result["failure"]["message"]))
    return dict(sorted(found.items()))


def _losses(edition: Edition, study: Study, found: list[Row]) -> list[str]:
    reference = _reference(edition, study)
    settings = {
        "rate": True,
        "dropout": len(study.dropouts) > 1,
        "weight_decay": any(len(row.tried["weight_decay"]) > 1 for row in found),
        "token_dropout": any(len(row.tried["token_dropout"]) > 1 for row in found),
    }
    swept = [knob for knob, is_shown in settings.items() if is_shown]
    columns = ["contestant", "parameters", *(knob.replace("_", " ") for knob in swept)]
    columns += ["test loss ± standard error", "seeds", f"minus {CALLED[study.base]} (95%)"]
    body = []
    for row in found:
        gap = None if reference is None or row == reference else difference(row.losses, reference.losses)
        body.append(
            [
                _who(edition, row),
                f"{row.parameters:,}",
                *_settings(row, swept),
                with_error(row.losses),
                str(len(row.losses)),
                "" if gap is None else signed(gap),
            ]
        )
    lines = markdown(columns, body)
    if study.published_loss:
        held_out = "; ".join(
            f"{_who(edition, row)} {statistics.mean(cell['held_out'] for cell in row.cells):.4f}" for row in found
        )
        lines += ["", f"On all that is held out, as nanoGPT's published {study.published_loss}: {held_out}."]
    return lines


def _who(edition: Edition, row: Row) -> str:
    share = "" if row.share == 1 else f", as long as the slower one ({row.share:.2f} times the steps)"
    return f"{edition.labels[row.contestant]}{share}"


def _settings(row: Row, knobs: list[str]) -> list[str]:
    """The best of each, and whether more or less of it might have been better still."""
    return [f"{getattr(row.best, knob):g}{' (edge)' if row.is_at_edge(knob) else ''}" for knob in knobs]


def _reference(edition: Edition, study: Study) -> Row | None:
    """The base at the study's own steps."""
    of = edition.studies[edition.bases.get(study.name, study.name)]
    return next((row for row in rows(edition.results, of) if row.contestant == study.base and row.share == 1), None)


def _answers(edition: Edition, study: Study, found: list[Row]) -> list[str]:
    return markdown(
        ["contestant", "rate", "seeds", *study.tests],
        [
            [
                edition.labels[row.contestant],
                f"{row.best.rate:g}",
                str(len(row.cells)),
                *(_mean_share(shares_of(row, test)) for test in study.tests),
            ]
            for row in found
        ],
    )


def _mean_share(shares: list[float]) -> str:
    """With the lowest seed's where that is not much the same: a mean hides one that has not learned."""
    mean, lowest = statistics.mean(shares), min(shares)
    return f"{mean:.1%}" + (f" (lowest {lowest:.1%})" if mean - lowest >= NOTEWORTHY else "")


def by_position(edition: Edition) -> str:
    """The figure's place in the document."""
    if not _has_positions(edition):
        return "Not measured yet."
    return f"![Test loss over the position in a window four times as long as training's](images/{BY_POSITION})"


def _has_positions(edition: Edition) -> bool:
    return any(row.contestant in SHOWN for row in rows(edition.results, edition.studies["embedded-1m"]))


def picture(edition: Edition, names: tuple[str, ...], shown: tuple[str, ...]) -> str:
    """Loss over the position in windows four times as long as training's, as SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "quality", "svg.fonttype": "none", "font.size": 9}):
        figure, (all_axes,) = plt.subplots(
            1, len(names), figsize=(8 if len(names) > 1 else 5.5, 3.6), layout="constrained", squeeze=False
        )
        for axis, name in zip(all_axes, names, strict=True):
            study = edition.studies[name]
            for row in rows(edition.results, study):
                if row.contestant not in shown or row.share != 1:
                    continue
                means = [
                    statistics.mean(values) for values in zip(*(cell["by_position"] for cell in row.cells), strict=True)
                ]
                width = 4 * study.length / len(means)
                places = [width * (index + 0.5) for index in range(len(means))]
                marker = "osD^"[shown.index(row.contestant)]
                axis.plot(places, means, marker=marker, markersize=3, label=edition.labels[row.contestant])
            axis.axvline(study.length, color="0.6", linestyle=":")
            axis.set(title=study.label, xlabel="position in the window (tokens)", ylabel="test loss (nats a token)")
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
