"""Planted faults: what must stop a benchmark stops it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_bk.bench import gates, stability
from resnet_bk.bench.cells import Outcome
from resnet_bk.bench.contestants import Contender
from resnet_bk.bench.profiles import PROFILES
from resnet_bk.bench.setup import Setup
from resnet_bk.models import ResNetBKConfig
from resnet_bk.ops import bk_core
from resnet_bk.ops.carry import bk_carry
from resnet_bk.schema import CellStatus, Failure
from resnet_bk.training.config import DataConfig, TrainingConfig

VOCABULARY = 257
CAUSAL = "{}: no logit depends on a later token"
FINITE = "{}: numbers that are not finite after a training step"


class Sound(nn.Module):
    """The next token by the mean of those before it."""

    def __init__(self, vocab_size):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size)

    def mixed(self, x):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype).view(1, -1, 1)

    def forward(self, ids):
        return self.head(self.mixed(self.embedding(ids)))


class ReadsAhead(Sound):
    def mixed(self, x):
        return super().mixed(x) + 1e-3 * x.roll(-1, 1)


class ReadsAheadOnceTrained(Sound):
    """The branch that leaks begins at zero."""

    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        self.gate = nn.Parameter(torch.zeros(1))

    def mixed(self, x):
        return super().mixed(x) + self.gate * x.mean(1, keepdim=True)


class ReadsAheadInTraining(Sound):
    """By the statistics of a batch, as BatchNorm over a sequence has them."""

    def mixed(self, x):
        return super().mixed(x) - (x.mean((0, 1)) if self.training else 0)


class WithDropout(Sound):
    def mixed(self, x):
        return nn.functional.dropout(super().mixed(x), 0.5, self.training)


class NotANumber(Sound):
    def forward(self, ids):
        return super().forward(ids) * math.nan


class NotANumberBackwards(Sound):
    """Its values are sound and its gradients are not."""

    def mixed(self, x):
        return super().mixed(x) + (0 * x).abs().sqrt()


class OnlySingle(Sound):
    """Computes in float32 whatever its weights are."""

    def forward(self, ids):
        return self.head(super().mixed(self.embedding(ids)).float())


class OnlySingleAndReadsAhead(OnlySingle):
    def forward(self, ids):
        x = super().mixed(self.embedding(ids)).float()
        return self.head(x + x.roll(-1, 1))


class Refuses(Sound):
    def forward(self, ids):
        raise RuntimeError("there is no attention for this shape")


@pytest.fixture(scope="module")
def setup():
    source = Path(__file__).parents[2] / "src" / "resnet_bk" / "ops"
    return Setup(
        preset="tiny",
        overrides={},
        baseline=None,
        vocab_size=VOCABULARY,
        data=DataConfig(data=str(source / "**" / "*.py"), tokenizer="byte"),
        training=TrainingConfig(batch_size=4, sequence_length=64, device="cpu"),
        profile=PROFILES["smoke"],
    )


def with_contenders(setup, **contenders):
    changed = replace(setup)
    changed.__dict__["all_contenders"] = {**setup.all_contenders, **contenders}
    return changed


def foreign(setup, model):
    contender = Contender(
        key="transformer", label="Planted", source="here", config=None, build=lambda: model(VOCABULARY)
    )
    return with_contenders(setup, transformer=contender)


def run(setup):
    """All gates as the suite would."""
    outcomes = {}
    for cell in gates.cells(setup, {}):
        try:
            outcomes[cell.name] = Outcome(status=CellStatus(seconds=1.0), result=gates.measure(setup, cell))
        except RuntimeError as error:
            failure = Failure(kind="error", message=str(error))
            outcomes[cell.name] = Outcome(status=CellStatus(seconds=1.0, failure=failure), result=None)
    return gates.assemble(setup, outcomes), outcomes


def failed_of(setup, key="transformer"):
    found = gates.measure(setup, next(cell for cell in gates.cells(setup, {}) if cell.name == key))
    assert len(found) == 2
    return {gate.name: gate for gate in found if not gate.passed}


def test_the_gates_hold_for_sound_models(setup):
    found, outcomes = run(setup)
    assert len(found) == 10
    assert all(gate.passed for gate in found)
    assert gates.reasons_to_withhold(setup, outcomes) == ({}, {})


def test_models_without_a_carry_have_no_gate_for_it(setup):
    assert len(gates.operators(replace(setup, overrides={"mixer": "bk"}))) == 2


@pytest.mark.parametrize("model", [Sound, WithDropout, OnlySingle], ids=lambda model: model.__name__)
def test_a_sound_model_from_elsewhere_passes(setup, model):
    assert failed_of(foreign(setup, model)) == {}


@pytest.mark.parametrize(
    "model",
    [ReadsAhead, ReadsAheadOnceTrained, ReadsAheadInTraining, OnlySingleAndReadsAhead],
    ids=lambda model: model.__name__,
)
def test_a_model_that_reads_ahead_does_not_pass(setup, model):
    (gate,) = failed_of(foreign(setup, model)).values()
    assert gate.name.startswith(CAUSAL.format("Planted"))
    assert ("in float32" in gate.name) == (model is OnlySingleAndReadsAhead)
    assert gate.contestant == "transformer" and gate.measured > 2 * gate.limit


def test_one_of_ours_that_reads_ahead_does_not_pass(setup):
    sound = setup.all_contenders["seed-mixer"]
    config = ResNetBKConfig(**{**sound.config.own_fields(), "causal": False})
    build = Contender(key="seed-mixer", label="Leak", source="here", config=config, build=lambda: leaking(config))
    (gate,) = failed_of(with_contenders(setup, **{"seed-mixer": build}), "seed-mixer").values()
    assert gate.name == CAUSAL.format("Leak")
    assert gate.measured > 1e6 * gate.limit


def leaking(config):
    from resnet_bk.bench.contestants import build_model

    return build_model(config, 0)


@pytest.mark.parametrize("model", [NotANumber, NotANumberBackwards], ids=lambda model: model.__name__)
def test_a_model_that_is_not_a_number_does_not_pass(setup, model):
    found = failed_of(foreign(setup, model))
    assert found[FINITE.format("Planted")].measured > 0
    assert (CAUSAL.format("Planted") in found) == (model is NotANumber)


def test_a_fault_of_one_contestant_withholds_that_one_alone(setup):
    _, outcomes = run(foreign(setup, ReadsAhead))
    broken, wrong = gates.reasons_to_withhold(foreign(setup, ReadsAhead), outcomes)
    assert broken == {} and set(wrong) == {"transformer"}
    assert "no logit depends on a later token" in wrong["transformer"]


def test_a_model_that_cannot_run_is_broken_and_says_why(setup):
    changed = foreign(setup, Refuses)
    found, outcomes = run(changed)
    broken, wrong = gates.reasons_to_withhold(changed, outcomes)
    assert set(broken) == {"transformer"} and wrong == {}
    assert "there is no attention for this shape" in broken["transformer"]
    assert all(gate.passed and gate.contestant != "transformer" for gate in found)


def test_operators_that_did_not_end_withhold_everything(setup):
    failure = Failure(kind="timeout", message="no end after 1 s")
    sound = Outcome(status=CellStatus(seconds=1.0), result=[])
    outcomes = dict.fromkeys(setup.all_contenders, sound)
    outcomes["operators"] = Outcome(status=CellStatus(seconds=1.0, failure=failure), result=None)
    assert set(gates.reasons_to_withhold(setup, outcomes)[1]) == set(setup.all_contenders)


@pytest.mark.parametrize("regime", ["tunnelling", "scattering"])
def test_a_wrong_carry_does_not_pass(setup, monkeypatch, regime):
    setup = replace(setup, overrides={"resolvent_regime": regime})
    assert all(gate.passed for gate in gates.operators(setup))

    def wrong(q, k, v, log_l, **arguments):
        result = bk_carry(q, k, v, log_l, **arguments)
        return result if arguments["form"] == "quadratic" else result + 1e-2 * v

    monkeypatch.setattr(stability, "bk_carry", wrong)
    failed = [gate.name for gate in gates.operators(setup) if not gate.passed]
    assert failed == [f"bk_carry's {what}, {regime}, against all pairs" for what in ("values", "gradients")]


@pytest.mark.parametrize(
    ("fault", "words"),
    [("values", ["values"]), ("gradients", ["gradients"]), ("not a number", ["values", "gradients"])],
)
def test_a_wrong_operator_does_not_pass(setup, monkeypatch, fault, words):
    def wrong(v, z, **arguments):
        result = bk_core(v, z, **arguments)
        if arguments["backend"] == "reference":
            return result
        if fault == "values":
            return result + 1e-2
        if fault == "gradients":
            return result + 1e-2 * (v - v.detach())
        return result * float("nan")

    monkeypatch.setattr(stability, "bk_core", wrong)
    failed = [gate.name for gate in gates.operators(setup) if not gate.passed]
    assert failed == [f"bk_core's {what} against complex128" for what in words]
    outcome = Outcome(status=CellStatus(seconds=1.0), result=gates.operators(setup))
    outcomes = {"operators": outcome}
    assert set(gates.reasons_to_withhold(setup, outcomes)[1]) == set(setup.all_contenders)
