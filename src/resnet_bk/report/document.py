"""The whole document: title, summary, one section for each result, and how it was made."""

import shlex
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from resnet_bk.report import summary
from resnet_bk.report.blocks import Block, Code, Note, Paragraph, Section, Table
from resnet_bk.report.findings import busy_cells
from resnet_bk.report.sections import convergence, flops, memory, scaling, stability, timing
from resnet_bk.report.wording import shortened
from resnet_bk.schema import Arm, CellStatus, Contestant, LossDifference, Report, SweepPoint

LABEL_LETTERS, MESSAGE_LETTERS = 32, 160
FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_experts",
    "intermediate_size",
    "mixer",
    "conv_size",
    "max_position_embeddings",
    "tie_word_embeddings",
)
HEADS = {
    "resolvent": "num_resolvent_heads",
    "bk": "num_bk_heads",
    "attention": "num_attention_heads",
    "local": "num_attention_heads",
}


@dataclass(frozen=True, kw_only=True)
class Document:
    """What the PDF and the HTML page show; the first section is the page in front."""

    title: str
    subtitle: str
    sections: list[Section]


def compose(report: Report) -> Document:
    """Everything that there is to say about the measurements in ``report``."""
    report = _with_short_labels(report)
    results = report.results
    sections = [summary.build(report)]
    if results.flops:
        sections.append(flops.build(report, results.flops))
    if results.timing:
        sections.append(timing.build(report, results.timing))
    if results.memory:
        sections.append(memory.build(report, results.memory))
    if results.convergence:
        sections.append(convergence.build(report, results.convergence))
    if results.scaling:
        sections.append(scaling.build(report, results.scaling))
    if results.stability:
        sections.append(stability.build(report, results.stability))
    sections.append(provenance(report))
    return Document(
        title=f"{report.ours.label} against {report.baseline.label}",
        subtitle=f"Benchmark report, profile {report.profile['name']}, {report.created.partition('T')[0]}",
        sections=sections,
    )


def _with_short_labels(report: Report) -> Report:
    """Labels that fit into a legend and the head of a column; what a model was made of stands at the end in full."""
    contestants = [_shortly(model) for model in report.contestants]
    learned = report.results.convergence
    if learned is not None:
        learned = replace(
            learned,
            arms=[_shortly(arm) for arm in learned.arms],
            sweep=[_shortly(point) for point in learned.sweep],
            differences=[_shortly(row) for row in learned.differences],
        )
    return replace(report, contestants=contestants, results=replace(report.results, convergence=learned))


Labelled = TypeVar("Labelled", Contestant, Arm, SweepPoint, LossDifference)


def _shortly(labelled: Labelled) -> Labelled:
    return replace(labelled, label=shortened(labelled.label, LABEL_LETTERS))


def provenance(report: Report) -> Section:
    """How to measure it all again, on what it was measured, and how each cell went."""
    blocks: list[Block] = [
        Paragraph(text="The same measurements again:"),
        Code(text=shlex.join(["resnet-bk", *report.command])),
        Table(
            caption="Machine, versions and workload",
            header=["", ""],
            rows=[[name, value] for name, value in facts(report).items()],
            align=["left", "left"],
        ),
        _models(report),
        *_cells(report),
    ]
    return Section(title="How this report was made", blocks=blocks)


def facts(report: Report) -> dict[str, str]:
    """Machine, versions and workload in words."""
    return {**_machine(report.environment), **_workload(report)}


def _cells(report: Report) -> list[Block]:
    """How the measurements went: by section, and one by one those that failed or were disturbed."""
    if not report.cells:
        return [Note(text="No cell was measured.", grave=True)]
    sections: dict[str, list[CellStatus]] = {}
    for name, status in report.cells.items():
        sections.setdefault(name.partition("/")[0], []).append(status)
    blocks: list[Block] = [
        Table(
            caption="Cells, each measured in a process of its own. Waited: the largest share of its time in which a "
            "cell's threads were ready and had no processor, because of others",
            header=["section", "cells", "without figure", "seconds", "waited"],
            rows=[
                [
                    name,
                    str(len(statuses)),
                    str(sum(status.failure is not None for status in statuses)),
                    f"{sum(status.seconds for status in statuses):,.0f}",
                    _waited(statuses),
                ]
                for name, statuses in sections.items()
            ],
        )
    ]
    notable = {name: status for name, status in report.cells.items() if status.failure is not None}
    notable |= busy_cells(report)
    if notable:
        blocks.append(
            Table(
                caption="Cells that gave no figure, or whose figures are doubtful",
                header=["cell", "what happened", "seconds", "waited"],
                rows=[
                    [name, _happened(status), f"{status.seconds:,.0f}", _waited([status])]
                    for name, status in notable.items()
                ],
                align=["left", "left", "right", "right"],
            )
        )
    return blocks


def _happened(status: CellStatus) -> str:
    if status.failure is None:
        return "measured while others used the machine"
    return f"{status.failure.kind}: {shortened(status.failure.message, MESSAGE_LETTERS)}"


def _waited(statuses: list[CellStatus]) -> str:
    known = [status.waited for status in statuses if status.waited is not None]
    return f"{max(known):.1%}" if known else "not told"


def _machine(environment: dict[str, Any]) -> dict[str, str]:
    hardware = environment["hardware"]
    gpu = hardware["gpu"]
    return {
        "CPU": f"{hardware['cpu']}, {hardware['cores']} cores",
        "memory": f"{hardware['memory_bytes'] / 1e9:.1f} GB",
        "GPU": f"{gpu['name']}, {gpu['memory_bytes'] / 1e9:.1f} GB, CUDA {gpu['cuda']}" if gpu else "none",
        "system": f"{environment['system']}, Python {environment['python']}",
        "packages": ", ".join(f"{name} {version}" for name, version in environment["packages"].items()),
        "commit": str(environment["commit"] or "not run from a checkout"),
    }


def _workload(report: Report) -> dict[str, str]:
    work = report.workload
    return {
        "data": f"{work.data}: {work.description}",
        "tokens": f"{work.train_tokens:,} to train on, {work.validation_tokens:,} to validate on, "
        f"{work.test_tokens:,} to test on ({work.split})",
        "tokenizer": f"{work.tokenizer}, {work.vocab_size:,} tokens",
        "batch": f"{work.batch_size} sequences of {work.sequence_length} tokens, seed {work.seed}",
        "computed": f"in {work.precision} on {work.device}, {work.threads} threads",
        "measured": report.created,
    }


def _models(report: Report) -> Table:
    """Fields that a reader needs to build the models again: those of the preset and those that differ. Of a model that
    is not ours, what it was made of."""
    models = report.contestants
    own = [model for model in models if model.config.get("mixer") in HEADS]
    shown = [*FIELDS, *(HEADS[str(model.config["mixer"])] for model in own)]
    first = own[0].config if own else {}
    differing = [name for name in first if any(first[name] != model.config.get(name) for model in own)]
    names = list(dict.fromkeys([*shown, *differing])) if own else []
    rows = [["made of", *(model.source for model in models)]]
    rows += [[name, *(_field(model, name) for model in models)] for name in names]
    rows.append(["parameters", *(f"{model.parameters:,}" for model in models)])
    rows.append(
        [
            "of these active per token",
            *("" if model.active_parameters is None else f"{model.active_parameters:,}" for model in models),
        ]
    )
    return Table(
        caption=f"Models (preset {report.workload.preset})",
        header=["field", *(model.label for model in models)],
        rows=rows,
    )


def _field(model: Contestant, name: str) -> str:
    return str(model.config[name]) if name in model.config else ""
