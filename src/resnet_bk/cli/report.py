"""``resnet-bk report``."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from resnet_bk.cli.console import print_json, remark, result_console
from resnet_bk.errors import UserError

if TYPE_CHECKING:
    from resnet_bk.report.compare import RunComparison

COMPARISON = "comparison"


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Make a PDF and an HTML page of a benchmark's report.json; of two, say what differs by more than noise.

    Both have the same content: findings in sentences, a section for each measurement, machine and versions. The HTML
    page is one file that works offline, with plots that tell what is at the pointer.

    Examples:
      resnet-bk report runs/bench/report.json
      resnet-bk report runs/bench/report.json --out paper.pdf --html none
      resnet-bk report before/report.json after/report.json
      resnet-bk report --schema > report.schema.json
    """

    reports: tyro.conf.Positional[tuple[Path, ...]] = ()
    """The report.json that `resnet-bk bench` wrote, or its folder; or two of them: the earlier run first."""
    out: Path | None = None
    """The PDF; by default beside the JSON, as report.pdf, of two beside the second, as comparison.pdf."""
    html: Path | None = None
    """The HTML page; by default beside the PDF. `none` for no page."""
    schema: bool = False
    """Print the JSON Schema of report.json, and do nothing else."""
    json: bool = False
    """Print the files' paths, and of two reports what changed, as one JSON document on standard output."""

    def run(self) -> None:
        """Writes the files and prints their paths, after what changed."""
        if self.schema:
            from resnet_bk.schema import json_schema

            print_json(json_schema())
        elif len(self.reports) == 1:
            self._one(_inside(self.reports[0]))
        elif len(self.reports) == 2:
            self._two(*map(_inside, self.reports))
        else:
            raise UserError(f"{len(self.reports)} reports were named; name one, or two to compare them")

    def _one(self, report: Path) -> None:
        from resnet_bk.report.write import write_report

        pdf, html = self._paths(report.parent / f"{report.stem or 'report'}.pdf", report)
        write_report(report, pdf_path=pdf, html_path=html)
        if self.json:
            print_json({"report": str(report), **_files(pdf, html)})
        else:
            _print_paths(pdf, html)

    def _two(self, first: Path, second: Path) -> None:
        import msgspec

        from resnet_bk.report.write import write_comparison

        pdf, html = self._paths(second.parent / f"{COMPARISON}.pdf", first, second)
        found = write_comparison(first, second, pdf_path=pdf, html_path=html)
        if self.json:
            changed = msgspec.to_builtins(found)
            print_json({"first": str(first), "second": str(second), **_files(pdf, html), "comparison": changed})
        else:
            _print_changes(found)
            _print_paths(pdf, html)

    def _paths(self, default: Path, *reports: Path) -> tuple[Path, Path | None]:
        """Where the PDF and the page go, which is nowhere that something is read from."""
        pdf = self.out or default
        page = pdf.parent / f"{pdf.stem}.html" if self.html is None else self.html
        html = None if str(page) == "none" else page
        for option, path in (("--out", pdf), ("--html", html)):
            if path is not None and path.resolve() in {report.resolve() for report in reports}:
                raise UserError(f"{path} is the report that is read, and would be written over; give {option} a path")
        return pdf, html


def _inside(path: Path) -> Path:
    """A folder that `bench` made stands for the report in it."""
    report = path / "report.json"
    return report if os.path.isfile(report) else path  # noqa: PTH113  # Path raises where a name is too long


def _files(pdf: Path, html: Path | None) -> dict[str, str | None]:
    return {"pdf": str(pdf), "html": None if html is None else str(html)}


def _print_paths(pdf: Path, html: Path | None) -> None:
    """The PDF last: it is what a script takes."""
    for path in (html, pdf):
        if path is not None:
            result_console.print(str(path), markup=False, soft_wrap=True)


def _print_changes(found: "RunComparison") -> None:
    """What limits the comparison, then a table of what changed by more than noise."""
    from rich.table import Table
    from rich.text import Text

    from resnet_bk.report.comparison import changed_rows, sentences

    said, grave = sentences(found)
    for sentence in grave:
        remark(f"note: {sentence}")
    rows = changed_rows(found)
    if rows:
        table = Table("model", "figure", "first", "second", "change", box=None, pad_edge=False)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        result_console.print(table)
    else:
        result_console.print("No difference exceeds the noise.", markup=False)
    result_console.print(said[-1], markup=False, soft_wrap=True)
