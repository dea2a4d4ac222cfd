"""From report.json to the files that people read."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from resnet_bk.errors import UserError
from resnet_bk.files import make_directory, write_bytes
from resnet_bk.report import comparison, document, html, pdf
from resnet_bk.report.compare import RunComparison, compare_runs
from resnet_bk.report.document import Document
from resnet_bk.schema import Report, read_report

T = TypeVar("T")
Rendered = tuple[bytes, bytes | None]


def write_pdf(report: Path, out: Path) -> Path:
    """Makes the PDF of a report.json and returns its path.

    Raises:
        UserError: the report is missing or damaged, or ``out`` cannot be written.
    """
    write_report(report, pdf_path=out, html_path=None)
    return out


def write_report(report: Path, *, pdf_path: Path, html_path: Path | None) -> None:
    """Makes the PDF of a report.json, and the same as an HTML page if that has a path.

    Raises:
        UserError: the report is missing or damaged, or a file cannot be written.
    """
    _check_names(pdf_path, html_path)
    read = read_report(report)
    made = _composed(report, lambda: _rendered(document.compose(read), with_page=html_path is not None))
    _write(made, pdf_path, html_path)


def write_comparison(first: Path, second: Path, *, pdf_path: Path, html_path: Path | None) -> RunComparison:
    """Compares two runs, makes the PDF and the HTML page, and returns what was found.

    Raises:
        UserError: a report is missing or damaged, or a file cannot be written.
    """
    _check_names(pdf_path, html_path)
    reports = read_report(first), read_report(second)
    with_page = html_path is not None
    found, made = _composed(second, lambda: _compared(*reports, with_page=with_page))
    _write(made, pdf_path, html_path)
    return found


def _compared(first: Report, second: Report, *, with_page: bool) -> tuple[RunComparison, Rendered]:
    found = compare_runs(first, second)
    return found, _rendered(comparison.compose(first, second, found), with_page=with_page)


def _rendered(composed: Document, *, with_page: bool) -> Rendered:
    """The PDF, and the HTML page if there is to be one: all that can fail before anything is written."""
    return pdf.typeset(composed), html.page(composed).encode() if with_page else None


def _check_names(pdf_path: Path, html_path: Path | None) -> None:
    if pdf_path.suffix.lower() != ".pdf":
        raise UserError(f"{pdf_path} does not end in .pdf; choose a name that does")
    if html_path is not None and html_path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{html_path} does not end in .html; choose a name that does, or none")


def _composed(path: Path, compose: Callable[[], T]) -> T:
    try:
        return compose()
    except (KeyError, TypeError, IndexError, ValueError, ArithmeticError, AttributeError, SyntaxError) as error:
        raise UserError(
            f"{path} lacks what the report needs ({type(error).__name__}: {error}); make it again with "
            "`resnet-bk bench`"
        ) from error


def _write(made: Rendered, pdf_path: Path, html_path: Path | None) -> None:
    of_pdf, of_page = made
    make_directory(pdf_path.parent)
    write_bytes(pdf_path, of_pdf)
    if html_path is not None and of_page is not None:
        make_directory(html_path.parent)
        write_bytes(html_path, of_page)
