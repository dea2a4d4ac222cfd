"""Two runs: what is said to differ, and that noise is not."""

from dataclasses import replace

import pytest
from shown import cut_texts, marks, plots, said
from synthetic import report_of, with_result

from resnet_bk.report.compare import compare_runs
from resnet_bk.report.comparison import changed_rows, compose, sentences


def words(first, second):
    found, grave = sentences(compare_runs(first, second))
    return "\n".join(found), "\n".join(grave)


@pytest.fixture(scope="module")
def before():
    return report_of()


def with_environment(report, **changes):
    return replace(report, environment={**report.environment, **changes})


def test_a_run_against_itself_differs_in_nothing(before):
    found = compare_runs(before, before)
    assert not found.claimed and not found.counts and not found.turns and not changed_rows(found)
    assert not (found.machine or found.versions or found.settings or found.remarks)
    assert found.counts_alike == 27
    assert all(change.p == 1.0 for change in found.changes if change.part == "time")


def test_another_run_of_the_same_code_differs_by_noise_only(before):
    found = compare_runs(before, report_of(noise=7))
    assert found.changes and not found.claimed


@pytest.mark.slow
def test_noise_is_seldom_claimed_and_a_tenth_slower_is_nearly_always_found():
    first = report_of(sections=("timing",), contestants=2, noise=100)
    false = sum(
        bool(compare_runs(first, report_of(sections=("timing",), contestants=2, noise=n)).claimed) for n in range(20)
    )
    assert false <= 1
    found = 0
    for noise in range(20):
        second = report_of(sections=("timing",), contestants=2, noise=noise, slower=1.1)
        changed = {(change.what, change.contestant) for change in compare_runs(first, second).claimed}
        found += ("step", "ResNet-BK") in changed and ("step", "Transformer") not in changed
    assert found >= 19


def test_a_slower_model_is_told_by_its_times_and_its_ratio(before):
    found = compare_runs(before, report_of(noise=1, slower=1.2))
    times = {(change.contestant, change.what) for change in found.claimed if change.part == "time"}
    assert times == {("ResNet-BK", change.what) for change in found.changes if change.part == "time"}
    assert {change.what for change in found.claimed if change.part == "speed-up"} >= {"step", "forward"}
    told, grave = words(before, report_of(noise=1, slower=1.2))
    assert "The second run is slower: ResNet-BK, forward 1.20" in told
    assert "moved together" not in grave


def test_a_difference_smaller_than_runs_differ_anyway_is_not_claimed(before):
    found = compare_runs(before, report_of(slower=1.04))
    times = [change for change in found.changes if change.part == "time" and change.contestant == "ResNet-BK"]
    assert all(change.p < 0.001 for change in times) and not any(change.claimed for change in times)


def test_a_slower_machine_is_not_taken_for_slower_code(before):
    timing = before.results.timing
    phases = [
        replace(row, seconds=replace(row.seconds, samples=[1.3 * sample for sample in row.seconds.samples]))
        for row in timing.phases
    ]
    hardware = {**before.environment["hardware"], "cpu": "Another CPU"}
    after = with_environment(with_result(before, "timing", phases=phases), hardware=hardware)
    _, grave = words(before, after)
    first, *_, last = grave.splitlines()
    assert "different machines (hardware cpu AMD EPYC against Another CPU)" in first and "not of the code" in first
    assert "moved together" in last
    assert not [change for change in compare_runs(before, after).claimed if change.part == "speed-up"]


def test_any_change_of_a_count_is_told(before):
    models = before.results.flops.models
    after = with_result(before, "flops", models=[replace(models[0], forward=models[0].forward + 2), *models[1:]])
    found = compare_runs(before, after)
    assert [(count.part, count.what, count.contestant) for count in found.counts] == [("FLOPs", "forward", "ResNet-BK")]
    assert found.counts_alike == 26
    assert "ResNet-BK, FLOPs forward +2" in words(before, after)[0]


def test_losses_are_compared_by_seed_and_one_seed_carries_nothing(before):
    def after(seeds):
        report = report_of(seeds=seeds)
        arms = [
            replace(arm, test_loss=arm.test_loss + 0.1 + 0.002 * arm.seed) if arm.key == "resnet-bk" else arm
            for arm in report.results.convergence.arms
        ]
        return with_result(report, "convergence", arms=arms)

    claimed = [change for change in compare_runs(before, after(3)).claimed if change.part == "loss"]
    assert [change.contestant for change in claimed] == ["ResNet-BK"]
    assert claimed[0].change.value == pytest.approx(0.102)

    alone = replace(report_of(seeds=1), profile=before.profile)
    found = compare_runs(alone, replace(after(1), profile=before.profile))
    losses = [change for change in found.changes if change.part == "loss"]
    assert losses and all(change.change is None and change.p is None and not change.claimed for change in losses)
    assert "several seeds: no difference of losses can be claimed" in "\n".join(found.remarks)


