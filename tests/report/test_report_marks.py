"""What can be read from a plot point by point."""

import pytest
from shown import cut_texts, marks

from resnet_bk.report.figures import drawing, grouped_bars


def test_bars_tell_group_value_and_whiskers():
    with drawing() as canvas:
        (axes,) = canvas.axes
        grouped_bars(
            axes, ["load", "peak\nstep"], {"A": [1.0, 2000.0]}, ["#0072B2"], {"A": ([0.1, 100.0], [0.2, 50.0])}
        )
        axes.set_ylabel("MB")
    assert marks(canvas.svg) == ["A\nload\nMB: 1 (0.9 to 1.2)", "A\npeak step\nMB: 2,000 (1,900 to 2,050)"]


def test_bars_that_lie_tell_their_length_and_not_where_they_end():
    with drawing() as canvas:
        (axes,) = canvas.axes
        axes.barh(["A"], [3.0], left=[4.0], label="backward")
        axes.set_xlabel("GFLOP")
    assert marks(canvas.svg) == ["backward\nGFLOP: 3\nA"]


def test_lines_have_the_name_of_what_looks_alike_and_the_bounds_of_their_band():
    with drawing() as canvas:
        (axes,) = canvas.axes
        axes.plot([1, 10], [2, 3], color="#0072B2", label="A")
        axes.plot([1, 10], [4, 5], color="#0072B2")
        axes.fill_between([1, 10], [1, 2], [5, 6], color="#0072B2", alpha=0.2)
        axes.axhline(2.5, label="reference")
        axes.set_xscale("log")
        axes.set_xlabel("tokens\nseen")
    lines = marks(canvas.svg)
    assert lines[0] == "A\ntokens seen: 1\n2 (1 to 5)"
    assert [line.splitlines()[0] for line in lines] == ["A"] * 4


def test_whiskers_are_told_once_and_their_caps_are_no_points():
    with drawing() as canvas:
        (axes,) = canvas.axes
        axes.errorbar([1.5], [0], xerr=[[0.5], [0.25]], fmt="o", capsize=2, label="A")
        axes.set_yticks([0], ["step"])
    assert marks(canvas.svg) == ["A\n1.5 (1 to 1.75)\nstep"]


def test_marks_lie_on_what_they_tell():
    with drawing() as canvas:
        (axes,) = canvas.axes
        axes.plot([0, 1], [0, 1], marker="o")
        axes.set_xlim(0, 2)
        axes.set_ylim(0, 2)
    figure = canvas.figure
    left, bottom, right, top = axes.bbox.extents * 72 / figure.dpi
    assert f'cx="{left:.1f}" cy="{figure.get_figheight() * 72 - bottom:.1f}"' in canvas.svg
    assert f'cx="{(left + right) / 2:.1f}" cy="{figure.get_figheight() * 72 - (bottom + top) / 2:.1f}"' in canvas.svg


def test_points_outside_of_the_axes_or_without_a_number_have_no_mark():
    with drawing() as canvas:
        (axes,) = canvas.axes
        axes.plot([1, 2, 3, 40], [1, float("nan"), 3, 4], label="A")
        axes.set_xlim(0, 10)
    assert len(marks(canvas.svg)) == 2


def test_a_label_is_text_in_the_picture_whatever_it_is():
    with drawing() as canvas:
        (axes,) = canvas.axes
        axes.plot([1], [1], marker="o", label="$x$ <b> & ]]>")
        canvas.legend_above()
    assert marks(canvas.svg) == ["$x$ <b> & ]]>\n1\n1"]
    assert "$x$ &lt;b&gt; &amp; ]]&gt;</text>" in canvas.svg


def test_powers_of_ten_are_letters():
    with drawing() as canvas:
        (axes,) = canvas.axes
        axes.plot([1, 2], [1e-7, 1e-3])
        axes.set_yscale("log")
    assert ">10⁻⁷</text>" in canvas.svg and "mathdefault" not in canvas.svg


@pytest.mark.parametrize("letters", [5, 20, 32])
def test_a_legend_is_never_wider_than_its_picture(letters):
    with drawing(columns=2, height=3.2) as canvas:
        for axes in canvas.axes:
            for number in range(6):
                axes.plot([1, 2], [1, number], label=f"{number}".ljust(letters, "m"))
        canvas.legend_above()
    assert not list(cut_texts(canvas.svg))


def test_the_same_drawing_gives_the_same_bytes():
    def drawn():
        with drawing() as canvas:
            canvas.axes[0].plot([1, 2], [1, 2], label="A")
        return canvas.svg

    assert drawn() == drawn()
