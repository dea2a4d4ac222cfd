"""What a section is made of. The PDF's template and the HTML page know how each kind looks; text is shown as it is,
never as markup."""

from dataclasses import dataclass
from typing import Literal

Align = Literal["left", "right"]


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """Plain text."""

    text: str
    kind: Literal["paragraph"] = "paragraph"


@dataclass(frozen=True, kw_only=True)
class Bullets:
    """A list of sentences; ``grave`` as in :class:`Note`."""

    items: list[str]
    grave: bool = False
    kind: Literal["bullets"] = "bullets"


@dataclass(frozen=True, kw_only=True)
class Note:
    """What a reader must keep in mind; ``grave`` if it takes the meaning from a figure."""

    text: str
    grave: bool = False
    kind: Literal["note"] = "note"


@dataclass(frozen=True, kw_only=True)
class Code:
    """Something to type."""

    text: str
    kind: Literal["code"] = "code"


@dataclass(frozen=True, kw_only=True)
class Table:
    """The first column is aligned to the left, the others to the right unless ``align`` says otherwise."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    align: list[Align] | None = None
    kind: Literal["table"] = "table"


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawing as SVG, with marks to read it by (:mod:`resnet_bk.report.marks`); ``alternative`` says in words what it
    shows."""

    caption: str
    alternative: str
    svg: str
    kind: Literal["plot"] = "plot"


Block = Paragraph | Bullets | Note | Code | Table | Plot


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what is below it."""

    title: str
    blocks: list[Block]
