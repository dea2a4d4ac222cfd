"""``resnet-bk report``."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from resnet_bk.cli.console import print_json, result_console


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Make a PDF of a benchmark's report.json: summary, tables, plots, machine and versions.

    Examples:
      resnet-bk report runs/bench/report.json
      resnet-bk report runs/bench/report.json --out comparison.pdf
    """

    report: tyro.conf.Positional[Path]
    """The report.json that `resnet-bk bench` wrote."""
    out: Path | None = None
    """The PDF; by default beside the JSON, as report.pdf."""
    json: bool = False
    """Print the PDF's path as one JSON document on standard output."""

    def run(self) -> None:
        """Writes the PDF and prints its path."""
        from resnet_bk.report.pdf import write_pdf

        path = write_pdf(self.report, self.out or self.report.with_suffix(".pdf"))
        if self.json:
            print_json({"report": str(self.report), "pdf": str(path)})
        else:
            result_console.print(str(path), markup=False, soft_wrap=True)