def slowed(report, by):
    """The report with our times over the length multiplied by a function of it."""
    axis, *others = report.results.scaling.axes
    points = [
        replace(point, seconds=replace(point.seconds, median=point.seconds.median * by(point.value)))
        if point.contestant == "resnet-bk"
        else point
        for point in axis.points
    ]
    return with_result(report, "scaling", axes=[replace(axis, points=points), *others])


def test_another_exponent_is_told_and_a_disturbed_point_is_not_taken_for_one(before):
    alone = with_result(before, "scaling", axes=before.results.scaling.axes[:1])
    (change,) = [row for row in compare_runs(alone, slowed(alone, lambda value: value**0.5)).changes if row.claimed]
    assert (change.part, change.what, change.contestant) == ("exponent", "time over sequence length", "ResNet-BK")
    assert change.change.value == pytest.approx(0.5)
    disturbed = slowed(before, lambda value: 1.4 if value == 8192 else 1.0)
    assert not compare_runs(before, disturbed).claimed


def test_what_failed_in_one_run_only_is_told(before):
    told, grave = words(before, report_of(failing=True))
    assert "cell scaling/num_experts: not run in the first run, timeout in the second." in told
    assert "FAILED (not a number) in the second" in told
    assert "training of Transformer, seed 1: measured in the first run, diverged in the second." in told
    assert "In the second run the machine was busy" in grave


def test_another_workload_is_not_compared(before):
    after = replace(before, workload=replace(before.workload, batch_size=8))
    found = compare_runs(before, after)
    assert not [change for change in found.changes if change.part != "exponent"] and not found.counts
    assert "batch_size 20 against 8" in words(before, after)[1]
    another = replace(before, workload=replace(before.workload, data="book.txt"))
    parts = {change.part for change in compare_runs(before, another).changes}
    assert parts == {"time", "speed-up", "exponent"}


@pytest.mark.parametrize("name", ["corpus_sha256", "tokenizer_sha256"])
def test_a_text_is_another_if_both_reports_know_it_to_be(before, name):
    known, other = (replace(before, workload=replace(before.workload, **{name: 64 * digit})) for digit in "ab")
    assert before.workload.corpus_sha256 is None
    for pair in ((before, known), (known, before), (known, known)):
        assert "loss" in {change.part for change in compare_runs(*pair).changes}
        assert not compare_runs(*pair).settings
    found = compare_runs(known, other)
    assert {change.part for change in found.changes} == {"time", "speed-up", "exponent"}
    assert [setting.what for setting in found.settings] == [name]


def test_another_baseline_is_not_compared(before):
    found = compare_runs(before, report_of(foreign=True))
    assert {change.contestant for change in found.changes if change.part in ("time", "exponent")} == {
        "ResNet-BK",
        "Seed's mixer",
    }
    assert not [change for change in found.changes if change.part == "speed-up"]
    assert "made of something else, and not compared: transformer" in "\n".join(found.remarks)


def test_commits_and_versions_are_named(before):
    packages = {**before.environment["packages"], "torch": "2.14.0"}
    told, grave = words(before, with_environment(before, commit="ffffffffffff", packages=packages))
    assert "The commits are 10ebb4950779 and ffffffffffff." in told
    assert "Versions differ: packages torch 2.13.0+cpu against 2.14.0." in grave


@pytest.mark.parametrize("sections", [("flops",), ("convergence",), ()])
def test_runs_that_share_little_are_compared_all_the_same(before, sections):
    after = report_of(sections=sections)
    shown = said(compose(before, after, compare_runs(before, after)))
    assert "The second run has not measured" in shown


def test_the_document_shows_every_comparison_and_no_plot_is_empty(before):
    after = report_of(noise=1, slower=1.2, failing=True)
    document = compose(before, after, compare_runs(before, after))
    assert document.title == "Two runs compared"
    titles = [section.title for section in document.sections]
    assert titles[0] == "Findings" and titles[-2:] == ["How the first run was made", "How the second run was made"]
    assert {"Wall-clock time", "Test losses", "Scaling exponents", "FLOPs and memory", "Checks and cells"} <= set(
        titles
    )
    for plot in plots(document):
        assert marks(plot.svg) and not list(cut_texts(plot.svg))
