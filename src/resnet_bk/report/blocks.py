"""What a section is made of. The template knows how each kind looks; text is shown as it is, never as markup."""

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
    """A list of sentences."""

    items: list[str]
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
    """A drawing as SVG; ``alternative`` says in words what it shows."""

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
