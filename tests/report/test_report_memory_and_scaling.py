"""Sections on memory and scaling: leaks, failures and parts of them."""

from dataclasses import replace

import pytest
from synthetic import BASELINE, OURS, report_of

from resnet_bk.report.blocks import Note, Paragraph, Plot, Table
from resnet_bk.report.sections import memory, scaling
from resnet_bk.schema import MemoryResult


def memory_section(report, **changes):
    """Of the report's memory, with fields of ours changed."""
    ours, *others = report.results.memory.models
    result = MemoryResult(counter="bytes", models=[replace(ours, **changes), *others], ratio=1.0)
    return memory.build(report, result)


def grave(section):
    return [block.text for block in section.blocks if isinstance(block, Note) and block.grave]


def rows_of(section):
    return {row[0]: row[1:] for block in section.blocks if isinstance(block, Table) for row in block.rows}


@pytest.fixture
def report():
    return report_of()


def test_a_leak_is_a_grave_note_and_none_is_not(report):
    (note,) = grave(memory_section(report, grown_per_step=2e6))
    assert "ResNet-BK 2 MB" in note
    assert grave(memory_section(report, grown_per_step=0.0)) == []
    assert grave(memory_section(report, grown_per_step=8.0)) == [], "a counter is no leak"


def test_a_planner_that_promised_less_is_told_but_not_for_what_leaks(report):
    peak = report.results.memory.models[0].peak_step
    assert "promised less than ResNet-BK" in grave(memory_section(report, predicted_peak=int(0.99 * peak)))[0]
    assert len(grave(memory_section(report, predicted_peak=int(0.99 * peak), grown_per_step=0.02 * peak))) == 1


def test_a_model_without_a_prediction_has_all_other_rows(report):
    section = memory_section(report, predicted_peak=None, parts=[])
    assert rows_of(section)["the planner's prediction of that"][0] == "none"
    assert any("could not trace ResNet-BK" in block.text for block in section.blocks if isinstance(block, Paragraph))


def test_reserved_memory_has_rows_on_a_gpu_alone(report):
    assert "reserved by the allocator" not in rows_of(memory_section(report))
    rows = rows_of(memory_section(report, reserved=200_000_000, predicted_reserved=210_000_000))
    assert rows["reserved by the allocator"][:2] == ["200.0", "none"]


def test_each_axis_has_its_table_plot_and_sentence(report):
    blocks = scaling.build(report, report.results.scaling).blocks
    axes = len(report.results.scaling.axes)
    assert sum(isinstance(block, Plot) for block in blocks) == axes
    assert sum(isinstance(block, Table) for block in blocks) == 2 * axes


def test_a_failure_is_in_the_table_in_the_plot_and_in_words():
    report = report_of(failing=True)
    section = scaling.build(report, report.results.scaling)
    assert "out of memory" in rows_of(section)["8,192"]
    plot = next(block for block in section.blocks if isinstance(block, Plot))
    assert plot.svg.count("out of memory") == 2
    assert any("34.4 GB were asked for" in block.text for block in section.blocks if isinstance(block, Note))


def sentence(report, axis, **changes):
    return scaling.crossover_sentence(report, replace(axis, **changes))


def test_the_crossover_in_words(report):
    axis = report.results.scaling.axes[0]
    measured = sorted({point.value for point in axis.points})
    assert "from 4,096 tokens a sequence on, and at no smaller number that was tried: 1,152 ms (" in sentence(
        report, axis, crossover=4096
    )
    assert f"at every measured value from {measured[0]} to 8,192" in sentence(report, axis, crossover=measured[0])
    depth = report.results.scaling.axes[2]
    assert "Transformer is faster there" in sentence(report, depth, crossover=None)
    same = [
        replace(point, seconds=next(p.seconds for p in axis.points if p.value == point.value)) for point in axis.points
    ]
    assert "too small or too noisy" in sentence(report, axis, points=same, crossover=None)


def test_the_crossover_where_one_has_no_figure():
    report = report_of(failing=True)
    axis = report.results.scaling.axes[0]
    assert "from 8,192 on Transformer has no figure" in sentence(report, axis, crossover=8192)
    alone = [point for point in axis.points if point.contestant == OURS]
    assert "not both measured" in sentence(report, axis, points=alone, crossover=None)


def test_parameters_that_differ_are_told(report):
    axis = report.results.scaling.axes[0]
    points = [replace(point, parameters=600_000 if point.contestant == BASELINE else 500_000) for point in axis.points]
    result = replace(report.results.scaling, axes=[replace(axis, points=points)])
    texts = [block.text for block in scaling.build(report, result).blocks if isinstance(block, Paragraph)]
    assert any("differ, by up to 20%" in text for text in texts)


def test_points_without_any_time_have_no_plot():
    report = report_of(failing=True)
    axis = report.results.scaling.axes[0]
    failed = [point for point in axis.points if point.failure]
    result = replace(report.results.scaling, axes=[replace(axis, points=failed, exponents=[], crossover=None)])
    assert not [block for block in scaling.build(report, result).blocks if isinstance(block, Plot)]
