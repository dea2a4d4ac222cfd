"""Timing of real models: what is measured, what is claimed of a model against itself, and of one that is 5% slower."""

import gc
import time
from dataclasses import replace

import msgspec
import pytest
import torch
from torch import nn

from resnet_bk.bench import machine, timing
from resnet_bk.bench.cells import Outcome
from resnet_bk.bench.contestants import BASELINE, OURS, contestant_configs
from resnet_bk.bench.machine import CacheFlush, GpuWatch, cache_bytes, measure_peaks, parse_answer
from resnet_bk.bench.process import Waiting
from resnet_bk.bench.profiles import PROFILES
from resnet_bk.bench.setup import Setup
from resnet_bk.bench.subject import Subject, language_model_loss, random_batch, random_tokens
from resnet_bk.memory.parameters import count_parameters
from resnet_bk.models import ResNetBKForCausalLM
from resnet_bk.schema import CellStatus, Peaks
from resnet_bk.training.config import DataConfig, TrainingConfig

CPU = torch.device("cpu")
TRAINING = TrainingConfig(batch_size=2, sequence_length=16)
SMOKE = PROFILES["smoke"]
BUSY = 0.03  # share of the time that a process waits for a processor
SLOWED = 0.1  # share of the loops that took a quarter longer than the quickest
TRAINED = ("forward", "backward", "optimizer", "step", "forward, cold cache")


@pytest.fixture
def quick_machine(monkeypatch):
    """Peaks and caches so small that looking at them takes no time."""
    monkeypatch.setattr(machine, "cache_bytes", lambda _: 2**16)
    monkeypatch.setattr(timing, "measure_peaks", lambda *_: Peaks(flops=1e11, copy_bandwidth=1e10))


@pytest.fixture
def one_thread():
    """A model of a tenth of a millisecond has no work for two, who would wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def setup_of(**changes):
    setup = Setup(
        preset="tiny",
        overrides={},
        baseline=None,
        vocab_size=256,
        data=DataConfig(data=__file__, tokenizer="byte"),
        training=TrainingConfig(batch_size=2, sequence_length=16, device="cpu"),
        profile=SMOKE,
    )
    return replace(setup, **changes)


def small(loss=language_model_loss):
    """A language model without ``generate``, of which a forward pass takes a tenth of a millisecond."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))
    return Subject.of(model, TRAINING, random_tokens(64, 4, 32, CPU), loss=loss)


def small_and_slower():
    """The same, five percent slower: the forward pass is followed by idle turns for a twentieth of what it took."""

    def loss(*arguments):
        began = time.perf_counter()
        found = language_model_loss(*arguments)
        ended = time.perf_counter()
        while time.perf_counter() < ended + 0.05 * (ended - began):
            pass
        return found

    return small(loss)


def against(baseline, **changes):
    profile = replace(SMOKE, **changes)
    return timing.measure_timing({OURS: small, BASELINE: baseline}, profile, compared=(OURS, BASELINE))


@pytest.fixture(scope="module")
def measured():
    """The section's cell, as the suite runs it, through JSON."""
    setup = setup_of()
    (cell,) = timing.cells(setup, {})
    result = msgspec.json.decode(msgspec.json.encode(timing.measure(setup, cell)), type=timing.RESULT)
    return timing.assemble(setup, {cell.name: Outcome(status=CellStatus(seconds=1.0), result=result)})


def test_every_phase_is_measured_for_all_in_every_round(measured):
    samples = {(row.phase, row.contestant): row.seconds.samples for row in measured.phases}
    assert set(samples) == {(phase, key) for phase in timing.PHASES for key in (OURS, BASELINE, "seed-mixer")}
    assert {len(found) for found in samples.values()} == {SMOKE.rounds}
    assert {row.phase for row in measured.ratios} == set(timing.PHASES)


def test_what_stands_beside_the_times(measured):
    assert measured.builds == SMOKE.builds == len(measured.warmup_rounds)
    assert {row.contestant for row in measured.utilisation} == {OURS, BASELINE, "seed-mixer"}
    for row in measured.utilisation:
        (step,) = (p.seconds for p in measured.phases if (p.phase, p.contestant) == ("step", row.contestant))
        assert row.tokens_per_second == pytest.approx(32 / step.median)
        assert row.step_flops > 0
        assert row.optimizer_bandwidth > 0
        assert row.decode_bandwidth > 0
        assert row.first_step_seconds > 0
    assert measured.gpu == []


def test_before_it_is_measured_there_is_nothing():
    assert timing.assemble(setup_of(), {}) is None


