"""A document as PDF, set by typst."""

import importlib.resources
import json
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import typst

from resnet_bk.report.blocks import Plot
from resnet_bk.report.document import Document

TEMPLATE = "template.typ"
LONG_WORD = re.compile(r"\S{25,}")
JOINT = re.compile(r"(?<=[/_.:,=-])(?=\w)")
MAY_BREAK = "\u200b"
UNJOINTED = re.compile(rf"[^\s{MAY_BREAK}]{{25,}}")


def typeset(document: Document) -> bytes:
    """The document as PDF: the same bytes for the same document, everywhere."""
    pdf = compiled(document, format="pdf")
    assert isinstance(pdf, bytes)
    return pdf


def compiled(document: Document, **options: Any) -> Any:
    """What typst makes of the document, with options of ``typst.compile``: pages as pictures, say."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        template = importlib.resources.files("resnet_bk.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
        content = _with_breaks(_with_plots_as_files(document, folder))
        (folder / "content.json").write_text(json.dumps(content), encoding="utf-8")
        # Only the fonts that typst and matplotlib carry.
        fonts = Path(mpl.get_data_path()) / "fonts" / "ttf"
        return typst.compile(
            str(folder / TEMPLATE), root=str(folder), ignore_system_fonts=True, font_paths=[str(fonts)], **options
        )


def _with_plots_as_files(document: Document, folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = asdict(document)
    blocks = [block for section in content["sections"] for block in section["blocks"]]
    for number, block in enumerate(block for block in blocks if block["kind"] == Plot.kind):
        file = f"plot-{number}.svg"
        (folder / file).write_text(block.pop("svg"), encoding="utf-8")
        block["file"] = file
    return content


def _with_breaks(content: Any) -> Any:
    """Long words may be broken: at their joints (paths, names of operators), or else anywhere. What is to be typed is
    left as it is."""
    if isinstance(content, str):
        jointed = LONG_WORD.sub(lambda word: JOINT.sub(MAY_BREAK, word[0]), content)
        return UNJOINTED.sub(lambda word: MAY_BREAK.join(word[0]), jointed)
    if isinstance(content, list):
        return [_with_breaks(value) for value in content]
    if isinstance(content, dict) and content.get("kind") != "code":
        return {name: _with_breaks(value) for name, value in content.items()}
    return content
