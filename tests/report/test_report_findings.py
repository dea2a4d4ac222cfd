"""The page of findings: what is claimed, what is not, what went wrong."""

from dataclasses import replace

import pytest
from shown import texts
from synthetic import report_of, with_result

from resnet_bk.report import findings, summary
from resnet_bk.report.blocks import Bullets, Note, Table
from resnet_bk.schema import CellStatus, Check, Comparison, Failure, GpuSample


def page(report):
    return "\n".join(texts(summary.build(report)))


def grave(report):
    return "\n".join(found.text for found in findings.findings_of(report) if found.grave)


@pytest.fixture(scope="module")
def report():
    return report_of()


@pytest.fixture(scope="module")
def failing():
    return report_of(failing=True)


def with_ratio(report, value, low, high, claimed):
    ratio = Comparison(value=value, low=low, high=high, p=0.001 if claimed else 0.5, claimed=claimed)
    ratios = [replace(row, ratio=ratio) for row in report.results.timing.ratios]
    return with_result(report, "timing", ratios=ratios)


@pytest.mark.parametrize(
    ("figures", "table", "sentence"),
    [
        (
            (1.3, 1.2, 1.4, True),
            "ResNet-BK is 1.30 times as fast",
            "ResNet-BK is faster: it is 1.30 (1.20 to 1.40) times",
        ),
        (
            (0.5, 0.4, 0.625, True),
            "Transformer is 2.00 times as fast",
            "slower: Transformer is 2.00 (1.60 to 2.50) times",
        ),
        ((1.1, 1.05, 1.2, False), "no difference can be claimed", "No difference in time can be claimed for"),
    ],
)
def test_a_difference_of_time_is_claimed_only_where_it_may_be(report, figures, table, sentence):
    value, low, high, claimed = figures
    changed = with_ratio(report, value, low, high, claimed)
    said = page(changed)
    assert f"time of a step | {value:.2f} ({low:.2f} to {high:.2f}) | {table}" in said
    assert sentence in said
    assert ("is faster: " in said) == (claimed and value > 1)
    assert ("is slower: " in said) == (claimed and value < 1)


@pytest.mark.parametrize("sections", [("flops", "timing", "memory"), ("stability",), ()])
def test_the_ratios_that_every_report_names_are_there_measured_or_not(sections):
    shown = summary.build(report_of(sections=sections))
    (table,) = (block for block in shown.blocks if isinstance(block, Table))
    assert [row[0] for row in table.rows] == [
        "FLOPs of a step",
        "forward time",
        "backward time",
        "time of a step",
        "peak memory of a step",
    ]
    assert all((row[2] == "not measured") == (not sections or sections == ("stability",)) for row in table.rows)


def test_a_ratio_that_no_model_could_give_is_not_measured(report):
    changed = with_result(with_result(report, "flops", ratio=None), "memory", ratio=None)
    assert "FLOPs of a step |  | not measured" in page(changed)
    assert "peak memory of a step |  | not measured" in page(changed)


def test_a_claim_about_learning_has_its_interval_either_way(report):
    assert "ResNet-BK learns more from the same tokens than Transformer, by 0.320 (0.270 to 0.370)" in page(report)
    (row, *_) = report.results.convergence.differences
    worse = replace(row, difference=Comparison(value=-0.2, low=-0.3, high=-0.1, p=0.001, claimed=True))
    said = page(with_result(report, "convergence", differences=[worse]))
    assert "Transformer learns more from the same tokens than ResNet-BK, by 0.200 (0.100 to 0.300)" in said
    none = replace(row, difference=Comparison(value=0.1, low=-0.1, high=0.3, p=0.2, claimed=False))
    said = page(with_result(report, "convergence", differences=[none]))
    assert "no difference to Transformer can be claimed: its loss less this one is +0.100 (-0.100 to +0.300)" in said
    assert "learns more" not in said
    corrected = replace(row, difference=Comparison(value=0.2, low=0.1, high=0.3, p=0.03, claimed=False))
    said = page(with_result(report, "convergence", differences=[corrected]))
    assert "can be claimed after Holm's correction: its loss less this one is +0.200 (+0.100 to +0.300)" in said


def test_one_seed_claims_nothing_about_learning():
    said = page(report_of(seeds=1))
    assert "One seed and rates that are not tuned: this says nothing about which model learns better." in said
    assert "learns more" not in said