def test_a_withheld_contestant_is_not_timed(quick_machine):
    setup = setup_of(withheld={BASELINE: "a gate failed"})
    (cell,) = timing.cells(setup, {})
    result = timing.measure(setup, cell)
    assert {row.contestant for row in result.phases} == {OURS, "seed-mixer"}
    assert result.ratios == []
    assert timing.cells(setup_of(withheld=dict.fromkeys((OURS, BASELINE, "seed-mixer"), "")), {}) == []


@pytest.mark.usefixtures("quick_machine")
def test_a_model_that_does_not_generate_has_no_such_phases():
    result = against(small)
    assert [row.phase for row in result.ratios] == list(TRAINED)
    assert {row.phase for row in result.phases} == set(TRAINED)
    assert {row.decode_bandwidth for row in result.utilisation} == {None}


@pytest.mark.usefixtures("quick_machine")
def test_flops_that_cannot_be_counted_are_none_and_not_zero():
    class Unknown(nn.Embedding):
        def forward(self, input_ids):
            found = super().forward(input_ids)
            return found + torch.cdist(found, found).mean(-1, keepdim=True)

    def build():
        return Subject.of(Unknown(64, 64), TRAINING, random_tokens(64, 4, 32, CPU))

    ours, baseline = against(build).utilisation
    assert ours.step_flops > 0
    assert baseline.step_flops is None


@pytest.mark.usefixtures("quick_machine")
def test_builds_and_turns_alternate(monkeypatch):
    built, turns = [], []
    original = timing._Run._turn

    def builder(key):
        def build():
            built.append(key)
            subject = small()
            subject.key = key
            return subject

        return build

    def turn(run, subject):
        turns.append(subject.key)
        return original(run, subject)

    monkeypatch.setattr(timing._Run, "_turn", turn)
    builders = {key: builder(key) for key in ("a", "b")}
    timing.measure_timing(builders, replace(SMOKE, rounds=4, builds=2, warmup_rounds=1), compared=None)
    assert "".join(built) == "abba"
    # Of each build one round to warm up, and two that count.
    assert "".join(turns) == "ab" + "abba" + "ab" + "abba"


def run_of(*, rounds, builds, **changes):
    return timing._Run({"a": small}, replace(SMOKE, rounds=rounds, builds=builds, **changes))


def test_rounds_are_shared_among_builds_and_none_is_left_without():
    assert run_of(rounds=5, builds=2).blocks == [0, 0, 0, 1, 1]
    assert run_of(rounds=15, builds=3).blocks == [0] * 5 + [1] * 5 + [2] * 5
    assert run_of(rounds=2, builds=3).builds == 2


def test_the_order_is_reversed_every_other_round():
    assert [timing._turns({"a": small, "b": small}, number) for number in (0, 1, 2)] == [
        ["a", "b"],
        ["b", "a"],
        ["a", "b"],
    ]


@pytest.mark.parametrize(
    ("steps", "needed"),
    [([1.0, 0.5, 0.49, 0.1], 3), ([1.0, 1.01], 2), ([1.0, 0.5, 0.2, 0.1, 0.05], 5), ([1.0], 1)],
    ids=str,
)
def test_warming_up_ends_when_steps_take_as_long_as_before(monkeypatch, steps, needed):
    left = iter(steps)
    monkeypatch.setattr(timing._Run, "_turn", lambda *_: {"step": next(left)})
    run = run_of(rounds=1, builds=1, warmup_rounds=min(5, len(steps)))
    assert run._warm_up({"a": None}) == needed


def test_the_garbage_collector_is_left_as_it_was():
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            with timing.without_garbage_collection():
                assert not gc.isenabled()
            assert gc.isenabled() is enabled
        finally:
            gc.enable()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mixer", ["resolvent", "attention", "bk"])
def test_a_token_meets_one_expert_and_no_table_that_is_not_the_head_too(tied, mixer):
    config = contestant_configs("tiny", {"mixer": mixer, "tie_word_embeddings": tied})[OURS]
    counts = count_parameters(config)
    table = 0 if tied else counts.by_component["token embedding"]
    assert timing.weight_bytes_of_a_token(ResNetBKForCausalLM(config)) == 4 * (counts.active - table)


def test_a_call_is_timed_with_the_devices_work():
    waited = []

    def synchronize():
        if waited:
            time.sleep(0.02)
        waited.append(True)

    assert timing.seconds_of(lambda: None, synchronize) >= 0.02


