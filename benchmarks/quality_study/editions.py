"""The study as it is, and the earlier one, whose code is no longer here: results with what tables need of them."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from quality_study.cells import Cell, Results, nothing
from quality_study.contestants import CONTESTANTS
from quality_study.studies import PUBLISHED, STUDIES, Study
from resnet_bk.files import read_json

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True, kw_only=True)
class Edition:
    """``results`` of all machines, ``files`` by their names; ``labels`` of contestants, in the order of tables;
    ``prefix`` of the document's markers. ``bases`` are the studies that have the base of others which lack it."""

    results: Results
    files: dict[str, Results]
    studies: dict[str, Study]
    labels: dict[str, str]
    prefix: str = ""
    bases: dict[str, str] = field(default_factory=dict)


LABELS = {name: contestant.label for name, contestant in CONTESTANTS.items()}
FIRST_LABELS = {
    "resolvent": "Resolvent",
    "attention": "Transformer",
    "gated": "real-gated linear attention (Mamba-2's kind)",
    "gated-delta": "Gated DeltaNet's recurrence (our torch form)",
    "deltanet": "Gated DeltaNet (flash-linear-attention)",
    "hybrid": "hybrid: rotary attention in every fourth block",
    "hybrid-half": "hybrid: rotary attention in every second block",
    "delta": "with delta-rule writes",
    "input-gate": "with an input gate",
    "gap-write": "writes as much as it forgets",
    "mamba2": "Mamba-2's decays and writes, no rotation",
    "linear-keys": "no silu on queries and keys",
    "linear-keys-no-rotation": "neither silu on them nor rotation",
    "linear-delta": "delta-rule writes, no silu on keys",
    "softmax-keys": "softmax over queries' and keys' coordinates",
    "taylor": "exp(a q.k) to second order, keys half as wide",
    "long": "memories from 16 tokens on",
}


def current() -> Edition:
    """What is measured of the library as it is."""
    return of_files(read("quality.json"))


def of_files(files: dict[str, Results]) -> Edition:
    """The study as it is, with these results."""
    studies = {name: STUDIES[name] for name in PUBLISHED}
    return Edition(results=_together(files), files=files, studies=studies, labels=LABELS)


def first() -> Edition:
    """The earlier study: the resolvent was ours, and the hybrid a contestant."""
    files = read("quality-first.json")
    results = _together(files)
    measured = {(cell.study, cell.contestant) for cell in map(Cell.named, results["cells"])}
    studies = {
        name: replace(
            STUDIES[name],
            contestants=tuple(label for label in FIRST_LABELS if (name, label) in measured),
            dropouts=(0.0,),  # one of each study, which its cells do not say
            base="resolvent" if name == "ablations" else "attention",
        )
        for name in PUBLISHED
        if any(study == name for study, _ in measured)
    }
    return Edition(
        results=results,
        files=files,
        studies=studies,
        labels=FIRST_LABELS,
        prefix="first-",
        bases={"ablations": "embedded-1m"},
    )


def read(name: str) -> dict[str, Results]:
    """The results of GPUs and of CPUs that have this name, by their paths in the repository."""
    paths = [RESULTS / kind / name for kind in ("gpu", "cpu")]
    return {path.relative_to(RESULTS.parents[1]).as_posix(): read_json(path) for path in paths if path.exists()}


def _together(files: dict[str, Results]) -> Results:
    """The cells of all machines: no study is on two of them."""
    return {**nothing(), "cells": {name: cell for results in files.values() for name, cell in results["cells"].items()}}
