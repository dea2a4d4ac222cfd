"""The section of what was learned: longer windows than training's."""

from dataclasses import replace

import pytest
from shown import texts
from synthetic import report_of

from resnet_bk.report.sections import convergence


@pytest.fixture(scope="module")
def report():
    return report_of()


def shown(report, arms):
    result = replace(report.results.convergence, arms=arms)
    return "\n".join(texts(convergence.build(report, result)))


def test_a_table_has_the_mean_of_the_seeds_by_window(report):
    said = shown(report, report.results.convergence.arms)
    assert "model | 128 tokens | 512 tokens | 2,048 tokens | 2,048 tokens, attention to the last 128\n" in said
    assert "ResNet-BK | 4.610 ± 0.006 | 4.560 ± 0.006 | 4.510 ± 0.006 | 4.540 ± 0.006\n" in said
    assert "Transformer | 4.930 ± 0.006 | 5.530 ± 0.006 | 6.130 ± 0.006 | 4.860 ± 0.006\n" in said
    assert "4.990 ± 0.006 | 4.990 ± 0.006 | 4.990 ± 0.006 | \n" in said
    assert "bidirectional) | 4" not in said.split("Pieces of the test text in longer windows")[1].split("Training's")[0]


def test_what_one_model_or_one_seed_could_not_read_is_left_empty(report):
    arms = report.results.convergence.arms
    short = [replace(arm, by_window=arm.by_window[:2]) if arm.key == "transformer" else arm for arm in arms]
    assert "Transformer | 4.930 ± 0.006 | 5.530 ± 0.006 |  | \n" in shown(report, short) + "\n"
    (first, *others) = arms
    lost = replace(first, by_window=[replace(first.by_window[0], loss=None), *first.by_window[1:]])
    assert f"{first.label} |  | 4.560 ± 0.006 |" in shown(report, [lost, *others])


def test_of_training_windows_alone_there_is_no_table(report):
    arms = [replace(arm, by_window=arm.by_window[:1]) for arm in report.results.convergence.arms]
    assert "longer windows" not in shown(report, arms)
