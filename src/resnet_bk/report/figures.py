"""Drawings: one style, colours that the colour-blind can tell apart (M. Okabe and K. Ito, 2008), SVG as text."""

import io
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    FuncFormatter,
    LogFormatterSciNotation,
    NullFormatter,
    NullLocator,
)

from resnet_bk.report.marks import marks_of, with_marks

OURS, BASELINE, THIRD, FOURTH, FIFTH = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
COLOURS = {"resnet-bk": OURS, "transformer": BASELINE, "seed-mixer": FIFTH, "blend": THIRD, "bidirectional": FOURTH}
MARKERS = {"resnet-bk": "o", "transformer": "s", "seed-mixer": "D", "blend": "^", "bidirectional": "x"}
GREY = "#666666"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "resnet-bk",  # the same data give the same file
    "svg.fonttype": "none",  # text that can be selected
    "text.parse_math": False,  # a label is shown as it is
}
MATHEMATICS = re.compile(r"^\$\\mathdefault\{(.*)\}\$$")
POWER = re.compile(r"\^\{(-?\d+)\}")
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
WIDTH = 6.3
MOST_COLUMNS = 3  # of a legend


@dataclass
class Drawing:
    """Axes to draw on; ``svg`` is there when the block ends."""

    figure: Figure
    axes: list[Axes]
    svg: str = ""

    def legend_above(self) -> None:
        """One legend for all axes, outside of them, so that it covers no curve."""
        entries, labels = self.axes[0].get_legend_handles_labels()
        for columns in range(MOST_COLUMNS, 0, -1):
            legend = self.figure.legend(entries, labels, loc="outside upper center", ncols=columns, fontsize=8)
            if columns == 1 or legend.get_window_extent().width <= self.figure.bbox.width:
                break
            legend.remove()


@contextmanager
def drawing(columns: int = 1, height: float = 2.6) -> Iterator[Drawing]:
    """A row of axes in the house style; what is drawn can be read point by point (:mod:`resnet_bk.report.marks`)."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, columns, squeeze=False)[0]
        result = Drawing(figure=figure, axes=list(axes))
        yield result
        for each in axes:
            _plain_powers(each.xaxis)
            _plain_powers(each.yaxis)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        result.svg = with_marks(buffer.getvalue(), marks_of(figure))


class PlainPowers(LogFormatterSciNotation):
    """Powers of ten in letters (10⁻⁵) instead of in markup."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The label of a tick."""
        text = MATHEMATICS.sub(r"\1", super().__call__(x, pos)).replace(r"\times", " × ")
        return POWER.sub(lambda found: found[1].translate(SUPERSCRIPTS), text)


def _plain_powers(axis: Axis) -> None:
    base = getattr(axis.get_transform(), "base", 10)
    major, minor = axis.get_major_formatter(), axis.get_minor_formatter()
    if isinstance(major, LogFormatterSciNotation):
        axis.set_major_formatter(PlainPowers(base=base, labelOnlyBase=major.labelOnlyBase))
    if isinstance(minor, LogFormatterSciNotation):
        axis.set_minor_formatter(PlainPowers(base=base, labelOnlyBase=minor.labelOnlyBase))


def plain_ticks(axis: Axis) -> None:
    """Numbers as people write them (2k, 400) instead of powers of ten."""
    axis.set_major_formatter(EngFormatter(sep=""))
    axis.set_minor_formatter(NullFormatter())


def length_ticks(axis: Axis, lengths: list[int]) -> None:
    """The lengths that were measured, in full; every other one (the longest included) where all would touch."""
    shown = lengths[::-1][:: 1 + len(lengths) // 7][::-1]
    axis.set_major_locator(FixedLocator(shown))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_tick_params(labelsize=7.5)


def grouped_bars(
    axes: Axes,
    groups: list[str],
    series: dict[str, list[float]],
    colours: list[str],
    errors: dict[str, tuple[list[float], list[float]]] | None = None,
) -> None:
    """Bars side by side, with whiskers if ``errors`` (below, above) are given."""
    width = 0.8 / len(series)
    for (index, (label, values)), colour in zip(enumerate(series.items()), itertools.cycle(colours), strict=False):
        places = [group + (index - (len(series) - 1) / 2) * width for group in range(len(groups))]
        whiskers = None if errors is None else list(errors[label])
        axes.bar(places, values, width, label=label, color=colour, yerr=whiskers, capsize=2, ecolor=GREY)
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(visible=False, axis="x")
