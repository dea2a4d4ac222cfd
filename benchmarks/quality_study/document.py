"""The tables and figures of docs/quality.md, from the committed results."""

import io
import statistics
from pathlib import Path

from markers import between_markers
from quality_study.cells import Cell, Results
from quality_study.document_reading import BASELINE, OURS, TRANSFORMERS, by_kind, by_window
from quality_study.editions import Edition, current, first
from quality_study.studies import Study
from quality_study.summary import Row, difference, rows
from quality_study.words import markdown, signed, verdict, with_error, without_claim
from resnet_bk.environment import summary_line
from resnet_bk.files import write_text

ROOT = Path(__file__).parents[2]
DOCUMENT, IMAGES = ROOT / "docs" / "quality.md", ROOT / "docs" / "images"
OURS_OF_TWO_BLOCKS = "ours-half"
RECALL, NEAR, FAR = "recall", "1x the length", "4x the length"
NOTEWORTHY = 0.05  # of right answers
CALLED = {
    "attention": "the Transformer",
    "hybrid": "the hybrid without positions",
    "resolvent": "the resolvent as it is",
}
FAMILIES = {
    "the best of the Mamba family": ("gated", "mamba2", "mamba2-drops-reads", "gated-delta", "deltanet"),
    "the best of it in a hybrid": (
        *("ours-gated", "ours-mamba2", "ours-mamba2-drops-reads", "ours-mamba2-lost-reads"),
        *("hybrid-gated", "hybrid-mamba2", "hybrid-mamba2-drops-reads", "hybrid-mamba2-lost-reads"),
    ),
}
# Ours as the library can be set.
SETTINGS = ("ours-short-text", "ours-short-text-fading")
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
    """The machines, versions and commits that cells were measured with."""
    lines = [
        f"- [{name}](../{name}): {summary_line(environment)}, commit {environment['commit']}"
        for name, results in edition.files.items()
        for environment in results.get("environments", [])
    ]
    return "\n".join(dict.fromkeys(lines)) or "Nothing is measured yet."


def findings(edition: Edition) -> str:
    """A sentence or more for each study of text: who is ahead, by how much, with the interval."""
    sentences = []
    for study in edition.studies.values():
        found = {(row.contestant, row.share != 1): row for row in rows(edition.results, study)}
        # Ablations are of a study that is here already.
        if study.corpus is not None and study.base == BASELINE and (OURS, False) in found:
            said = [*_against_baseline(edition, found), *_against_families(edition, found)]
            said += _in_other_settings(edition, found)
            sentences += [f"- {study.label}: {' '.join(said)}"] if said else []
        if study.name == RECALL and {(OURS_OF_TWO_BLOCKS, False), (BASELINE, False)} <= set(found):
            recalled = _recalled(found[OURS_OF_TWO_BLOCKS, False], found[BASELINE, False])
            sentences.append(f"- {study.label}: {recalled}")
    return "\n".join(sentences) or "Nothing is measured yet."


def _against_baseline(edition: Edition, found: dict[tuple[str, bool], Row]) -> list[str]:
    """At equal steps, and at equal time where the quicker one was trained for longer; and against the best of its
    kind."""
    if (BASELINE, False) not in found:
        return []
    ours, theirs = found[OURS, False], found[BASELINE, False]
    said = [f"{verdict(ours.losses, theirs.losses)}.", *_against_best(edition, ours, found)]
    longer = [row for (name, is_longer), row in found.items() if is_longer and name in (OURS, BASELINE)]
    for row in longer:
        who, pair = ("ours", (row, theirs)) if row.contestant == OURS else ("the Transformer", (ours, row))
        compared = verdict(*(one.losses for one in pair))
        said.append(f"At equal time, which is {row.share:.2f} times the steps for {who}: {compared}.")
    return said


def _recalled(ours: Row, theirs: Row) -> str:
    """Ours at four times the training length, the Transformer at it."""
    far, near = (statistics.mean(_shares(row, test)) for row, test in ((ours, FAR), (theirs, NEAR)))
    verdict = "no worse" if far >= near else "**worse**"
    each = ", ".join(f"{100 * share:.1f}%" for share in _shares(ours, FAR))
    there = statistics.mean(_shares(theirs, FAR))
    return (
        f"at {FAR}, ours says {far:.1%} of the values rightly (seeds: {each}), which is {verdict} than the Transformer "
        f"at {NEAR}, {near:.1%}; at {FAR} the Transformer says {there:.1%}."
    )


def _shares(row: Row, test: str) -> list[float]:
    """Of right answers, by seed."""
    return [cell["answers"][test] for cell in row.cells]


def _against_families(edition: Edition, found: dict[tuple[str, bool], Row]) -> list[str]:
    """The best rival is the one of the lowest test loss: what this choice flatters is the rival."""
    said = []
    for family, names in FAMILIES.items():
        rivals = [found[name, False] for name in names if (name, False) in found]
        if not rivals:
            continue
        ours, best = found[OURS, False], min(rivals, key=_mean)
        gap = difference(ours.losses, best.losses)
        if gap is None:
            compared = f"ours is at {_mean(ours):.3f}, {without_claim(ours.losses, best.losses)}"
        elif gap.errors <= 1:
            compared = f"ours is not above it by more than one standard error; the difference is {signed(gap)}"
        else:
            compared = f"ours is **above** it by {gap.errors:.1f} standard errors; the difference is {signed(gap)}"
        said.append(f"Against {family} ({edition.labels[best.contestant]}, {_mean(best):.3f}): {compared}.")
    return said


def _in_other_settings(edition: Edition, found: dict[tuple[str, bool], Row]) -> list[str]:
    """What else ours can be set to, against the Transformer and the best of its kind."""
    said = []
    for ours in [found[name, False] for name in SETTINGS if (name, False) in found]:
        compared = verdict(ours.losses, found[BASELINE, False].losses)
        said.append(f"{edition.labels[ours.contestant].capitalize()} ({_mean(ours):.3f}): {compared}.")
        said += _against_best(edition, ours, found)
    return said


def _against_best(edition: Edition, ours: Row, found: dict[tuple[str, bool], Row]) -> list[str]:
    """Against the Transformer with the lowest test loss, if that is not the first: the choice flatters it."""
    best = min((found[name, False] for name in TRANSFORMERS if (name, False) in found), key=_mean)
    gap = difference(ours.losses, best.losses)
    if best.contestant == BASELINE or gap is None:
        return []
    name = f"{edition.labels[best.contestant]}, {_mean(best):.3f}"
    return [
        f"Against the best Transformer ({name}) the difference is {signed(gap)}, {abs(gap.errors):.1f} standard errors."
    ]


def _mean(row: Row) -> float:
    return statistics.mean(row.losses)


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
                *(_mean_share(_shares(row, test)) for test in study.tests),
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
