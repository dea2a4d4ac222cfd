"""What the sections of FLOPs and times say, of whole reports and of partial ones."""

from dataclasses import replace

import pytest
from shown import cut_texts, texts
from synthetic import BASELINE, OURS, report_of, with_result

from resnet_bk.report.blocks import Plot, Table
from resnet_bk.report.sections import flops, timing
from resnet_bk.schema import CellStatus, Failure, GpuSample


def said(section):
    return "\n".join(texts(section))


def flops_of(report):
    return flops.build(report, report.results.flops)


def timing_of(report):
    return timing.build(report, report.results.timing)


def rows(section, word):
    return next(block.rows for block in section.blocks if isinstance(block, Table) and word in block.caption)


@pytest.fixture(scope="module")
def report():
    return report_of(sections=("flops", "timing"))


def with_phases(report, keep):
    timed = report.results.timing
    return with_result(
        report,
        "timing",
        phases=[row for row in timed.phases if keep(row.phase, row.contestant)],
        ratios=[row for row in timed.ratios if all(keep(row.phase, key) for key in (OURS, BASELINE))],
    )


def with_failure(report, name, kind, message):
    status = CellStatus(seconds=1.0, failure=Failure(kind=kind, message=message))
    return replace(report, cells={**report.cells, name: status})


@pytest.mark.parametrize("build", [flops_of, timing_of])
def test_no_label_of_a_plot_is_cut(report, build):
    (plot,) = (block for block in build(report).blocks if isinstance(block, Plot))
    assert list(cut_texts(plot.svg)) == []


def test_the_earlier_documents_formulas_are_labelled_and_explained(report):
    text = said(flops_of(report))
    assert "For comparison only: the document that this project began with" in text
    assert "a multiply-add once and not twice" in text
    plain = [replace(model, seed_forward=None) for model in report.results.flops.models]
    assert "For comparison only" not in said(flops_of(with_result(report, "flops", models=plain)))


def test_a_count_that_leaves_the_formula_is_said_aloud(report):
    ours, *others = report.results.flops.models
    section = flops_of(with_result(report, "flops", models=[replace(ours, forward=2 * ours.forward), *others]))
    assert any(getattr(block, "grave", False) and "count and formula differ" in block.text for block in section.blocks)
    assert not any(getattr(block, "grave", False) for block in flops_of(report).blocks)


def test_flops_without_a_formula_without_a_ratio_and_without_a_contestant():
    report = report_of(sections=("flops",), foreign=True)
    assert [row[-1] for row in rows(flops_of(report), "counted")[:2]] == ["the same", "none"]
    models = report.results.flops.models
    alone = with_result(report, "flops", models=models[1:2], ratio=None, forward_ratio=None)
    alone = with_failure(alone, "flops/resnet-bk", "error", "UncountedOperatorError: mixed has no FLOP formula")
    section = flops_of(alone)
    assert len(rows(section, "counted")) == 1
    assert "Not counted: ResNet-BK (error: UncountedOperatorError: mixed has no FLOP formula)" in said(section)
    assert not any(isinstance(block, Table) and "by formula" in block.caption for block in section.blocks)


def test_a_ratio_that_may_not_be_claimed_is_told_as_such(report):
    timed = report.results.timing
    unclaimed = [replace(row, ratio=replace(row.ratio, claimed=False)) for row in timed.ratios]
    for ratios, told in ((timed.ratios, False), (unclaimed, True)):
        table = rows(timing_of(with_result(report, "timing", ratios=ratios)), "above 1")
        assert all("no difference can be claimed" in row[-1] for row in table) is told


def test_every_statistic_of_every_phase_stands_in_the_table(report):
    table = rows(timing_of(report), "Milliseconds")
    assert len(table) == len(report.results.timing.phases)
    assert {len(row) for row in table} == {10}


def test_times_without_generation(report):
    section = timing_of(with_phases(report, lambda phase, _: phase not in ("prefill", "decode")))
    assert "No time of generation: ResNet-BK, Transformer and Seed's mixer cannot go on" in said(section)
    assert "cannot go on" not in said(timing_of(report))


def test_where_training_is_in_halves_generation_is_said_not_to_be(report):
    halves = replace(report, workload=replace(report.workload, precision="bf16"))
    words = "Reading a prompt and decoding are in fp32"
    assert words in said(timing_of(halves))
    assert words not in said(timing_of(report))
    assert words not in said(timing_of(with_phases(halves, lambda phase, _: phase not in ("prefill", "decode"))))


def test_times_of_a_baseline_that_does_not_generate(report):
    section = timing_of(with_phases(report, lambda phase, key: key == OURS or phase not in ("prefill", "decode")))
    assert "No time of generation: Transformer and Seed's mixer cannot" in said(section)
    assert len(rows(section, "above 1")) == 5


def test_times_without_a_baseline(report):
    alone = with_phases(report, lambda _, key: key == OURS)
    alone = with_failure(alone, "timing/transformer", "withheld", "a gate failed (it reads ahead)")
    section = timing_of(alone)
    text = said(section)
    assert "No ratios: ResNet-BK and Transformer were not both timed." in text
    assert "Not timed: Transformer (withheld: a gate failed (it reads ahead))." in text
    assert "Holm" not in text
    assert sum(isinstance(block, Plot) for block in section.blocks) == 1


@pytest.mark.parametrize("throttled", [False, True])
def test_what_the_driver_said_of_clocks_and_heat(report, throttled):
    samples = [
        GpuSample(seconds=2.0, sm_clock_mhz=1980.0, temperature=55.0, power_watts=None, throttled=False),
        GpuSample(seconds=9.0, sm_clock_mhz=1410.0, temperature=71.0, power_watts=None, throttled=throttled),
    ]
    section = timing_of(with_result(report, "timing", gpu=samples))
    assert "clock 1,410 to 1,980 MHz, temperature 55 to 71 °C." in said(section)
    assert ("In 1 of 2 samples the driver had lowered" in said(section)) is throttled


def test_shares_that_could_not_be_had_are_none(report):
    ours, *others = report.results.timing.utilisation
    changed = [replace(ours, step_flops=None, decode_bandwidth=None), *others]
    section = timing_of(with_result(report, "timing", utilisation=changed))
    assert rows(section, "Training speed")[0].count("none") == 2
    assert "an operator that nobody can count" in said(section)
