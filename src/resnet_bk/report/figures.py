"""Drawings: one style, colours that the colour-blind can tell apart (M. Okabe and K. Ito, 2008), SVG as text."""

import io
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullFormatter, NullLocator

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
}
WIDTH = 6.3


@dataclass
class Drawing:
    """Axes to draw on; ``svg`` is there when the block ends."""

    figure: Figure
    axes: list[Axes]
    svg: str = ""

    def legend_above(self) -> None:
        """One legend for all axes, outside of them, so that it covers no curve."""
        entries, labels = self.axes[0].get_legend_handles_labels()
        self.figure.legend(entries, labels, loc="outside upper center", ncols=3, fontsize=8)


@contextmanager
def drawing(columns: int = 1, height: float = 2.6) -> Iterator[Drawing]:
    """A row of axes in the house style."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, columns, squeeze=False)[0]
        result = Drawing(figure=figure, axes=list(axes))
        yield result
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        result.svg = buffer.getvalue()


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