def test_a_diverged_run_is_said_and_has_no_part_in_a_mean(failing):
    said = page(failing)
    assert "Training diverged: Transformer in 1 of 3 runs." in said
    assert "4.950 (Transformer)" in said  # of the two seeds that ended
    arms = [replace(arm, test_loss=None) for arm in failing.results.convergence.arms]
    assert "There are no test losses of both" in page(with_result(failing, "convergence", arms=arms))


def test_cells_without_a_figure_are_named_with_what_happened(failing):
    said = grave(failing)
    assert "5 of 18 measurements gave no figure" in said
    for words in (
        "scaling/sequence_length-transformer-16384 ran out of memory",
        "scaling/num_experts took longer than a cell may",
        "convergence/transformer-2 crashed",
        "no FLOP formula for resnet_bk::bk_causal",
        "had to be withheld",
    ):
        assert words in said


def test_many_failures_are_counted_and_not_all_named(report):
    lost = replace(report.cells["gates/operators"], failure=Failure(kind="not a number", message="loss"))
    changed = replace(report, cells={f"timing/{number}": lost for number in range(50)})
    assert "timing/0, timing/1, timing/2 and 47 more gave what is not a number" in grave(changed)


def test_foreign_load_and_throttling_are_said(failing, report):
    assert "at worst 21% of the time, in timing/build-1" in grave(failing)
    assert "busy" not in grave(report)
    waited = replace(report.cells["gates/operators"], waited=0.3)  # beside others, and it tells no time
    assert "busy" not in grave(replace(report, cells={"gates/operators": waited}))
    sample = GpuSample(seconds=1.0, sm_clock_mhz=1980.0, temperature=70.0, power_watts=600.0, throttled=False)
    hot = with_result(report, "timing", gpu=[sample, replace(sample, throttled=True)])
    assert "lowered its own clock in 1 of 2 samples" in grave(hot)
    assert "clock" not in grave(with_result(report, "timing", gpu=[sample]))


def test_a_leak_of_memory_and_a_planner_that_promised_too_little_are_defects(failing, report):
    assert "Memory grows from step to step: ResNet-BK (1.3 MB a step)" in grave(failing)
    assert "It promised too little for Transformer." in grave(failing)
    assert "leak" not in grave(report) and "promised" not in grave(report)
    assert "with an error of +0.7% (ResNet-BK), +0.7% (Transformer)" in page(report)


def test_checks_that_failed_and_models_that_read_ahead_are_said(failing, report):
    assert "Checks that failed: bk_core: numbers that are not finite at eta = 1e-6; Seed's mixer reads later" in grave(
        failing
    )
    assert not grave(report)


