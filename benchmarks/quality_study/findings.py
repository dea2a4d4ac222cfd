"""Who is ahead, by how much, with the interval: what docs/quality.md begins with."""

import statistics
from collections.abc import Iterator

from quality_study.comparison import BASELINE, COLUMNS, OURS, Comparison, best_transformer
from quality_study.editions import Edition
from quality_study.studies import Study
from quality_study.summary import Row, rows
from quality_study.words import markdown

OURS_OF_TWO_BLOCKS = "ours-half"
RECALL, NEAR, FAR = "recall", "1x the length", "4x the length"
FAMILIES = {
    "the best of Mamba's family": ("gated", "mamba2", "mamba2-drops-reads", "gated-delta", "deltanet"),
    "the best of it in a hybrid": (
        *("ours-gated", "ours-mamba2", "ours-mamba2-drops-reads", "ours-mamba2-lost-reads"),
        *("hybrid-gated", "hybrid-mamba2", "hybrid-mamba2-drops-reads", "hybrid-mamba2-lost-reads"),
    ),
}
# Ours as the library can be set.
SETTINGS = ("ours-short-text", "ours-short-text-fading")

# A contestant, and whether it was trained for as long as a slower one.
Found = dict[tuple[str, bool], Row]


def findings(edition: Edition) -> str:
    """A table of all studies of text, and a sentence for the one of recall."""
    lines, said = [], []
    for study in edition.studies.values():
        found = {(row.contestant, row.share != 1): row for row in rows(edition.results, study)}
        # Ablations are of a study that is here already.
        if study.corpus is not None and study.base == BASELINE and (OURS, False) in found:
            lines += _once([[study.label, *comparison.line()] for comparison in _comparisons(edition, found)])
        if study.name == RECALL and {(OURS_OF_TWO_BLOCKS, False), (BASELINE, False)} <= set(found):
            said.append(_recalled(study, found[OURS_OF_TWO_BLOCKS, False], found[BASELINE, False]))
    if not lines and not said:
        return "Nothing is measured yet."
    return "\n".join([*(markdown(["text and size", *COLUMNS], lines) if lines else []), "", *said]).strip()


def _once(lines: list[list[str]]) -> list[list[str]]:
    """What stands in the line above as well is left out of the columns that say what is compared."""
    before = [["", ""], *(line[:2] for line in lines)]
    return [
        [*("" if cell == above else cell for cell, above in zip(line[:2], it, strict=True)), *line[2:]]
        for line, it in zip(lines, before, strict=False)
    ]


def _comparisons(edition: Edition, found: Found) -> Iterator[Comparison]:
    """In windows as long as training's."""
    at_equal_steps = {name: row for (name, is_longer), row in found.items() if not is_longer}
    yield from _against_transformers(edition, at_equal_steps, OURS)
    yield from _at_equal_time(found)
    yield from _against_families(edition, at_equal_steps)
    for name in SETTINGS:
        if name in at_equal_steps:
            yield from _against_transformers(edition, at_equal_steps, name)


def _against_transformers(edition: Edition, found: dict[str, Row], name: str) -> Iterator[Comparison]:
    """The study's, and the best one where that is another."""
    if BASELINE not in found:
        return
    ours, who = found[name].losses, edition.labels[name] if name != OURS else ""
    yield Comparison(who=who, ours=ours, rival="the Transformer", theirs=found[BASELINE].losses)
    best = best_transformer({name: row.losses for name, row in found.items()})
    if best != BASELINE:
        rival = f"the best Transformer: {edition.labels[best]}"
        yield Comparison(who=who, ours=ours, rival=rival, theirs=found[best].losses)


def _at_equal_time(found: Found) -> Iterator[Comparison]:
    """The quicker one was trained for longer."""
    for name, other in ((OURS, BASELINE), (BASELINE, OURS)):
        if not {(name, True), (other, False)} <= set(found):
            continue
        longer = found[name, True]
        both = {name: longer.losses, other: found[other, False].losses}
        times = f"{longer.share:.2f} times the steps"
        who, rival = (times, "") if name == OURS else ("", f", {times}")
        yield Comparison(who=who, ours=both[OURS], rival=f"the Transformer at equal time{rival}", theirs=both[BASELINE])


def _against_families(edition: Edition, found: dict[str, Row]) -> Iterator[Comparison]:
    """The best rival is the one of the lowest test loss: what this choice flatters is the rival."""
    for family, names in FAMILIES.items():
        rivals = {name: found[name].losses for name in names if name in found}
        if rivals:
            best = min(rivals, key=lambda name: statistics.mean(rivals[name]))
            rival = f"{family}: {edition.labels[best]}"
            yield Comparison(who="", ours=found[OURS].losses, rival=rival, theirs=rivals[best])


def _recalled(study: Study, ours: Row, theirs: Row) -> str:
    """Ours at four times the training length, the Transformer at it."""
    far, near = (statistics.mean(shares_of(row, test)) for row, test in ((ours, FAR), (theirs, NEAR)))
    verdict = "no worse" if far >= near else "**worse**"
    each = ", ".join(f"{100 * share:.1f}%" for share in shares_of(ours, FAR))
    there = statistics.mean(shares_of(theirs, FAR))
    return (
        f"{study.label.capitalize()}: at {FAR}, ours says {far:.1%} of the values rightly (seeds: {each}), which is "
        f"{verdict} than the Transformer at {NEAR}, {near:.1%}; at {FAR} the Transformer says {there:.1%}."
    )


def shares_of(row: Row, test: str) -> list[float]:
    """Of right answers, by seed."""
    return [cell["answers"][test] for cell in row.cells]
