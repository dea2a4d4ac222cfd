"""A document as one HTML page that needs nothing else: no network, no other file; plots tell what is at the pointer."""

import importlib.resources
import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from resnet_bk.report.blocks import Block, Bullets, Code, Note, Paragraph, Plot, Section, Table
from resnet_bk.report.document import Document

STYLE, SCRIPT = "page.css", "page.js"
# The browser itself refuses whatever is not in the file.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
NAMESPACE = re.compile(r"^\{[^}]*\}")
REFERENCE = re.compile(r"url\(#([^)]+)\)")
# What a plot has in print, and what it has where the page may be dark.
COLOURS = {
    "#000000": "var(--ink)",
    "#ffffff": "var(--page)",
    "#e3e3e3": "var(--grid)",
    "#666666": "var(--soft)",
    "#0072b2": "var(--accent)",
}
FAMILY = re.compile(r"font-family:[^;]*;?")


def page(document: Document) -> str:
    """The whole page. All words are text: nothing in them is read as markup."""
    root = Element("html", {"lang": "en"})
    _head(root, document)
    body = SubElement(root, "body")
    header = SubElement(body, "header")
    _text(header, "h1", document.title)
    _text(header, "p", document.subtitle)
    contents = SubElement(SubElement(body, "nav", {"aria-label": "Contents"}), "ol")
    main = SubElement(body, "main")
    plots = 0
    for number, section in enumerate(document.sections, start=1):
        name = f"section-{number}"
        _text(SubElement(contents, "li"), "a", section.title, {"href": f"#{name}"})
        plots = _section(main, section, number, name, plots)
    SubElement(body, "div", {"id": "tip", "role": "status", "hidden": ""})
    _text(body, "script", _asset(SCRIPT))
    return "<!DOCTYPE html>\n" + ElementTree.tostring(root, encoding="unicode", method="html") + "\n"


def _head(root: Element, document: Document) -> None:
    head = SubElement(root, "head")
    SubElement(head, "meta", {"charset": "utf-8"})
    SubElement(head, "meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"})
    SubElement(head, "meta", {"http-equiv": "Content-Security-Policy", "content": POLICY})
    SubElement(head, "link", {"rel": "icon", "href": "data:,"})
    _text(head, "title", document.title)
    _text(head, "style", _asset(STYLE))


def _asset(name: str) -> str:
    return importlib.resources.files("resnet_bk.report").joinpath(name).read_text(encoding="utf-8")


def _text(parent: Element, tag: str, text: str, attributes: dict[str, str] | None = None) -> Element:
    element = SubElement(parent, tag, attributes or {})
    element.text = text
    return element


def _section(main: Element, section: Section, number: int, name: str, plots: int) -> int:
    """Adds it and returns how many plots there are by now."""
    element = SubElement(main, "section", {"aria-labelledby": name})
    _text(element, "h2", f"{number}. {section.title}", {"id": name})
    for block in section.blocks:
        if isinstance(block, Plot):
            plots += 1
            _plot(element, block, f"plot-{plots}-")
        else:
            _block(element, block)
    return plots


def _block(parent: Element, block: Block) -> None:
    if isinstance(block, Paragraph):
        _text(parent, "p", block.text)
    elif isinstance(block, Bullets):
        items = SubElement(parent, "ul", {"class": "grave"} if block.grave else {})
        for item in block.items:
            _text(items, "li", item)
    elif isinstance(block, Note):
        _text(parent, "p", block.text, {"class": "note grave" if block.grave else "note"})
    elif isinstance(block, Code):
        _text(SubElement(parent, "pre"), "code", block.text)
    elif isinstance(block, Table):
        _table(parent, block)


def _table(parent: Element, table: Table) -> None:
    element = SubElement(SubElement(parent, "div", {"class": "wide"}), "table")
    _text(element, "caption", table.caption)
    aligned = table.align or ("left", *("right",) * (len(table.header) - 1))
    if any(table.header):
        row = SubElement(SubElement(element, "thead"), "tr")
        for text, align in zip(table.header, aligned, strict=True):
            _text(row, "th", text, {"class": align, "scope": "col"})
    body = SubElement(element, "tbody")
    for cells in table.rows:
        row = SubElement(body, "tr")
        for text, align in zip(cells, aligned, strict=True):
            _text(row, "td", text, {"class": align})


def _plot(parent: Element, plot: Plot, prefix: str) -> None:
    # What is focused can be read point by point with the arrow keys.
    figure = SubElement(parent, "figure", {"class": "plot", "tabindex": "0"})
    drawn = _inline(plot.svg, prefix)
    drawn.set("role", "img")
    drawn.set("aria-label", plot.alternative)
    SubElement(figure, "div", {"class": "wide"}).append(drawn)
    _text(figure, "figcaption", plot.caption)


def _inline(svg: str, prefix: str) -> Element:
    """The drawing as a part of a page: names of its own, colours and letters of the page, no addresses."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = NAMESPACE.sub("", element.tag)
        attributes = {NAMESPACE.sub("", name): value for name, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({name: _adapted(name, value, prefix) for name, value in attributes.items()})
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    return root


def _adapted(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return prefix + value
    if name == "href":
        return f"#{prefix}{value.removeprefix('#')}"
    if name == "style":
        value = FAMILY.sub("", value)
        for print_colour, colour in COLOURS.items():
            value = value.replace(print_colour, colour)
    return REFERENCE.sub(lambda found: f"url(#{prefix}{found[1]})", value)
