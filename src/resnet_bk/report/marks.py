"""What was drawn as text at places of the picture: an HTML page shows them at the pointer, print does not."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.category import StrCategoryFormatter
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FuncFormatter
from numpy.typing import NDArray

Values = NDArray[np.float64]
POINTS_PER_INCH = 72
MOST_OF_A_LINE = 150


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point of a plot in the SVG's own units, from the upper left, and what is to be read there, line by line."""

    x: float
    y: float
    text: str


@dataclass(frozen=True, kw_only=True)
class _Series:
    """Points of one artist; ``bounds`` (points, 2) are whiskers along the axis that ``along`` names. Of a bar that
    begins elsewhere than at 0, ``lengths`` are what it stands for."""

    name: str
    x: Values
    y: Values
    along: str = "y"
    bounds: Values | None = None
    lengths: Values | None = None


def marks_of(figure: Figure) -> list[Mark]:
    """Every point of lines, bars and scatters that can be seen. The figure must have been drawn."""
    names = dict(_names(figure))
    height = POINTS_PER_INCH * figure.get_figheight()
    scale = POINTS_PER_INCH / figure.dpi
    found = []
    for axes in figure.axes:
        texts = _Texts(axes, figure.axes[0])
        for series in _all_series(axes, names):
            for place, (x, y) in enumerate(axes.transData.transform(np.column_stack([series.x, series.y]))):
                if np.isfinite([x, y]).all() and axes.bbox.padded(1).contains(x, y):
                    found.append(Mark(x=x * scale, y=height - y * scale, text=texts.of(series, place)))
    return found


def with_marks(svg: str, marks: list[Mark]) -> str:
    """The picture with an unpainted circle at each mark, whose title browsers show."""
    circles = "".join(
        f'<circle class="mark" cx="{mark.x:.1f}" cy="{mark.y:.1f}" r="5"><title>{escape(mark.text)}</title></circle>\n'
        for mark in marks
    )
    before, end, after = svg.rpartition("</svg>")
    return f'{before}<g class="marks" style="fill: none; stroke: none">\n{circles}</g>\n{end}{after}'


class _Texts:
    """Words for the points of one pair of axes."""

    def __init__(self, axes: Axes, first: Axes) -> None:
        self._categories = {"x": _categories(axes.xaxis), "y": _categories(axes.yaxis)}
        # Axes side by side often share the label of the leftmost.
        shared = "" if self._categories["y"] else _label(first.yaxis)
        self._labels = {"x": _label(axes.xaxis), "y": _label(axes.yaxis) or shared}

    def of(self, series: _Series, place: int) -> str:
        lines = [series.name] if series.name else []
        for name, value in (("x", series.x[place]), ("y", series.y[place])):
            if series.along == name and series.lengths is not None:
                value = series.lengths[place]  # noqa: PLW2901  # what the bar stands for, not where it ends
            told = self._value(name, value)
            if series.along == name and series.bounds is not None and np.isfinite(series.bounds[place]).all():
                low, high = (number(bound) for bound in series.bounds[place])
                told += f" ({low} to {high})"
            lines.append(f"{self._labels[name]}: {told}" if self._labels[name] else told)
        return "\n".join(lines)

    def _value(self, name: str, value: float) -> str:
        categories = self._categories[name]
        if not categories:
            return number(value)
        nearest = min(categories, key=lambda place: abs(place - value))
        return categories[nearest] if abs(nearest - value) <= 0.5 else number(value)


