"""Puts measured figures into the README: the tables between their markers, and the picture.

    python benchmarks/readme_figures.py            # writes README.md and docs/images/convergence.svg
    python benchmarks/readme_figures.py --check    # says whether the README's tables are those of the committed results

Reads only what is under benchmarks/results/: reports which `make demo` (cpu) and benchmarks/gpu.py (gpu, if there)
made, and what the other benchmarks wrote, each named in the table that shows it.
"""

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import frugal_gpu
from markers import between_markers
from quality_study.summary import difference
from quality_study.words import signed
from resnet_bk.environment import short_commit
from resnet_bk.files import read_json, write_text
from resnet_bk.report.blocks import Plot
from resnet_bk.report.sections import convergence
from resnet_bk.report.wording import interval
from resnet_bk.schema import ConvergenceResult, Report, read_report

ROOT = Path(__file__).parents[1]
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "images" / "convergence.svg"
REPORTS = {name: ROOT / "benchmarks" / "results" / name / "report.json" for name in ("cpu", "gpu")}
SHAKESPEARE = ROOT / "benchmarks" / "results" / "cpu" / "shakespeare.json"
STEPS = ROOT / "benchmarks" / "results" / "gpu" / "step.json"
THROUGHPUT, THROUGHPUT_TINY = (
    ROOT / "benchmarks" / "results" / "cpu" / name for name in ("throughput.json", "throughput-tiny.json")
)
DECODING = ROOT / "benchmarks" / "results" / "cpu" / "decoding.json"
FRUGAL, FRUGAL_GPU = (ROOT / "benchmarks" / "results" / kind / "frugal.json" for kind in ("cpu", "gpu"))
SPEEDS = {name: ROOT / "benchmarks" / "results" / name / "bk_core.json" for name in ("cpu", "gpu")}
PLANNER, PLANNER_GPU = (ROOT / "benchmarks" / "results" / kind / "planner.json" for kind in ("cpu", "gpu"))
AGREEMENTS = {name: ROOT / "benchmarks" / "results" / name / "timing_agreement.json" for name in ("cpu", "gpu")}
BUDGETS = ROOT / "benchmarks" / "results" / "gpu" / "planner-budgets.json"
PHASES = {
    "forward": "forward time",
    "backward": "backward time",
    "step": "training step time",
    "decode": "time a token",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the README is out of date")
    check = parser.parse_args().check
    text = README.read_text(encoding="utf-8")
    reports = {name: read_report(path) for name, path in REPORTS.items() if path.exists()}
    wanted = text
    contents = {
        "shakespeare": shakespeare_table(),
        "figures": table(reports),
        "agreement": agreement(),
        "cpu": cpu_table(),
        "steps": steps_table(),
        "speeds": speeds_table(),
        "planner": planner_table(),
        "frugal-gpu": frugal_gpu.table(read_json(FRUGAL_GPU)),
        "frugal": frugal_table(),
    }
    for name, content in contents.items():
        wanted = between_markers(wanted, name, content)
    if check:
        print("up to date" if wanted == text else "README.md does not show the committed results")
        return int(wanted != text)
    write_text(README, wanted)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    write_text(PICTURE, picture(reports["cpu"]))
    return 0


def shakespeare_table() -> str:
    """Losses on Tiny Shakespeare, as Markdown."""
    document = read_json(SHAKESPEARE)
    seeds = len(document["setting"]["seeds"])
    lines = [
        f"| mixer | parameters | test loss, mean of {seeds} seeds | loss on nanoGPT's validation split |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {row['parameters']:,} | {row['test_loss']:.3f} ± {row['test_loss_standard_error']:.3f} "
        f"| {row['nanogpt_loss']:.3f} ± {row['nanogpt_loss_standard_error']:.3f} |"
        for name, row in document["contestants"].items()
    ]
    lines.append(f"| nanoGPT as published | 0.80 million | | {document['nanogpt_published_loss']:.2f} |")
    shown = "\n".join(lines)
    test, held_out = (_less_attention(document, key) for key in ("test_loss", "nanogpt_loss"))
    trained = source({"environment": document["trained_on"]})
    compared = (
        f"The resolvent's loss less attention's, with 95% intervals, is {test} on the test half and {held_out} on all "
        f"that is held out, half of which chose the rates.{_at_an_edge(document)}"
    )
    cells = f"<sub>[benchmarks/shakespeare.py](benchmarks/results/cpu/shakespeare.json): {trained}</sub>"
    return f"{shown}\n\n{compared}\n\n{cells}"


def _less_attention(document: dict[str, Any], key: str) -> str:
    """By their seeds."""
    ours, theirs = (
        [losses[key] for losses in document["contestants"][name]["by_seed"].values()]
        for name in ("resolvent", "attention")
    )
    gap = difference(ours, theirs)
    assert gap is not None
    return signed(gap)


def _at_an_edge(document: dict[str, Any]) -> str:
    """Whose best rate is the smallest or largest that was tried: another might have done better still."""
    rates = document["setting"]["rates"]
    said = [
        f" {name.capitalize()} is best at {row['learning_rate']:g}, the {words} rate of the sweep."
        for name, row in document["contestants"].items()
        for rate, words in ((min(rates), "smallest"), (max(rates), "largest"))
        if row["learning_rate"] == rate
    ]
    return "".join(said)


def steps_table() -> str:
    """Whole training steps over the length, as Markdown."""
    document = read_json(STEPS)
    lines = [
        "| N | ResNet-BK, tokens/s | Transformer | ratio | the seed's mixer | peak memory of the three |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for point in document["points"]:
        rows = [point["models"][key] for key in ("resnet-bk", "transformer", "seed-mixer")]
        ours, theirs, seeds = (f"{row['tokens_per_second']:,.0f}" for row in rows)
        peaks = " / ".join(f"{row['peak_bytes'] / 1e9:.1f}" for row in rows)
        lines.append(
            f"| {point['sequence_length']:,} | {ours} | {theirs} | {point['speedup']:.2f} | {seeds} | {peaks} GB |"
        )
    shown = "\n".join(lines)
    return f"{shown}\n\n<sub>[steps](benchmarks/results/gpu/step.json): {source(document)}</sub>"


def cpu_table() -> str:
    """Training over the length and decoding over the context on a CPU, as Markdown."""
    training, tiny, decoding = (read_json(path) for path in (THROUGHPUT, THROUGHPUT_TINY, DECODING))
    lines = ["| on a CPU | ResNet-BK, tokens/s | Transformer, tokens/s | ratio |", "| --- | --- | --- | --- |"]
    rows = [(f"training, width 128, N = {point['sequence_length']:,}", point) for point in training["points"]]
    rows += [(f"training, preset `tiny`, N = {point['sequence_length']:,}", point) for point in tiny["points"]]
    rows += [(f"decoding behind {point['context']:,} tokens", point) for point in decoding["points"]]
    for name, point in rows:
        ours, theirs = point["models"]["resnet-bk"], point["models"].get("transformer")
        within = " ({:.2f} to {:.2f})".format(*point["speedup_interval"]) if "speedup_interval" in point else ""
        shown = f"{theirs['tokens_per_second']:,.1f} | {point['speedup']:.2f}{within}" if theirs else "| "
        lines.append(f"| {name} | {ours['tokens_per_second']:,.1f} | {shown} |")
    shown = "\n".join(lines)
    low, high = decoding["longest_over_shortest_interval"]
    flat = f"{decoding['longest_over_shortest']:.3f} ({low:.3f} to {high:.3f})"
    return (
        f"{shown}\n\nA token of ResNet-BK behind 65,536 tokens takes {flat} times as long as one behind 1,024.\n\n"
        f"<sub>training, [width 128](benchmarks/results/cpu/throughput.json): {source(training)}, "
        f"[`tiny`](benchmarks/results/cpu/throughput-tiny.json): {source(tiny)}; "
        f"[decoding](benchmarks/results/cpu/decoding.json): {source(decoding)}</sub>"
    )


def speeds_table() -> str:
    """BK-Core's speed in shares of the copy bandwidth, as Markdown."""
    lines = ["| BK-Core, rows x tokens x heads | forward | backward | bidirectional |", "| --- | --- | --- | --- |"]
    sources = []
    for name, path in SPEEDS.items():
        document = read_json(path)
        for row in document["shapes"]:
            shares = (f"{row[phase]['share_of_copy']:.0%}" for phase in ("forward", "backward", "bidirectional"))
            shape = " x ".join(f"{size:,}" for size in row["shape"])
            lines.append(f"| {name.upper()}, {shape} | {' | '.join(shares)} |")
        copied = document["copy_bytes_per_second"] / 1e9
        sources.append(f"[{name}](benchmarks/results/{name}/bk_core.json): {source(document)}, copy {copied:,.0f} GB/s")
    shown = "\n".join(lines)
    return f"{shown}\n\n<sub>{'; '.join(sources)}</sub>"


def planner_table() -> str:
    """Predicted against measured, by where it was measured."""
    document, on_gpu, budgets = (read_json(path) for path in (PLANNER, PLANNER_GPU, BUDGETS))
    trials = [row for row in budgets["trials"] if "errors" in row]
    rows = [
        ("CPU: tensors of ResNet-BK, every strategy", _errors(document, "tensor_bytes", "ours")),
        ("CPU: tensors of GPT-2, Llama, GPT-NeoX", _errors(document, "tensor_bytes", "foreign")),
        ("GPU: steps of all of these, allocated", _errors(on_gpu, "allocated_bytes")),
        ("GPU: the same, reserved", _errors(on_gpu, "reserved_bytes")),
        ("GPU: `100m` and `1b` in budgets, allocated", [row["errors"]["allocated_bytes"] for row in trials]),
        ("GPU: the same, reserved", [row["errors"]["reserved_bytes"] for row in trials]),
        ("GPU: the same, host memory over a bare process", [row["errors"]["host_bytes"] for row in trials]),
    ]
    lines = [
        "| predicted peak against the measured one | runs | median of the error's size | least | largest |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, errors in rows:
        size = median(abs(error) for error in errors)
        lines.append(f"| {name} | {len(errors)} | {size:.2%} | {min(errors):+.2%} | {max(errors):+.2%} |")
    counts = budgets["summary"]["counts"]
    edges = (
        f"With exactly the predicted budget {counts['fits']['as_planned']} of {counts['fits']['trials']} ways to train "
        f"ran; with one that the prediction misses by 10% {counts['misses']['as_planned']} of "
        f"{counts['misses']['trials']} ran out of memory; in round budgets, by the way that the search chose, "
        f"{counts['chosen']['as_planned']} of {counts['chosen']['trials']} ran."
    )
    where = (
        f"[CPU](benchmarks/results/cpu/planner.json): {source(document)}; "
        f"[GPU](benchmarks/results/gpu/planner.json), [budgets](benchmarks/results/gpu/planner-budgets.json): "
        f"{source(on_gpu)}"
    )
    if "predicted_in" in on_gpu:
        anew = {"environment": on_gpu["predicted_in"]}
        where += f"; its steps predicted by {source(anew)}"
    return "\n".join([*lines, "", edges, "", f"<sub>{where}</sub>"])


def _errors(document: dict[str, Any], figure: str, kind: str | None = None) -> list[float]:
    rows = [row for row in document["cells"] if "error" in row]
    return [row["error"][figure] for row in rows if kind in (None, row["kind"])]


def frugal_table() -> str:
    """What each strategy needs and costs, as Markdown: those of mixed precision, beside plain float32."""
    document = read_json(FRUGAL)
    lines = [
        "| training | on the device | of it activations | on the host | planner's error | time of a step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    plain, *others = document["strategies"]
    for row in (plain, *(row for row in others if row["training"]["precision"] != "fp32")):
        device, activations, host = (f"{row['bytes'][part] / 1e6:,.0f} MB" for part in ("peak", "activations", "host"))
        slower = median(ours / theirs for ours, theirs in zip(row["samples"], plain["samples"], strict=True))
        lines.append(
            f"| {row['name']} | {device} | {activations} | {host} | {row['planner_error']:+.0%} | {slower:.2f} |"
        )
    shown, model = "\n".join(lines), document["model"]
    shape = f"batch {document['batch_size']} x {document['sequence_length']}"
    return (
        f"{shown}\n\n<sub>[strategies](benchmarks/results/cpu/frugal.json): {document['parameters']:,} parameters, "
        f"{model['num_layers']} layers of {model['hidden_size']}, {shape}, in plain float32's time; {source(document)}"
        "</sub>"
    )


def agreement() -> str:
    """How far the benchmark's times are from those of other tools."""
    found = []
    for name, path in AGREEMENTS.items():
        document = read_json(path)
        most = max(abs(row["difference"]) for row in document["callables"].values())
        where = f"[{name}](benchmarks/results/{name}/timing_agreement.json): {source(document)}"
        found.append(f"{most:.1%} from `{document['tool']}` ({where})")
    return (
        "The benchmark's times of the same calls, a matrix product and forward passes and steps of both models, differ "
        f"at most by {' and by '.join(found)}."
    )


def source(document: dict[str, Any]) -> str:
    """Machine, commit and torch of a result."""
    environment = document["environment"]
    hardware = environment["hardware"]
    threads = "1 thread" if hardware["threads"] == 1 else f"{hardware['threads']} threads"
    name = hardware["gpu"]["name"] if hardware["gpu"] else f"{hardware['cpu']}, {threads}"
    return f"{name}, commit {short_commit(environment['commit'])}, torch {environment['packages']['torch']}"


def table(reports: dict[str, Report]) -> str:
    """Ratios of the Transformer's figures to ours, one column a machine, as Markdown."""
    columns = {name: ratios(report) for name, report in reports.items()}
    header = ["Transformer's figure over ResNet-BK's", *(machine(report) for report in reports.values())]
    rows = [[row, *(column[row] for column in columns.values())] for row in next(iter(columns.values()))]
    lines = [header, ["---"] * len(header), *rows]
    shown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    sources = ", ".join(
        f"[{name}](benchmarks/results/{name}/report.json): {report.created[:10]}, "
        f"commit {report.environment['commit']}, torch {report.environment['packages']['torch']}"
        for name, report in reports.items()
    )
    return f"{shown}\n\n<sub>{sources}</sub>"


def ratios(report: Report) -> dict[str, str]:
    """The rows of one machine."""
    results = report.results
    assert results.flops and results.timing and results.memory and results.convergence
    learned = results.convergence
    found = {"FLOPs of a training step": _count(results.flops.ratio)}
    found |= {PHASES[row.phase]: interval(row.ratio) for row in results.timing.ratios if row.phase in PHASES}
    found["peak memory of a training step"] = _count(results.memory.ratio)
    losses = {model.key: _mean_loss(learned, model.key) for model in (report.ours, report.baseline)}
    tokens = learned.steps * learned.tokens_per_step
    seeds = "one seed" if len(learned.seeds) == 1 else f"mean of {len(learned.seeds)} seeds"
    found["test loss, the Transformer's against ours"] = (
        f"{losses[report.baseline.key]} against {losses[report.ours.key]} after {tokens:,} tokens, {seeds} "
        f"(unigram {learned.unigram_entropy:.2f})"
    )
    return found


def _count(ratio: float | None) -> str:
    return "not measured" if ratio is None else f"{ratio:.2f}"


def _mean_loss(result: ConvergenceResult, key: str) -> str:
    losses = [convergence.final_loss(arm) for arm in result.arms if arm.key == key]
    known = [loss for loss in losses if loss is not None]
    return f"{sum(known) / len(known):.2f}" if known and len(known) == len(losses) else "diverged"


def machine(report: Report) -> str:
    """Where it was measured."""
    hardware = report.environment["hardware"]
    if report.workload.device == "cuda":
        return str(hardware["gpu"]["name"])
    return f"{hardware['cpu'].replace('(R)', '')}, {report.workload.threads} threads"


def picture(report: Report) -> str:
    """The convergence plot of a report, as SVG."""
    assert report.results.convergence
    blocks = convergence.build(report, report.results.convergence).blocks
    return next(block.svg for block in blocks if isinstance(block, Plot))


if __name__ == "__main__":
    raise SystemExit(main())
