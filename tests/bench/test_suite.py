"""The whole suite in its smallest size: what it writes, keeps, retries and refuses."""

import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from resnet_bk.bench import setup as bench_setup
from resnet_bk.bench import suite
from resnet_bk.bench.contestants import contenders, contestant_configs
from resnet_bk.bench.process import Ended, run_apart, side_by_side
from resnet_bk.bench.profiles import FIXED_RATES, PROFILES, fixed_rate
from resnet_bk.bench.setup import Setup
from resnet_bk.bench.subject import logits_of
from resnet_bk.errors import UserError
from resnet_bk.files import read_json, sole_use, write_json
from resnet_bk.models.matching import total_parameters
from resnet_bk.schema import SECTIONS, Failure, read_report

KEYS = ("resnet-bk", "transformer", "seed-mixer")


def test_every_section_is_measured_and_written(smoke_report):
    report, path = smoke_report
    assert read_report(path) == report
    assert {name.partition("/")[0] for name in report.cells} == {"gates", *SECTIONS}
    assert not [cell.failure for cell in report.cells.values() if cell.failure]
    assert report.gates and all(gate.passed for gate in report.gates)
    assert all(vars(report.results).values())


def test_all_models_have_the_same_number_of_parameters_within_one_percent(smoke_report):
    report, _ = smoke_report
    for other in report.contestants[1:]:
        assert abs(report.ours.parameters / other.parameters - 1) <= 0.01


def test_the_transformer_differs_in_the_mixer_and_the_expert_width_only(smoke_report):
    ours, baseline, _ = (contestant.config for contestant in smoke_report[0].contestants)
    assert (ours["mixer"], baseline["mixer"]) == ("resolvent", "attention")
    assert ours["conv_size"] == baseline["conv_size"] > 0
    assert {name for name in ours if ours[name] != baseline[name]} == {"mixer", "intermediate_size"}


def test_the_seeds_mixer_stands_beside_them_without_a_convolution(smoke_report):
    ours, _, seeds = (contestant.config for contestant in smoke_report[0].contestants)
    assert (seeds["mixer"], seeds["conv_size"]) == ("bk", 0)
    assert {name for name in ours if ours[name] != seeds[name]} == {"mixer", "intermediate_size", "conv_size"}


@pytest.mark.parametrize("choice", [("seed", {}), ("tiny", {"mixer": "bk"})], ids=str)
def test_the_seeds_mixer_is_not_compared_with_itself(choice):
    preset, overrides = choice
    configs = contestant_configs(preset, overrides)
    assert list(configs) == ["resnet-bk", "transformer"]
    assert configs["resnet-bk"].mixer == "bk"


@pytest.mark.parametrize(
    "overrides", [{}, {"num_layers": 5, "conv_size": 0}, {"resolvent_regime": "scattering"}], ids=str
)
@pytest.mark.parametrize("preset", ["tiny", "100m", "1b"])
def test_the_seeds_mixer_gets_as_many_parameters_by_wider_experts(preset, overrides):
    ours, _, seeds = contestant_configs(preset, overrides).values()
    assert abs(total_parameters(seeds) / total_parameters(ours) - 1) <= 0.01


def test_a_width_that_was_asked_for_is_every_models():
    assert {config.intermediate_size for config in contestant_configs("tiny", {"intermediate_size": 40}).values()} == {
        40
    }


def test_every_phase_was_measured_for_all_in_every_round(smoke_report):
    timing = smoke_report[0].results.timing
    phases = ("forward", "backward", "optimizer", "step", "prefill", "decode", "forward, cold cache")
    assert {(row.phase, row.contestant) for row in timing.phases} == {(phase, key) for phase in phases for key in KEYS}
    assert all(len(row.seconds.samples) == PROFILES["smoke"].rounds for row in timing.phases)
    assert all(min(row.seconds.samples) > 0 for row in timing.phases)


def test_memory_grows_through_the_step_and_the_planner_does_not_promise_less(smoke_report):
    report, _ = smoke_report
    for contestant, model in zip(report.contestants, report.results.memory.models, strict=True):
        assert model.after_load < model.after_forward <= model.peak_forward <= model.peak_step
        assert model.peak_backward <= model.peak_step <= model.predicted_peak
        assert model.after_load >= 4 * contestant.parameters
        assert model.optimizer >= 8 * contestant.parameters
        assert model.grown_per_step == 0


def test_quick_tunes_nothing_and_standard_does():
    assert PROFILES["quick"].learning_rates == () and PROFILES["quick"].seeds == (0,)
    assert len(PROFILES["standard"].learning_rates) > 1 and len(PROFILES["standard"].seeds) >= 3


