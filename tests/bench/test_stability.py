"""Errors, extremes, causality, determinism and float16, as cells; and what the report makes of them."""

import math
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from resnet_bk.bench import stability
from resnet_bk.bench.cells import Outcome
from resnet_bk.bench.contestants import Contender, build_model
from resnet_bk.bench.profiles import PROFILES
from resnet_bk.bench.setup import Setup
from resnet_bk.report.sections import stability as section
from resnet_bk.schema import CausalityMeasurement, CellStatus, Failure, HalfPrecision, StabilityResult
from resnet_bk.training.config import DataConfig, TrainingConfig

CPU = torch.device("cpu")
EMPTY = StabilityResult(accuracy=[], extremes=[], causality=[], determinism=[])


class Bigrams(nn.Module):
    """A foreign model: the next token by the last one alone."""

    def __init__(self, vocab_size):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size)

    def forward(self, ids):
        return self.head(self.embedding(ids))


class Overflows(Bigrams):
    """Leaves float32 where embeddings are large."""

    def forward(self, ids):
        return self.head(torch.exp(self.embedding(ids)))


class OverflowsInHalf(Bigrams):
    """Its gradients, as loss scaling makes them, are beyond float16 until the scale has fallen."""

    def forward(self, ids):
        return self.head(self.embedding(ids)).to(torch.float16).mul(30).float()


class Forgetful(Bigrams):
    """Another result at every call."""

    calls = 0

    def forward(self, ids):
        Forgetful.calls += 1
        return super().forward(ids) * (1 + 1e-3 * Forgetful.calls)


@pytest.fixture(scope="module")
def setup():
    source = Path(__file__).parents[2] / "src" / "resnet_bk" / "ops"
    return Setup(
        preset="tiny",
        overrides={},
        baseline=None,
        vocab_size=257,
        data=DataConfig(data=str(source / "**" / "*.py"), tokenizer="byte"),
        training=TrainingConfig(batch_size=4, sequence_length=32, device="cpu"),
        profile=PROFILES["smoke"],
    )


def foreign(model):
    return Contender(key="transformer", label="Planted", source="here", config=None, build=lambda: model(257))


def with_baseline(setup, model):
    changed = replace(setup)
    changed.__dict__["all_contenders"] = {**setup.all_contenders, "transformer": foreign(model)}
    return changed


def done(result):
    return Outcome(status=CellStatus(seconds=1.0), result=result)


@pytest.fixture(scope="module")
def outcomes(setup):
    found = {}
    for cell in stability.cells(setup, {}):
        raw = msgspec.json.encode(stability.measure(setup, cell))
        found[cell.name] = done(msgspec.convert(msgspec.json.decode(raw), stability.RESULT))
    return found


def test_every_contestant_has_its_cells(setup):
    names = [cell.name for cell in stability.cells(setup, {})]
    keys = ("resnet-bk", "transformer", "seed-mixer")
    assert names == [
        "accuracy",
        "extremes",
        *(f"contestant/{key}" for key in keys),
        *(f"half/{key}" for key in keys),
    ]
    kept_out = [cell.name for cell in stability.cells(setup.without({"transformer": "a gate failed"}), {})]
    assert kept_out == [name for name in names if "transformer" not in name]


def test_everything_holds_for_sound_models(setup, outcomes):
    result = stability.assemble(setup, outcomes)
    assert len(result.accuracy) == 2 * 1 * 2 * 1
    assert section.worst(result.accuracy) < 1e-4
    assert [check.name for check in (*result.extremes, *result.determinism) if not check.passed] == []
    assert {row.label for row in result.causality if not row.causal} == {"Seed's mixer (bidirectional)"}
    for row in result.causality:
        assert (row.largest_change <= row.limit) is row.causal
    assert [row.contestant for row in result.half_precision] == ["resnet-bk", "transformer", "seed-mixer"]
    assert all(row.loss is not None and row.steps == 2 for row in result.half_precision)


def test_all_three_operators_meet_extremes_with_gradients(setup, outcomes):
    names = [check.name for check in outcomes["extremes"].result.extremes]
    for operator in ("bk_core causal", "bk_core bidirectional", "bk_tunnel", "bk_carry"):
        assert any(name.startswith(operator) for name in names)


def test_an_operator_that_overflows_is_found(monkeypatch):
    real = stability.bk_carry
    monkeypatch.setattr(stability, "bk_carry", lambda q, k, v, log_l: real(q, k, v, log_l) * 1e10 * q.abs().max())
    failed = [check.name for check in stability.extremes(CPU) if not check.passed]
    assert failed == [
        "bk_carry, no decay (log l = 0), values of 1e30: values that are not finite",
        "bk_carry, queries and keys of 1e12, values of 1e6: values that are not finite",
    ]