def repetitions(baseline, is_found, *, steady=False, **sizes):
    """How many of twenty runs claim something; none are asked of a machine that others keep busy.

    What a machine's neighbours take of a core that it shares with them is nobody's waiting: who asks for a ``steady``
    one has it found out by a loop of arithmetic.
    """
    watch, found, loops = Waiting(), 0, []
    for _ in range(20):
        loops += [timing.seconds_of(lambda: sum(range(8000)), lambda: None) for _ in range(200)]
        result = against(baseline, warmup_rounds=2, **sizes)
        found += any(row.ratio.claimed for row in result.ratios if is_found(row))
    if (watch.share() or 0) > BUSY:
        pytest.skip(f"other programs had the processor for {watch.share():.0%} of the time")
    slowed = sum(seconds > 1.25 * min(loops) for seconds in loops) / len(loops)
    if steady and slowed > SLOWED:
        pytest.skip(f"a loop of arithmetic took a quarter longer than it can in {slowed:.0%} of the times")
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("quick_machine", "one_thread")
def test_a_model_against_itself_differs_in_one_of_twenty_repetitions_at_most():
    assert repetitions(small, lambda _: True, rounds=96, builds=8) <= 1


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.usefixtures("quick_machine", "one_thread")
def test_a_model_that_is_five_percent_slower_is_found_in_nineteen_of_twenty_repetitions():
    found = repetitions(
        small_and_slower, lambda row: row.phase == "forward" and row.ratio.value > 1, rounds=480, builds=24, steady=True
    )
    assert found >= 19


@pytest.mark.usefixtures("quick_machine", "one_thread")
def test_a_model_that_sleeps_is_found():
    def sleepy(*arguments):
        time.sleep(0.002)
        return language_model_loss(*arguments)

    result = against(lambda: small(sleepy), rounds=24, builds=3)
    ratios = {row.phase: row.ratio for row in result.ratios}
    assert ratios["forward"].claimed
    assert ratios["forward"].value > 1.5


def test_peaks_are_those_of_a_machine(monkeypatch):
    monkeypatch.setattr(machine, "cache_bytes", lambda _: 2**20)
    monkeypatch.setattr(machine, "PRODUCT_WIDTHS", {"cpu": (128, 256)})
    peaks = measure_peaks(CPU, "fp32")
    assert 1e7 < peaks.flops < 1e15
    assert 1e7 < peaks.copy_bandwidth < 1e13


def test_a_flush_is_larger_than_the_cache():
    assert cache_bytes(CPU) >= machine.CPU_CACHE_BYTES
    flush = CacheFlush(CPU)
    assert flush._buffer.numel() >= 2 * cache_bytes(CPU) > machine.CPU_CACHE_BYTES
    flush()
    flush()
    assert flush._buffer[-1] == 2


@pytest.mark.parametrize(
    ("answer", "throttled"),
    [
        ("1980, 61, 512.34, 0x0000000000000000\n", False),
        ("1980, 61, 512.34, 0x0000000000000001\n", False),
        ("1980, 61, 512.34, 0x0000000000000002\n", False),
        ("1410, 84, 700.00, 0x0000000000000004\n", True),
        ("1410, 84, 700.00, 0x0000000000000061\n", True),
        ("1410, 84, [N/A], 0x0000000000000000\n1, 2, 3, 0x4\n", False),
        ("1410, 84, 700.00, [N/A]\n", False),
    ],
)
def test_what_the_driver_answers(answer, throttled):
    (sample,) = parse_answer(answer, 1.5)
    clock, temperature, power, *_ = answer.split(", ")
    assert (sample.seconds, sample.sm_clock_mhz, sample.temperature) == (1.5, float(clock), float(temperature))
    assert sample.power_watts == (None if power == "[N/A]" else float(power))
    assert sample.throttled is throttled


@pytest.mark.parametrize("answer", ["", "No devices were found", "[N/A], 60, 1, 0x0", "1980, [N/A], 1, 0x0", "1, 2, 3"])
def test_an_answer_without_figures_is_none(answer):
    assert parse_answer(answer, 0.0) == []


def test_an_older_driver_is_asked_by_its_own_name_and_an_absent_one_is_not_missed(monkeypatch):
    watch = GpuWatch(CPU)
    watch.sample()
    assert watch.samples == []
    monkeypatch.setattr(watch, "_identity", "GPU-1")
    monkeypatch.setattr(machine, "_ask", lambda _, reasons: "1, 2, 3, 0x0" if "throttle" in reasons else None)
    watch.sample()
    assert len(watch.samples) == 1
    monkeypatch.setattr(machine, "_ask", lambda *_: None)
    watch.sample()
    assert len(watch.samples) == 1


def test_a_machine_without_the_drivers_program_answers_nothing(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine._ask("GPU-1", machine.REASONS[0]) is None


def test_a_prompt_that_is_too_short_for_decoding_is_not_read(quick_machine):
    config = contestant_configs("tiny", {"vocab_size": 60})[BASELINE]
    build = lambda: Subject.build(config, TRAINING, random_batch(config, 2, 4, CPU))  # noqa: E731
    result = timing.measure_timing({OURS: build}, replace(SMOKE, decode_tokens=4), compared=None)
    assert {row.phase for row in result.phases} == set(TRAINED)