def test_a_rate_that_is_not_tuned_is_the_arms_own_and_less_for_wider_models(smoke_report):
    convergence = smoke_report[0].results.convergence
    assert convergence.learning_rates == []
    kinds = {"resnet-bk": "resolvent", "transformer": "attention", "seed-mixer": "bk"}
    assert {kinds.get(arm.key, arm.key): arm.learning_rate for arm in convergence.arms} == FIXED_RATES
    assert fixed_rate("attention", 64) == FIXED_RATES["attention"]
    assert fixed_rate("attention", 512) == pytest.approx(FIXED_RATES["attention"] / 8)


def test_the_leaking_arm_is_marked_and_no_other(smoke_report):
    arms = smoke_report[0].results.convergence.arms
    assert {arm.key for arm in arms if arm.leaks} == {"bidirectional"}
    assert {arm.key for arm in arms} == {"resnet-bk", "transformer", "seed-mixer", "blend", "bidirectional"}


def test_all_arms_see_the_same_number_of_tokens(smoke_report):
    convergence = smoke_report[0].results.convergence
    assert {arm.train[-1].tokens for arm in convergence.arms} == {convergence.steps * convergence.tokens_per_step}


def test_causality_is_measured_where_it_holds_and_where_it_must_not(smoke_report):
    for row in smoke_report[0].results.stability.causality:
        assert (row.largest_change <= 1e-10) is row.causal


def test_nothing_is_measured_twice(smoke_report, smoke_config, monkeypatch):
    report, path = smoke_report
    monkeypatch.setattr(suite, "run_apart", lambda _, arguments, **__: pytest.fail(f"{arguments[1]} again"))
    again = suite.run_benchmark(smoke_config, path.parent, command=["bench"])
    assert again == report


def test_other_settings_do_not_overwrite(smoke_report, smoke_config):
    _, path = smoke_report
    before = path.read_bytes()
    other = replace(smoke_config, training=replace(smoke_config.training, batch_size=5))
    with pytest.raises(UserError, match=r"another benchmark.*choose another --out"):
        suite.run_benchmark(other, path.parent, command=["bench"])
    assert path.read_bytes() == before


def test_other_code_or_another_machine_does_not_mix_in(smoke_report, smoke_config, monkeypatch):
    _, path = smoke_report
    monkeypatch.setattr(suite, "describe_environment", lambda: {"commit": "another"})
    with pytest.raises(UserError, match="another machine"):
        suite.run_benchmark(smoke_config, path.parent, command=["bench"])


@pytest.fixture
def measured_book(tmp_path, smoke_config, monkeypatch):
    """A benchmark on a text file of which every cell has failed at once, and its report."""
    failed = Ended(seconds=1.0, failure=Failure(kind="crash", message=""))
    monkeypatch.setattr(suite, "run_apart", lambda *_, **__: failed)
    monkeypatch.setenv("RESNET_BK_CACHE", str(tmp_path / "cache"))
    book = tmp_path / "book.txt"
    book.write_text("The quick brown fox jumps over the lazy dog.\n" * 60)
    config = replace(smoke_config, sections=("flops",), data=replace(smoke_config.data, data=str(book)))
    suite.run_benchmark(config, tmp_path / "out", command=["bench"])
    return config, book, tmp_path / "out" / "report.json"


def refused_again(config, path, complaint):
    before = path.read_bytes()
    with pytest.raises(UserError, match=complaint):
        suite.run_benchmark(config, path.parent, command=["bench"])
    assert path.read_bytes() == before


def test_a_text_that_was_edited_is_another_though_it_has_as_many_tokens(measured_book):
    config, book, path = measured_book
    book.write_text(book.read_text().replace("fox", "cat"))
    refused_again(config, path, r"^the text of \S+/book\.txt is not the one .*; restore it, or choose another --out$")
    book.write_text(book.read_text().replace("cat", "fox"))
    suite.run_benchmark(config, path.parent, command=["bench"])


def test_another_vocabulary_of_the_same_size_is_another(measured_book):
    config, _, path = measured_book
    document = read_json(path)
    assert len(document["workload"]["tokenizer_sha256"]) == 64
    document["workload"]["tokenizer_sha256"] = 64 * "0"
    write_json(path, document)
    refused_again(config, path, r"its vocabulary differs\); choose another --out")


