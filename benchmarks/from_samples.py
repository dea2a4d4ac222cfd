"""Ratios and exponents of a published report, made anew of its own samples.

    python benchmarks/from_samples.py benchmarks/results/gpu/report.json          # writes them
    python benchmarks/from_samples.py benchmarks/results/gpu/report.json --check  # says whether they are those

For reports that were measured before their statistics changed: samples, medians and everything else stay as they are.
"""

import argparse
import dataclasses
from pathlib import Path

from resnet_bk.bench.contestants import BASELINE, OURS
from resnet_bk.bench.scaling import exponents_of
from resnet_bk.bench.timing import MARGIN, blocks_of, ratios_of
from resnet_bk.files import write_json
from resnet_bk.schema import Report, ScalingResult, TimingResult, read_report, to_json

RESAMPLES = 2000  # of the bootstrap that a single build has


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if they are others")
    arguments = parser.parse_args()
    before = read_report(arguments.report)
    wanted = made_anew(before)
    if arguments.check:
        print("as its samples have them" if wanted == before else "not what its samples come to")
        return int(wanted != before)
    write_json(arguments.report, to_json(wanted))
    return 0


def made_anew(report: Report) -> Report:
    """The same report with what follows from its samples."""
    results = report.results
    timing = None if results.timing is None else _timing(results.timing)
    scaling = None if results.scaling is None else _scaling(results.scaling)
    return dataclasses.replace(report, results=dataclasses.replace(results, timing=timing, scaling=scaling))


def _timing(result: TimingResult) -> TimingResult:
    samples = {(row.phase, row.contestant): row.seconds.samples for row in result.phases}
    compared = (OURS, BASELINE) if result.ratios else None
    ratios = ratios_of(samples, blocks_of(result.rounds, result.builds), compared, RESAMPLES)
    return dataclasses.replace(result, margin=MARGIN, ratios=ratios)


def _scaling(result: ScalingResult) -> ScalingResult:
    axes = [dataclasses.replace(axis, exponents=exponents_of(axis.axis, axis.points)) for axis in result.axes]
    return dataclasses.replace(result, axes=axes)


if __name__ == "__main__":
    raise SystemExit(main())