def test_a_model_that_overflows_at_large_embeddings_is_found(setup):
    for model, passed in ((Bigrams, [True, True]), (Overflows, [False, True])):
        found = stability.extreme_inputs(setup, foreign(model))
        assert [check.passed for check in found] == passed
        assert {check.contestant for check in found} == {"transformer"}


def test_a_model_that_differs_between_runs_is_found(setup):
    assert stability.determinism(setup, foreign(Bigrams)).passed
    found = stability.determinism(setup, foreign(Forgetful))
    assert not found.passed and found.measured > 0


def test_overflows_in_half_precision_are_counted(setup):
    longer = replace(setup, profile=replace(setup.profile, half_precision_steps=8))
    sound, overflowing = (stability.half_precision(longer, foreign(model)) for model in (Bigrams, OverflowsInHalf))
    assert (sound.skipped, sound.scale) == (0, 65536.0)
    assert 0 < overflowing.skipped < 8
    assert overflowing.scale == 65536.0 / 2**overflowing.skipped
    assert overflowing.loss is not None


def test_a_foreign_model_is_expected_to_be_causal(setup):
    changed = with_baseline(setup, Bigrams)
    cell = next(cell for cell in stability.cells(changed, {}) if cell.name == "contestant/transformer")
    (row,) = stability.measure(changed, cell).causality
    assert (row.label, row.causal) == ("Planted", True)
    assert row.largest_change <= row.limit == stability.CAUSALITY_LIMIT


def test_the_largest_change_is_in_double_precision_and_of_any_model(setup):
    config = setup.configs["resnet-bk"]
    assert stability.largest_change_before(build_model(config, 0), 257, CPU, config) < 1e-12
    model = Bigrams(257)
    assert stability.largest_change_before(model, 257, CPU, None) == 0
    assert model.head.weight.dtype == torch.float64


def test_a_position_table_bounds_what_is_tried(setup):
    config = build_model(replace(setup, overrides={"max_position_embeddings": 16}).configs["resnet-bk"], 0).config
    assert stability.largest_change_before(build_model(config, 0), 257, CPU, config) < 1e-12


@pytest.mark.parametrize(("measured", "passed"), [(1.0, True), (1.1, False), (None, False), (math.nan, False)])
def test_a_check_passes_if_it_is_a_number_within_its_limit(measured, passed):
    found = stability.check("what", measured, 1.0, "resnet-bk")
    assert found.passed is passed
    assert found.measured == (measured if measured in (1.0, 1.1) else None)


def test_parts_are_assembled_as_they_come_and_nothing_is_none(setup, outcomes):
    assert stability.assemble(setup, {}) is None
    for name, outcome in outcomes.items():
        text_of(setup, stability.assemble(setup, {name: outcome}))
    failure = Failure(kind="out of memory", message="none left")
    failed = {"accuracy": Outcome(status=CellStatus(seconds=1.0, failure=failure), result=None)}
    shown = text_of(setup, stability.assemble(setup, failed), {"stability/accuracy": failed["accuracy"].status})
    assert "accuracy (out of memory: none left)" in shown


def test_the_report_shows_all_of_it(setup, outcomes):
    shown = text_of(setup, stability.assemble(setup, outcomes))
    assert "Seed's mixer (bidirectional) | no" in shown and "reads its targets, as it must" in shown
    assert "65,536" in shown and "LEAKS" not in shown and "Failed" not in shown


def test_the_report_calls_faults_by_their_names(setup):
    leak = CausalityMeasurement(label="Planted", causal=True, largest_change=1e-3)
    half = HalfPrecision(contestant="transformer", steps=10, skipped=10, scale=64.0, loss=None)
    check = stability.check("Planted: values that are not finite", 3.0, 0.0)
    result = replace(EMPTY, causality=[leak], half_precision=[half], extremes=[check])
    blocks = section.build(report_of(setup, {}), result).blocks
    grave = "\n".join(block.text for block in blocks if getattr(block, "grave", False))
    assert "Not shown to be causal: Planted" in grave
    assert "Not trainable in float16" in grave and "Transformer" in grave
    assert "Failed: Planted: values that are not finite" in grave
    assert "LEAKS" in text_of(setup, result)


def test_no_error_at_all_is_not_an_error_of_zero():
    assert section.worst([]) is None


def text_of(setup, result, failures=None):
    parts = []
    for block in section.build(report_of(setup, failures or {}), result).blocks:
        parts += [getattr(block, "text", "")]
        parts += [" | ".join(row) for row in getattr(block, "rows", [])]
    return "\n".join(parts)


def report_of(setup, failures):
    """All of a report that the section reads."""

    class Stub:
        pass

    report, report_workload = Stub(), Stub()
    report_workload.device = "cpu"
    report.workload = report_workload
    report.labels = {key: contender.label for key, contender in setup.all_contenders.items()}
    report.failures_of = lambda name: failures
    return report