def test_a_report_from_before_texts_had_fingerprints_is_read_but_not_gone_on_with(measured_book):
    config, _, path = measured_book
    document = read_json(path)
    for name in ("corpus_sha256", "tokenizer_sha256"):
        del document["workload"][name]
    write_json(path, document)
    assert read_report(path).workload.corpus_sha256 is None
    refused_again(config, path, "does not say what its text was; choose another --out")


def test_a_text_that_changes_while_it_is_measured_on_is_not_measured(measured_book):
    config, book, _ = measured_book
    setup, _ = suite._begin(config, ["bench"], lambda _: None)
    assert len(setup.dataset.train.tokens) > 0
    book.write_text(book.read_text().replace("fox", "cat"))
    bench_setup._dataset.cache_clear()  # a cell is a process of its own
    with pytest.raises(UserError, match=r"book\.txt was changed while it was measured on; restore it"):
        _ = setup.dataset


def test_two_benchmarks_are_not_for_one_folder(measured_book, monkeypatch):
    config, _, path = measured_book
    monkeypatch.setattr(suite, "prepare_dataset", lambda *_, **__: pytest.fail("the other one is being timed"))
    with sole_use(path.parent, "free"):
        refused_again(config, path, f"^{path.parent} is in use by another benchmark; wait .* or choose another --out$")


def test_a_benchmark_has_its_folder_to_itself_while_it_runs_and_no_longer(measured_book, monkeypatch):
    config, _, path = measured_book
    refused = []

    def meanwhile(*_, **__):
        with pytest.raises(UserError) as caught, sole_use(path.parent, "in use"):
            pass
        refused.append(str(caught.value))
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "run_apart", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        suite.run_benchmark(config, path.parent, command=["bench"])
    assert refused == ["in use"]
    assert sorted(found.name for found in path.parent.iterdir()) == ["cells", "report.json"]
    with sole_use(path.parent, "still in use"):
        pass


def with_cell(path, happens):
    """``run_apart``, but for one cell."""
    apart = suite.run_apart

    def run(work, arguments, **options):
        return happens() if arguments[1].path == path else apart(work, arguments, **options)

    return run


def test_a_cell_that_fails_is_recorded_and_tried_again(tmp_path, smoke_config, monkeypatch):
    config = replace(smoke_config, sections=("flops",))

    def broken():
        return Ended(seconds=1.0, failure=Failure(kind="error", message="the counter is broken"))

    with monkeypatch.context() as patch:
        patch.setattr(suite, "run_apart", with_cell("flops/transformer", broken))
        report = suite.run_benchmark(config, tmp_path, command=["bench"])
    assert report.cells["flops/transformer"].failure.message == "the counter is broken"
    assert [model.contestant for model in report.results.flops.models] == ["resnet-bk", "seed-mixer"]
    again = suite.run_benchmark(config, tmp_path, command=["bench"])
    assert again.cells["flops/transformer"].failure is None
    assert again.cells["flops/resnet-bk"] == report.cells["flops/resnet-bk"]  # its seconds too: it was not run again
    assert [model.contestant for model in again.results.flops.models] == list(KEYS)


def test_cells_that_are_not_timed_run_at_once_and_timed_ones_alone(tmp_path, smoke_config, monkeypatch):
    monkeypatch.setattr(Setup, "at_once", 2)
    together, running, most = threading.Barrier(2, timeout=60), [], {}
    apart = suite.run_apart

    def run(work, arguments, **options):
        section = arguments[1].section
        running.append(section)
        if section == "gates":
            together.wait()
        most[section] = max(most.get(section, 0), len(running))
        ended = apart(work, arguments, **options)
        running.remove(section)
        return ended

    monkeypatch.setattr(suite, "run_apart", run)
    events = []
    config = replace(smoke_config, sections=("memory",))
    report = suite.run_benchmark(config, tmp_path, command=["bench"], on_progress=events.append)
    assert most == {"gates": 2, "memory": 1}
    assert all(cell.failure is None for cell in report.cells.values())
    assert [event.done for event in events if event.status is not None] == list(range(1, 8))


def test_if_one_of_several_is_stopped_all_are():
    def stopped():
        time.sleep(1)
        raise KeyboardInterrupt

    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        side_by_side([partial(run_apart, time.sleep, (120,), timeout=120, kind_of=suite.failure_kind), stopped])
    assert time.perf_counter() - began < 60


def test_a_kill_loses_only_the_cell_in_hand(tmp_path, smoke_config, monkeypatch):
    def killed():
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "run_apart", with_cell("flops/transformer", killed))
    with pytest.raises(KeyboardInterrupt):
        suite.run_benchmark(replace(smoke_config, sections=("flops",)), tmp_path, command=["bench"])
    kept = read_report(tmp_path / "report.json")
    assert [model.contestant for model in kept.results.flops.models] == ["resnet-bk"]


