"""Looking at a document as a reader would."""

import io
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageFont

from resnet_bk.report import pdf
from resnet_bk.report.blocks import Bullets, Plot, Table

SVG = "{http://www.w3.org/2000/svg}"


def texts(section):
    """All that a section says."""
    for block in section.blocks:
        if isinstance(block, Bullets):
            yield from block.items
        elif isinstance(block, Table):
            yield block.caption
            yield from (" | ".join(row) for row in [block.header, *block.rows])
        else:
            yield getattr(block, "text", "")


def said(document):
    """All that a document says, line by line."""
    return "\n".join(text for section in document.sections for text in texts(section))


def plots(document):
    return [block for section in document.sections for block in section.blocks if isinstance(block, Plot)]


def marks(svg):
    """Texts of the points of a plot."""
    root = ElementTree.fromstring(svg)
    return [circle.find(f"{SVG}title").text for circle in root.iter(f"{SVG}circle")]


def cut_texts(svg):
    """Labels of which a part is outside of the picture."""
    root = ElementTree.fromstring(svg)
    *_, width, height = (float(number) for number in root.get("viewBox").split())
    for element in root.iter(f"{SVG}text"):
        left, top, right, bottom = _box(element)
        if left < -1 or top < -1 or right > width + 1 or bottom > height + 1:
            yield element.text


def _box(element):
    """Where a text is, in the picture's own units."""
    style = dict(part.split(": ", 1) for part in element.get("style").split("; ") if ": " in part)
    size = float(style["font-size"].removesuffix("px"))
    font = ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 100)
    length = font.getlength(element.text) * size / 100
    begin = {"middle": -length / 2, "end": -length}.get(style.get("text-anchor"), 0.0)
    x, y = _place(element)
    upright = "rotate(-90" in element.get("transform", "")
    if upright:
        return x - size, y - begin - length, x + 0.3 * size, y - begin
    return x + begin, y - size, x + begin + length, y + 0.3 * size


def _place(element):
    if element.get("x") is not None:
        return float(element.get("x")), float(element.get("y"))
    moved = element.get("transform").partition("translate(")[2].partition(")")[0]
    return tuple(float(number) for number in moved.replace(",", " ").split())


def pages(document, ppi=36):
    """Every page as grey values."""
    drawn = pdf.compiled(document, format="png", ppi=ppi)
    for page in drawn if isinstance(drawn, list) else [drawn]:
        yield np.asarray(Image.open(io.BytesIO(page)).convert("L"))
