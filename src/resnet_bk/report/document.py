"""The whole document: title, summary, one section for each result, and how it was made."""

from dataclasses import dataclass
from typing import Any

from resnet_bk.report import summary
from resnet_bk.report.blocks import Block, Code, Paragraph, Section, Table
from resnet_bk.report.sections import convergence, flops, memory, scaling, stability, timing
from resnet_bk.schema import Report


@dataclass(frozen=True, kw_only=True)
class Document:
    """What the template prints."""

    title: str
    subtitle: str
    sections: list[Section]


def compose(report: Report) -> Document:
    """Everything that there is to say about the measurements in ``report``."""
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
    sections.append(_provenance(report))
    return Document(
        title="ResNet-BK against a Transformer",
        subtitle=f"Benchmark report, profile {report.profile['name']}, {report.created.partition('T')[0]}",
        sections=sections,
    )


def _provenance(report: Report) -> Section:
    blocks: list[Block] = [
        Paragraph(text="The same measurements again:"),
        Code(text=" ".join(["resnet-bk", *report.command])),
        Table(
            caption="Machine, versions and workload",
            header=["", ""],
            rows=[[name, value] for name, value in _facts(report).items()],
            align=["left", "left"],
        ),
        _models(report),
    ]
    return Section(title="How this report was made", blocks=blocks)


def _facts(report: Report) -> dict[str, str]:
    took = {"took": ", ".join(f"{name} {status.seconds:,.0f} s" for name, status in report.status.items())}
    return {**_machine(report.environment), **_workload(report), **(took if report.status else {})}


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
        "tokens": f"{work.train_tokens:,} to train on, {work.validation_tokens:,} held out ({work.split})",
        "tokenizer": f"{work.tokenizer}, {work.vocab_size:,} tokens",
        "batch": f"{work.batch_size} sequences of {work.sequence_length} tokens, seed {work.seed}",
        "computed": f"in {work.precision} on {work.device}, {work.threads} threads",
        "measured": report.created,
    }


def _models(report: Report) -> Table:
    """Only the fields that a reader needs to build the models again: those of the preset and those that differ."""
    models = report.contestants
    first = models[0].config
    shown = ["hidden_size", "num_layers", "num_experts", "mixer", "max_position_embeddings", "tie_word_embeddings"]
    heads = {"resolvent": "num_resolvent_heads", "bk": "num_bk_heads", "attention": "num_attention_heads"}
    shown += [heads[model.config["mixer"]] for model in models]
    differing = [name for name in first if any(first[name] != model.config.get(name) for model in models)]
    # Older reports know no convolution.
    names = ["vocab_size", *dict.fromkeys([*shown, *(["conv_size"] if "conv_size" in first else []), *differing])]
    rows = [[name, *(str(model.config.get(name)) for model in models)] for name in names]
    rows.append(["parameters", *(f"{model.parameters:,}" for model in models)])
    rows.append(["of these active per token", *(f"{model.active_parameters:,}" for model in models)])
    return Table(
        caption=f"Models (preset {report.workload.preset})",
        header=["field", *(model.label for model in models)],
        rows=rows,
    )