def test_the_time_left_falls_and_every_cell_is_told_of(tmp_path, smoke_config, monkeypatch):
    monkeypatch.setattr(
        suite, "run_apart", lambda *_, **__: Ended(seconds=1.0, failure=Failure(kind="crash", message=""))
    )
    events = []
    config = replace(smoke_config, sections=("flops", "memory"))
    suite.run_benchmark(config, tmp_path, command=["bench"], on_progress=events.append)
    ended = [event for event in events if event.status is not None]
    assert [event.cell for event in ended] == [f"gates/{name}" for name in ("operators", *KEYS)]
    assert [event.done for event in ended] == [1, 2, 3, 4]
    assert all(event.total >= event.done for event in events)


def test_whom_a_gate_lets_in_later_is_measured_beside_the_others(tmp_path, smoke_config, monkeypatch):
    config = replace(smoke_config, sections=("timing",))

    def hangs():
        return Ended(seconds=1.0, failure=Failure(kind="timeout", message="no end after 1 s"))

    with monkeypatch.context() as patch:
        patch.setattr(suite, "run_apart", with_cell("gates/transformer", hangs))
        report = suite.run_benchmark(config, tmp_path, command=["bench"])
    assert report.cells["timing/transformer"].failure.kind == "withheld"
    assert report.results.timing.ratios == []
    again = suite.run_benchmark(config, tmp_path, command=["bench"])
    assert not [name for name, cell in again.cells.items() if cell.failure]
    assert {row.contestant for row in again.results.timing.phases} == set(KEYS)
    assert again.results.timing.ratios


def test_a_damaged_cell_is_measured_again(tmp_path, smoke_config):
    config = replace(smoke_config, sections=("flops",))
    report = suite.run_benchmark(config, tmp_path, command=["bench"])
    (tmp_path / "cells" / "flops--transformer.json").write_text('{"cell": ', encoding="utf-8")
    again = suite.run_benchmark(config, tmp_path, command=["bench"])
    assert again.results == report.results


def test_cells_of_another_benchmark_are_not_taken_for_these(tmp_path, smoke_config):
    config = replace(smoke_config, sections=("flops",))
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "flops--resnet-bk.json").write_text("{}", encoding="utf-8")
    report = suite.run_benchmark(config, tmp_path, command=["bench"])
    assert report.results.flops.models[0].contestant == "resnet-bk"


@pytest.mark.parametrize(("name", "label"), [("tiny", "Preset tiny"), ("planted:Plain", "Plain")], ids=str)
def test_another_baseline_can_be_named(name, label):
    found = contenders("tiny", {}, name, 100)
    assert found["transformer"].label == label
    assert logits_of(found["transformer"].with_seed(0), torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, 100)
    assert list(found) == list(KEYS)


def test_a_baseline_of_transformers_gets_this_vocabulary(tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path)
    found = contenders("tiny", {}, f"hf:{tmp_path}", 100)["transformer"]
    assert (found.label, found.config) == ("gpt2", None)
    assert found.with_seed(0).get_input_embeddings().num_embeddings == 100


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("huge", "choose a preset"),
        ("hf:/no/such/folder", "there is no folder /no/such/folder"),
        ("no_such_module:f", "PYTHONPATH"),
        ("planted:nothing", "PYTHONPATH"),
    ],
    ids=str,
)
def test_a_baseline_that_is_none_is_refused(name, complaint):
    with pytest.raises(UserError, match=complaint):
        contenders("tiny", {}, name, 100)


def test_a_baseline_that_makes_no_module_is_refused():
    with pytest.raises(UserError, match=r"--baseline json:dumps makes a str; it has to make an nn\.Module"):
        contenders("tiny", {}, "json:dumps", 100)["transformer"].build()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"sections": ("speed",)}, "no section 'speed'"),
        ({"overrides": {"causal": False, "mixer": "bk"}}, "reads its targets"),
        ({"overrides": {"causal": False}}, "with causal=False choose mixer bk or attention"),
        ({"overrides": {"hidden_size": 0}}, "hidden_size is 0"),
        ({"preset": "huge"}, "no preset 'huge'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, smoke_config, change, complaint):
    with pytest.raises(UserError, match=complaint):
        suite.run_benchmark(replace(smoke_config, **change), tmp_path / "bench", command=["bench"])
    assert not (tmp_path / "bench").exists()
