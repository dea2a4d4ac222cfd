"""A suite is only worth something if it finds what is wrong: models with one fault each, through every process."""

from dataclasses import replace

import pytest

from resnet_bk.bench.profiles import PROFILES
from resnet_bk.bench.suite import run_benchmark
from resnet_bk.report.document import compose

SPEEDS = ("timing", "scaling", "convergence")


@pytest.fixture
def measured(smoke_config, tmp_path):
    """What the suite says of ours against a planted baseline."""

    def run(name, *sections, **profile):
        config = replace(
            smoke_config,
            overrides={"mixer": "attention"},
            baseline=f"planted:{name}",
            sections=sections,
            profile=replace(PROFILES["smoke"], lengths=(16,), depths=(), **profile),
        )
        return run_benchmark(config, tmp_path / name, command=["bench"])

    return run


def failure(report, cell):
    return report.cells[cell].failure


def findings(report):
    """The first page as one text."""
    (summary, *_) = compose(report).sections
    return str(summary)


def test_a_model_that_sleeps_is_found_slower(measured):
    report = measured("Sleeping", "timing", rounds=10)
    (forward,) = (row.ratio for row in report.results.timing.ratios if row.phase == "forward")
    assert forward.claimed
    assert forward.low > 1.05


def test_a_model_that_keeps_what_it_saw_is_found_to_grow(measured):
    report = measured("Leaking", "memory")
    ours, planted = report.results.memory.models
    assert ours.grown_per_step == 0
    assert planted.grown_per_step == 4 * 64 * 32 * 4  # a copy of its embedded batch
    assert "step" in findings(report)


def test_a_model_that_reads_ahead_has_no_speed_and_no_loss(measured):
    report = measured("Foreseeing", "timing", "convergence", "scaling", "flops")
    assert [gate.contestant for gate in report.gates if not gate.passed] == ["transformer"]
    for section in SPEEDS:
        assert failure(report, f"{section}/transformer").kind == "withheld"
    assert {row.contestant for row in report.results.timing.phases} == {"resnet-bk"}
    assert report.results.timing.ratios == []
    assert {model.contestant for model in report.results.flops.models} == {"resnet-bk", "transformer"}
    assert "depends on a later token" in findings(report)


def test_a_model_of_no_numbers_is_found(measured):
    report = measured("NotANumber", "timing")
    assert "transformer" in {gate.contestant for gate in report.gates if not gate.passed}
    assert failure(report, "timing/transformer").kind == "withheld"


@pytest.mark.parametrize(
    ("name", "kind"), [("TooLarge", "out of memory"), ("Hanging", "timeout"), ("Dying", "crash")], ids=str
)
def test_what_takes_the_process_with_it_is_a_result(measured, name, kind):
    report = measured(name, "flops", cell_seconds=12.0)
    assert failure(report, "gates/transformer").kind == kind
    assert failure(report, "flops/transformer").kind == "withheld"
    (ours,) = report.results.flops.models
    assert ours.contestant == "resnet-bk"
    assert kind in findings(report)


def test_an_operator_without_a_formula_is_no_zero(measured):
    report = measured("Uncounted", "flops")
    assert "planted" in failure(report, "flops/transformer").message
    assert [model.contestant for model in report.results.flops.models] == ["resnet-bk"]
    assert report.results.flops.ratio is None


def test_of_equal_models_no_difference_is_seen_where_there_is_no_noise(measured):
    """What noise does to times is for test_timing.py and benchmarks/claims.py, which repeat it."""
    report = measured("equal", "flops", "memory")
    assert report.results.flops.ratio == 1
    assert report.results.memory.ratio == 1
