"""How held-out text was read, as docs/quality.md has it: in which windows, and where the difference lies."""

import statistics

from quality_study.comparison import BASELINE, COLUMNS, OURS, Comparison, best_transformer
from quality_study.editions import Edition
from quality_study.reading import KINDS, OVERLAPPING, SLIDING, TIMES, WINDOWED
from quality_study.studies import Study
from quality_study.summary import Row, difference, rows
from quality_study.words import markdown, signed, with_error

MISSING = "Not measured yet."


def by_window(edition: Edition) -> str:
    """A table for each study, and who is ahead where each reads in one pass as it does best."""
    parts = []
    for study, found in _measured(edition, "by_window"):
        names = [name for name in _one_pass(study) if any(_losses(row, name) for row in found)]
        columns = ["contestant", "seeds", *(_named(name, study) for name in names)]
        columns.append(f"{study.length:,} tokens, {OVERLAPPING} times over")
        lines = [
            [
                edition.labels[row.contestant],
                str(len(row.cells)),
                *(f"**{loss}**" if name == _chosen(row) else loss for name in names for loss in [_loss(row, name)]),
                _loss(row, SLIDING),
            ]
            for row in found
        ]
        parts += [f"{study.label}:", "", *markdown(columns, lines), "", *_in_one_pass(edition, found)]
    return "\n".join(parts).strip() or MISSING


def by_kind(edition: Edition) -> str:
    """What each kind of token adds to the difference of ours and the Transformer's loss."""
    parts = []
    for study, found in _measured(edition, "by_kind"):
        mine = {row.contestant: row for row in found}
        if not {OURS, BASELINE} <= set(mine):
            continue
        lines = []
        for kind in KINDS:
            ours, theirs = (_of_kind(mine[name], kind) for name in (OURS, BASELINE))
            if not ours or not theirs:
                continue
            gap, share = difference(ours, theirs), mine[OURS].cells[0]["by_kind"][kind]["share"]
            adds = share * (statistics.mean(ours) - statistics.mean(theirs))
            lines.append(
                [
                    kind,
                    f"{share:.1%}",
                    with_error(ours),
                    with_error(theirs),
                    "" if gap is None else signed(gap),
                    f"{adds:+.4f}",
                ]
            )
        columns = ["its phrase was read", "tokens", edition.labels[OURS], edition.labels[BASELINE]]
        columns += ["minus the Transformer's (95%)", "adds to the mean's"]
        parts += [f"{study.label}:", "", *markdown(columns, lines), ""]
    return "\n".join(parts).strip() or MISSING


def _measured(edition: Edition, what: str) -> list[tuple[Study, list[Row]]]:
    """The studies and contestants that have it, at the study's own steps, with the seeds that do."""
    found = []
    for study in edition.studies.values():
        # Ablations are of a study that is here already.
        if study.corpus is None or study.base != BASELINE:
            continue
        mine = [row.only(what) for row in rows(edition.results, study) if row.share == 1]
        mine = [row for row in mine if row.cells]
        found += [(study, mine)] if mine else []
    return found


def _one_pass(study: Study) -> list[str]:
    """The windows in which each token is read once."""
    return [*(str(times * study.length) for times in TIMES), WINDOWED]


def _named(window: str, study: Study) -> str:
    if window != WINDOWED:
        return f"{int(window):,} tokens"
    return f"{max(TIMES) * study.length:,} tokens, attention to the last {study.length:,}"


def _chosen(row: Row) -> str:
    """The window that the half which chooses prefers, of those that take one pass; by the seeds that have the most."""
    most = max(len(cell["by_window"]["choosing"]) for cell in row.cells)
    read = [found for cell in row.cells if len(found := cell["by_window"]["choosing"]) == most]
    return min((name for name in read[0] if name != SLIDING), key=lambda name: statistics.mean(x[name] for x in read))


def _losses(row: Row, window: str) -> list[float]:
    """Of the seeds that were read so."""
    return [losses[window] for cell in row.cells if window in (losses := cell["by_window"]["test"])]


def _loss(row: Row, window: str) -> str:
    losses = _losses(row, window)
    if not losses:
        return ""
    return with_error(losses) + (f" ({len(losses)} seeds)" if len(losses) < len(row.cells) else "")


def _of_kind(row: Row, kind: str) -> list[float]:
    return [cell["by_kind"][kind]["loss"] for cell in row.cells if kind in cell["by_kind"]]


def _in_one_pass(edition: Edition, found: list[Row]) -> list[str]:
    """Who is ahead where each is read once, in the windows that the choosing half prefers."""
    mine = {row.contestant: row for row in found}
    if not {OURS, BASELINE} <= set(mine):
        return []
    losses = {name: _losses(row, _chosen(row)) for name, row in mine.items()}
    best = best_transformer(losses)
    rivals = {"the Transformer": losses[BASELINE]}
    if overlapping := _losses(mine[BASELINE], SLIDING):
        rivals[f"the Transformer with {OVERLAPPING} times the work"] = overlapping
    if best != BASELINE:
        rivals[f"the best Transformer: {edition.labels[best]}"] = losses[best]
    lines = [Comparison(ours=losses[OURS], rival=rival, theirs=theirs).line() for rival, theirs in rivals.items()]
    return [*markdown(COLUMNS, lines), ""]
