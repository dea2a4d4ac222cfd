"""Composes the document and has typst set it."""

import importlib.resources
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typst

from resnet_bk.errors import UserError
from resnet_bk.files import make_directory, write_bytes
from resnet_bk.report.blocks import Plot
from resnet_bk.report.document import Document, compose
from resnet_bk.schema import read_report

TEMPLATE = "template.typ"


def write_pdf(report_path: Path, out: Path) -> Path:
    """Makes the PDF of a report.json and returns its path.

    Raises:
        UserError: the report is missing or damaged, or ``out`` cannot be written.
    """
    report = read_report(report_path)
    if out.suffix.lower() != ".pdf":
        raise UserError(f"{out} does not end in .pdf; choose a name that does")
    try:
        document = compose(report)
    except (KeyError, TypeError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{report_path} lacks what the report needs ({type(error).__name__}: {error}); make it again with "
            "`resnet-bk bench`"
        ) from error
    make_directory(out.parent)
    write_bytes(out, typeset(document))
    return out


def typeset(document: Document) -> bytes:
    """The document as PDF."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        template = importlib.resources.files("resnet_bk.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
        content = _with_plots_as_files(document, folder)
        (folder / "content.json").write_text(json.dumps(content), encoding="utf-8")
        # Only the fonts that typst carries: the same PDF everywhere.
        pdf = typst.compile(str(folder / TEMPLATE), root=str(folder), ignore_system_fonts=True)
    assert isinstance(pdf, bytes)
    return pdf


def _with_plots_as_files(document: Document, folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = asdict(document)
    blocks = [block for section in content["sections"] for block in section["blocks"]]
    for number, block in enumerate(block for block in blocks if block["kind"] == Plot.kind):
        file = f"plot-{number}.svg"
        (folder / file).write_text(block.pop("svg"), encoding="utf-8")
        block["file"] = file
    return content
