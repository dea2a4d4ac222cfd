"""Axes, cells after failures, exponents and the crossover."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from resnet_bk.bench import scaling
from resnet_bk.bench.cells import Outcome
from resnet_bk.bench.profiles import PROFILES
from resnet_bk.bench.setup import Setup
from resnet_bk.bench.statistics import summarize
from resnet_bk.models.matching import total_parameters
from resnet_bk.schema import CellStatus, Failure, ScalingPoint
from resnet_bk.training.config import DataConfig, TrainingConfig

KEYS = ["resnet-bk", "transformer", "seed-mixer"]
AXES = {"lengths": (16, 32, 64), "batch_sizes": (), "widths": (), "depths": (), "experts": ()}
ALL_AXES = {"lengths": (16, 32), "batch_sizes": (1, 2), "widths": (32, 64), "depths": (1, 2), "experts": (1, 3)}


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads that wait for each other on a busy machine are no part of what is tested."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def setup_of(*, baseline=None, overrides=None, withheld=None, preset="tiny", **axes):
    return Setup(
        preset=preset,
        overrides=overrides or {},
        baseline=baseline,
        vocab_size=64,
        data=DataConfig(),
        training=TrainingConfig(batch_size=2, sequence_length=16, device="cpu"),
        profile=replace(PROFILES["smoke"], **{**AXES, **axes}),
        withheld=withheld or {},
    )


def point(contestant, value, seconds, *, noise=0.001):
    samples = [seconds * (1 - noise), seconds, seconds * (1 + noise)]
    return ScalingPoint(contestant=contestant, value=value, seconds=summarize(samples, resamples=100), peak_memory=1)


def failure(contestant, value, kind="out of memory"):
    found = Failure(kind=kind, message="so")
    return ScalingPoint(contestant=contestant, value=value, seconds=None, peak_memory=None, failure=found)


def run(setup, measure):
    """The section, its cells measured by ``measure(cell)``, whose exceptions are failures as in the suite."""
    outcomes, asked = {}, []
    while todo := [cell for cell in scaling.cells(setup, outcomes) if cell.name not in outcomes]:
        cell = todo[0]
        asked.append(cell.name)
        try:
            outcomes[cell.name] = Outcome(status=CellStatus(seconds=1.0), result=measure(cell))
        except MemoryError as error:
            found = Failure(kind="out of memory", message=str(error))
            outcomes[cell.name] = Outcome(status=CellStatus(seconds=1.0, failure=found), result=None)
    return scaling.assemble(setup, outcomes), asked


@pytest.mark.parametrize(
    ("ours", "baseline", "crossover"),
    [
        ([3, 3, 3], [1, 2, 4], 4),
        ([1, 1, 1], [2, 2, 2], 1),
        ([3, 3, 3], [1, 1, 1], None),
        ([1, 3, 1], [2, 2, 2], 4),
        ([1, 1, 3], [2, 2, 2], None),
        ([1, 1, 1], [2, 2, 1.02], None),
    ],
)
def test_the_crossover_is_where_ours_is_faster_from_then_on(ours, baseline, crossover):
    points = [point("resnet-bk", length, t) for length, t in zip((1, 2, 4), ours, strict=True)]
    points += [point("transformer", length, t) for length, t in zip((1, 2, 4), baseline, strict=True)]
    assert scaling.crossover_of(points) == crossover


def test_what_noise_could_be_is_no_crossover():
    points = [point("resnet-bk", 1, 1.0, noise=0.3), point("transformer", 1, 1.2, noise=0.3)]
    assert scaling.crossover_of(points) is None


def test_a_model_against_itself_has_no_crossover():
    generator = np.random.default_rng(0)
    found = []
    for _ in range(100):
        points = [
            ScalingPoint(
                contestant=key,
                value=value,
                seconds=summarize(1 + 0.05 * generator.standard_normal(3), resamples=200),
                peak_memory=1,
            )
            for key in ("resnet-bk", "transformer")
            for value in (1, 2, 4)
        ]
        found.append(scaling.crossover_of(points))
    assert sum(crossover is not None for crossover in found) <= 5


@pytest.mark.parametrize(("kind", "crossover"), [("out of memory", 2), ("timeout", 2), ("error", None)])
def test_ours_is_ahead_where_the_baseline_ran_out_of_memory_or_time(kind, crossover):
    points = [point("resnet-bk", value, 3) for value in (1, 2, 4)]
    points += [point("transformer", 1, 1), failure("transformer", 2, kind)]
    assert scaling.crossover_of(points) == crossover


def test_without_a_baseline_nobody_is_ahead():
    assert scaling.crossover_of([point("resnet-bk", 1, 3)]) is None


def test_exponents_are_slopes_over_the_largest_values():
    points = [point("resnet-bk", value, 1.0 + 1e-3 * value**2) for value in (1, 2, 4, 256, 512, 1024, 2048)]
    time, memory = scaling.exponents_of("sequence_length", points)
    assert (time.quantity, time.from_value) == ("time", 256)
    assert time.exponent.value == pytest.approx(2, abs=0.02)
    assert time.exponent.low <= time.exponent.value <= time.exponent.high
    assert memory.exponent.value == pytest.approx(0)


def test_two_points_have_no_exponent_and_experts_have_none():
    two = [point("resnet-bk", value, 1) for value in (1, 2)]
    assert scaling.exponents_of("sequence_length", [*two, failure("resnet-bk", 4)]) == []
    assert len(scaling.exponents_of("sequence_length", [*two, point("resnet-bk", 4, 1)])) == 2
    assert scaling.exponents_of("num_experts", [*two, point("resnet-bk", 4, 1)]) == []


def test_all_contestants_take_turns_in_one_cell():
    _, asked = run(setup_of(), lambda cell: [point(key, cell.arguments["value"], 1) for key in KEYS])
    assert asked == ["sequence_length/16", "sequence_length/32", "sequence_length/64"]


def test_who_runs_out_of_memory_has_that_for_a_point_and_is_not_asked_for_more():
    def measure(cell):
        keys, value = cell.arguments["contestants"], cell.arguments["value"]
        if "transformer" in keys and value >= 32:
            raise MemoryError("no room")
        return [point(key, value, 1) for key in keys]

    result, asked = run(setup_of(), measure)
    assert asked == [
        "sequence_length/16",
        "sequence_length/32",
        *(f"sequence_length/32/{key}" for key in KEYS),
        "sequence_length/64",
    ]
    (axis,) = result.axes
    by_place = {(found.contestant, found.value): found for found in axis.points}
    assert by_place["transformer", 32].failure == Failure(kind="out of memory", message="no room")
    assert by_place["resnet-bk", 32].failure is None
    assert ("transformer", 64) not in by_place
    assert by_place["seed-mixer", 64].seconds is not None
    assert {row.contestant for row in axis.exponents} == {"resnet-bk", "seed-mixer"}


def test_who_only_lacked_room_beside_the_others_goes_on():
    def measure(cell):
        keys, value = cell.arguments["contestants"], cell.arguments["value"]
        if len(keys) > 1 and value == 32:
            raise MemoryError("no room for all")
        return [point(key, value, 1) for key in keys]

    result, asked = run(setup_of(), measure)
    assert asked[-1] == "sequence_length/64"
    assert not [found for found in result.axes[0].points if found.failure]
    assert len(result.axes[0].points) == 9


def test_nobody_left_means_nothing_more_is_asked():
    def measure(cell):
        raise MemoryError("never")

    result, asked = run(setup_of(), measure)
    assert len(asked) == 1 + len(KEYS)
    assert {found.contestant for found in result.axes[0].points} == set(KEYS)


def test_the_last_one_left_is_measured_once():
    def measure(cell):
        if cell.arguments["contestants"] != ["resnet-bk"] or cell.arguments["value"] == 64:
            raise MemoryError("never")
        return [point("resnet-bk", cell.arguments["value"], 1)]

    result, asked = run(setup_of(), measure)
    assert asked[-2:] == ["sequence_length/32/resnet-bk", "sequence_length/64/resnet-bk"]
    assert [found.value for found in result.axes[0].points if found.contestant == "resnet-bk"] == [16, 32, 64]


def test_part_of_the_cells_makes_part_of_the_section():
    setup = setup_of()
    assert scaling.assemble(setup, {}) is None
    done = Outcome(status=CellStatus(seconds=1.0), result=[point(key, 16, 1) for key in KEYS])
    assert [found.value for found in scaling.assemble(setup, {"sequence_length/16": done}).axes[0].points] == [16] * 3


def test_a_withheld_contestant_is_not_measured():
    cells = scaling.cells(setup_of(withheld={"transformer": "reads ahead"}), {})
    assert all("transformer" not in cell.arguments["contestants"] for cell in cells)


def test_a_model_of_somebody_elses_is_asked_for_lengths_and_batches():
    asked = {
        cell.arguments["axis"]: cell.arguments["contestants"]
        for cell in scaling.cells(setup_of(baseline="torch.nn:Identity", **ALL_AXES), {})
    }
    assert asked["sequence_length"] == asked["batch_size"] == KEYS
    assert asked["hidden_size"] == asked["num_layers"] == asked["num_experts"] == ["resnet-bk", "seed-mixer"]


@pytest.mark.parametrize(("axis", "value"), [("hidden_size", 128), ("num_layers", 5), ("num_experts", 3)])
def test_contestants_have_the_same_number_of_parameters_at_every_place(axis, value):
    setup = setup_of(preset="100m", overrides={"mixer": "resolvent"})
    configs = [scaling.config_at(setup, axis, value, key) for key in KEYS]
    assert {getattr(config, axis) for config in configs} == {value}
    totals = [total_parameters(config) for config in configs]
    assert max(totals) / min(totals) <= 1.01


def test_heads_keep_their_width_and_experts_grow_with_the_models():
    config = scaling.config_at(setup_of(), "hidden_size", 128, "resnet-bk")
    base = setup_of().configs["resnet-bk"]
    assert config.hidden_size // config.num_resolvent_heads == base.hidden_size // base.num_resolvent_heads
    assert config.intermediate_size == 4 * base.intermediate_size


def test_a_width_of_experts_that_was_asked_for_stays_everyones():
    setup = setup_of(overrides={"intermediate_size": 40})
    assert {scaling.config_at(setup, "num_layers", 4, key).intermediate_size for key in KEYS} == {40}


def test_no_position_table_bounds_the_length():
    setup = setup_of(preset="seed", lengths=(256,))
    assert setup.configs["resnet-bk"].max_position_embeddings == 128
    (cell,) = scaling.cells(setup, {})
    assert len(scaling.measure(setup, cell)) == 2


def test_what_is_measured_is_what_was_asked_for():
    setup = setup_of(**ALL_AXES)
    shapes = {}
    for cell in scaling.cells(setup, {}):
        axis, value = cell.arguments["axis"], cell.arguments["value"]
        shapes[axis] = tuple(scaling.build(setup, axis, value, "resnet-bk").inputs.shape)
    points = scaling.measure(setup, cell)
    assert [found.contestant for found in points] == KEYS
    for found in points:
        assert len(found.seconds.samples) == setup.profile.scaling_rounds
        assert found.peak_memory > 12 * found.parameters
    same = (2, 16)
    assert shapes == {
        "sequence_length": (1, 32),
        "batch_size": (2, 16),
        "hidden_size": same,
        "num_layers": same,
        "num_experts": same,
    }


def test_the_models_take_turns_forth_and_back(monkeypatch):
    order = []

    class Noted:
        def __init__(self, key):
            self.key, self.device = key, torch.device("cpu")
            self.optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.0)

        def forward(self):
            order.append(self.key)
            return torch.zeros(1, requires_grad=True)

    samples = scaling.times({"a": Noted("a"), "b": Noted("b")}, 3)
    assert "".join(order) == "abbaabba"
    assert {len(found) for found in samples.values()} == {3}
