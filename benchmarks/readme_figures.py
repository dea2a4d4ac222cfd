"""Puts measured figures into the README: the table between its markers, and the picture.

    python benchmarks/readme_figures.py            # writes README.md and docs/images/convergence.svg
    python benchmarks/readme_figures.py --check    # says whether the README's table is that of the committed results

Reads only the reports under benchmarks/results/, which `make demo` (cpu) and benchmarks/gpu.py (gpu) made.
"""

import argparse
from pathlib import Path

from resnet_bk.files import write_text
from resnet_bk.report.blocks import Plot
from resnet_bk.report.sections import convergence
from resnet_bk.report.wording import interval
from resnet_bk.schema import Report, read_report

ROOT = Path(__file__).parents[1]
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "images" / "convergence.svg"
REPORTS = {name: ROOT / "benchmarks" / "results" / name / "report.json" for name in ("cpu", "gpu")}
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
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
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    reports = {name: read_report(path) for name, path in REPORTS.items() if path.exists()}
    wanted = f"{before}{BEGIN}\n{table(reports)}\n{END}{after}"
    if check:
        print("up to date" if wanted == text else "README.md does not show the committed results")
        return int(wanted != text)
    write_text(README, wanted)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    write_text(PICTURE, picture(reports["cpu"]))
    return 0


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
    found = {"FLOPs of a training step": f"{results.flops.ratio:.2f}"}
    found |= {PHASES[row.phase]: interval(row.ratio) for row in results.timing.ratios if row.phase in PHASES}
    found["peak memory of a training step"] = f"{results.memory.ratio:.2f}"
    losses = {
        arm.key: loss
        for arm in results.convergence.arms
        if arm.seed == results.convergence.seeds[0] and (loss := convergence.final_loss(arm)) is not None
    }
    tokens = results.convergence.steps * results.convergence.tokens_per_step
    found["held-out loss, the Transformer's against ours"] = (
        f"{losses['transformer']:.2f} against {losses['resnet-bk']:.2f} after {tokens:,} tokens, one seed "
        f"(unigram {results.convergence.unigram_entropy:.2f})"
    )
    return found


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