def test_counts_that_disagree_with_the_formula_are_said(report):
    first, *others = report.results.flops.models
    changed = with_result(report, "flops", models=[replace(first, formula_forward=first.forward // 2), *others])
    assert "Counted FLOPs differ from those by formula: ResNet-BK by" in grave(changed)


def test_a_model_that_is_not_ours_has_no_formula_and_no_mixer_to_tell():
    said = page(report_of(foreign=True))
    assert "FLOPs of gpt2 are counted alone: there is no formula to check them by." in said
    assert "against gpt2 (from hf:/data/models" in said
    assert "gpt2's figure over ResNet-BK's" in said


def test_the_seeds_variants_are_told_with_what_may_be_claimed(report):
    said = page(report)
    assert (
        "The test loss of Seed's mixer is 5.010 (mean of 3 seeds); no difference to Transformer can be claimed" in said
    )
    assert "is a leak and no result" in said
    gradient = Comparison(value=1.2, low=1.0, high=1.4, p=0.001, claimed=True)
    changed = with_result(report, "convergence", gradient_difference=gradient)
    assert (
        "the exact gradient learns more from the same tokens than the analytic one, by 1.200 (1.000 to 1.400)"
        in page(changed)
    )
    assert "The analytic one has learned nothing: without any context the loss would be lower." in page(changed)
    assert "learned nothing" not in page(with_result(changed, "convergence", unigram_entropy=9.0))
    unclaimed = with_result(report, "convergence", gradient_difference=replace(gradient, p=0.03, claimed=False))
    told = (
        "no difference to the exact gradient can be claimed after Holm's correction: its loss less this one is -1.200"
    )
    assert f"{told} (-1.400 to -1.000)" in page(unclaimed)


def test_a_time_that_hardly_grows_has_no_exponent(report):
    said = page(report)
    assert "Time grows as N^0.98 (0.94 to 1.03) for ResNet-BK from N = " in said and "hardly grows" not in said
    first, *others = report.results.scaling.axes
    points = [
        replace(point, seconds=first.points[0].seconds) if point.contestant == "resnet-bk" else point
        for point in first.points
    ]
    said = page(with_result(report, "scaling", axes=[replace(first, points=points), *others]))
    assert "for ResNet-BK from" not in said and "N^1.72 (1.68 to 1.77) for Transformer from" in said
    assert "the time hardly grows for ResNet-BK (1.00 times): costs that do not depend on N take most of it." in said


def test_memory_at_the_longest_is_that_of_both(report):
    axis = report.results.scaling.axes[0]
    longest = max(point.value for point in axis.points)
    peaks = {point.contestant: point.peak_memory / 1e6 for point in axis.points if point.value == longest}
    mine, theirs = (f"{peaks[key]:,.1f} MB" for key in ("resnet-bk", "transformer"))
    said = f"At N = {longest:,} a training step of ResNet-BK holds {mine} at its peak, that of Transformer {theirs}."
    assert said in page(report)
    (alone,) = ([point for point in axis.points if point.contestant == "resnet-bk"],)
    assert "holds" not in page(with_result(report, "scaling", axes=[replace(axis, points=alone, exponents=[])]))


def test_a_failed_gate_is_the_first_thing_said(report):
    gates = [Check(name="ResNet-BK: no logit depends on a later token", measured=0.1, limit=1e-10, passed=False)]
    shown = summary.build(replace(report, gates=gates))
    note = next(block for block in shown.blocks if isinstance(block, Note))
    assert note.grave and "A gate failed: ResNet-BK: no logit depends on a later token." in note.text
    assert "did not run" in page(replace(report, gates=[]))


def test_the_most_important_findings_are_the_ones_that_are_kept(failing):
    everything = findings.findings_of(failing)
    assert [found.rank for found in everything] == sorted(found.rank for found in everything)
    kept, left = findings.within(everything, lines=8, letters=100)
    assert kept[0] == everything[0] and left == len(everything) - len(kept) > 0
    assert max(found.rank for found in kept) < max(found.rank for found in everything)


def test_what_does_not_fit_on_the_page_is_counted(failing):
    cell = replace(failing.cells["gates/operators"], failure=Failure(kind="error", message="x" * 1500))
    shown = summary.build(replace(failing, cells={**failing.cells, "memory/transformer": cell}))
    said = [item for block in shown.blocks if isinstance(block, Bullets) for item in block.items]
    assert any("findings that do not fit on this page" in item for item in said)


def test_a_gate_that_did_not_end_is_not_said_to_have_held(report):
    hung = CellStatus(seconds=1.0, failure=Failure(kind="timeout", message="no end after 1 s"))
    told = page(replace(report, cells={**report.cells, "gates/operators": hung}))
    assert "gates held" not in told
    assert "No end of gates/operators" in told


def test_what_longer_windows_do_is_said_of_both_models(report):
    said = page(report)
    text = "in windows of 2,048 tokens instead of training's 128: the loss of ResNet-BK goes from"
    other = "Transformer goes from 4.930 to 6.130"
    assert f"{text} 4.610 to 4.510; {other}, or to 4.860 if its attention sees the last 128 alone." in said
    arms = [replace(arm, by_window=arm.by_window[:3]) for arm in report.results.convergence.arms]
    short = page(with_result(report, "convergence", arms=arms))
    assert f"{text} 4.610 to 4.510; {other}." in short


def test_of_longer_windows_that_one_model_does_not_take_nothing_is_said(report):
    arms = report.results.convergence.arms
    short = [replace(arm, by_window=arm.by_window[:1]) if arm.key == "transformer" else arm for arm in arms]
    said = page(with_result(report, "convergence", arms=short))
    assert "in windows of" not in said
    one_not_a_number = [replace(arm, by_window=arm.by_window[1:]) for arm in arms]
    assert "in windows of" not in page(with_result(report, "convergence", arms=one_not_a_number))
    lost = [replace(arm, by_window=[]) for arm in arms]
    assert "in windows of" not in page(with_result(report, "convergence", arms=lost))