def number(value: float) -> str:
    """Four significant digits, and all of a number from 1,000 on."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def _label(axis: Axis) -> str:
    return " ".join(axis.get_label_text().split())


def _categories(axis: Axis) -> dict[float, str]:
    """Names of places on an axis that has names instead of numbers."""
    formatter = axis.get_major_formatter()
    # What set_ticks(places, names) makes is a function over a dictionary.
    named = isinstance(formatter, FuncFormatter) and isinstance(formatter.func, functools.partial)
    if not named and not isinstance(formatter, FixedFormatter | StrCategoryFormatter):
        return {}
    places = axis.get_majorticklocs()
    names = [" ".join(label.split()) for label in formatter.format_ticks(list(places))]
    return {float(place): name for place, name in zip(places, names, strict=True) if name}


def _names(figure: Figure) -> Iterator[tuple[Any, str]]:
    """Labels by look: further seeds of a model are drawn alike, and only the first has the label."""
    for axes in figure.axes:
        for line in axes.lines:
            if label := _own_label(line):
                yield to_hex(line.get_color()), label
                yield (to_hex(line.get_color()), line.get_linestyle()), label


def _own_label(artist: Any) -> str:
    label = str(artist.get_label())
    return "" if label.startswith("_") else label


def _all_series(axes: Axes, names: dict[Any, str]) -> Iterator[_Series]:
    of_whiskers: set[int] = set()
    for container in axes.containers:
        if isinstance(container, BarContainer):
            yield _bars(container)
        elif isinstance(container, ErrorbarContainer):
            line, caps, _ = container.lines
            of_whiskers |= {id(line), *map(id, caps)}
            if line is not None:
                yield _whiskers(container, names)
    bands = [band for band in axes.collections if isinstance(band, PolyCollection)]
    for line in axes.lines:
        if id(line) not in of_whiskers and line.get_transform() == axes.transData:
            yield _line(line, bands, names)
    for scatter in axes.collections:
        if isinstance(scatter, PathCollection) and scatter.get_offset_transform() == axes.transData:
            offsets = np.ma.filled(np.ma.asarray(scatter.get_offsets(), dtype=np.float64), np.nan)
            yield _Series(name=_own_label(scatter), x=offsets[:, 0], y=offsets[:, 1])


def _bars(container: BarContainer) -> _Series:
    upright = container.orientation != "horizontal"
    boxes = [(bar.get_x(), bar.get_y(), bar.get_width(), bar.get_height()) for bar in container.patches]
    x, y, width, height = np.asarray(boxes, dtype=np.float64).reshape(-1, 4).T
    return _Series(
        name=_own_label(container),
        x=x + width / 2 if upright else x + width,
        y=y + height if upright else y + height / 2,
        along="y" if upright else "x",
        bounds=None if container.errorbar is None else _segments(container.errorbar, upright),
        lengths=height if upright else width,
    )


def _whiskers(container: ErrorbarContainer, names: dict[Any, str]) -> _Series:
    line = container.lines[0]
    upright = bool(container.has_yerr)
    return _Series(
        name=_own_label(container) or _name_of(line, names),
        x=np.asarray(line.get_xdata(orig=False), dtype=np.float64),
        y=np.asarray(line.get_ydata(orig=False), dtype=np.float64),
        along="y" if upright else "x",
        bounds=_segments(container, upright),
    )


def _segments(container: ErrorbarContainer, upright: bool) -> Values | None:
    """Ends of the whiskers (points, 2); those along y come last."""
    whiskers = container.lines[2]
    if not whiskers:
        return None
    ends = [segment[:, 1 if upright else 0] for segment in whiskers[-1 if upright else 0].get_segments()]
    return np.asarray(ends, dtype=np.float64).reshape(-1, 2)


def _line(line: Line2D, bands: list[PolyCollection], names: dict[Any, str]) -> _Series:
    x = np.asarray(line.get_xdata(orig=False), dtype=np.float64)
    y = np.asarray(line.get_ydata(orig=False), dtype=np.float64)
    if x.size > MOST_OF_A_LINE:
        kept = np.unique(np.linspace(0, x.size - 1, MOST_OF_A_LINE).astype(np.int64))
        x, y = x[kept], y[kept]
    return _Series(name=_name_of(line, names), x=x, y=y, bounds=_band_of(to_hex(line.get_color()), x, bands))


def _name_of(line: Line2D, names: dict[Any, str]) -> str:
    colour = to_hex(line.get_color())
    return _own_label(line) or names.get((colour, line.get_linestyle())) or names.get(colour, "")


def _paint(band: PolyCollection) -> str:
    colours: Any = band.get_facecolor()
    return to_hex(colours[0]) if len(colours) else ""


def _band_of(colour: str, x: Values, bands: list[PolyCollection]) -> Values | None:
    """Ends of the band of that colour at each x, not a number where it has none."""
    outlines = [path.vertices for band in bands if _paint(band) == colour for path in band.get_paths()]
    if not outlines:
        return None
    corners = np.concatenate([np.asarray(outline, dtype=np.float64) for outline in outlines])
    ends = np.full((x.size, 2), np.nan)
    for place, value in enumerate(x):
        there = corners[corners[:, 0] == value, 1]
        if there.size:
            ends[place] = there.min(), there.max()
    return ends
