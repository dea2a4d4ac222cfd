"""Planted faults: what must stop a benchmark stops it."""

import pytest
import torch

from resnet_bk.bench import stability, suite
from resnet_bk.bench.contestants import contestant_configs
from resnet_bk.models import ResNetBKConfig
from resnet_bk.ops import bk_core
from resnet_bk.ops.carry import bk_carry

CPU = torch.device("cpu")


@pytest.fixture
def configs():
    return contestant_configs("tiny", {})


@pytest.fixture
def bk_configs():
    return contestant_configs("tiny", {"mixer": "bk"})


def test_the_gates_hold_for_sound_models(configs):
    gates = stability.run_gates(configs, CPU)
    assert len(gates) == 7
    assert all(gate.passed for gate in gates)


@pytest.mark.parametrize("regime", ["tunnelling", "scattering"])
def test_a_wrong_carry_does_not_pass(configs, monkeypatch, regime):
    configs = {
        **configs,
        "resnet-bk": ResNetBKConfig(**{**configs["resnet-bk"].own_fields(), "resolvent_regime": regime}),
    }
    assert all(gate.passed for gate in stability.run_gates(configs, CPU))

    def wrong(q, k, v, log_l, **arguments):
        result = bk_carry(q, k, v, log_l, **arguments)
        return result if arguments["form"] == "quadratic" else result + 1e-2 * v

    monkeypatch.setattr(stability, "bk_carry", wrong)
    failed = [gate.name for gate in stability.run_gates(configs, CPU) if not gate.passed]
    assert failed == [f"bk_carry's {what}, {regime}, against all pairs" for what in ("values", "gradients")]


def test_models_without_a_carry_have_no_gate_for_it(bk_configs):
    assert len(stability.run_gates(bk_configs, CPU)) == 4


def test_a_model_that_reads_ahead_does_not_pass(bk_configs):
    leaking = ResNetBKConfig(**{**bk_configs["resnet-bk"].own_fields(), "causal": False})
    gates = {gate.name: gate for gate in stability.run_gates({**bk_configs, "resnet-bk": leaking}, CPU)}
    gate = gates["ResNet-BK: no logit depends on a later token"]
    assert not gate.passed
    assert gate.measured > 1e6 * gate.limit


@pytest.mark.parametrize("fault", ["values", "gradients", "not a number"])
def test_a_wrong_operator_does_not_pass(configs, monkeypatch, fault):
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
    failed = [gate.name for gate in stability.run_gates(configs, CPU) if not gate.passed]
    assert any(word in " ".join(failed) for word in ("values", "gradients"))


@pytest.mark.filterwarnings("ignore:causal=False")
def test_nothing_is_timed_after_a_gate_has_failed(tmp_path, smoke_config, monkeypatch):
    def leaking_configs(preset, overrides):
        found = contestant_configs(preset, {**overrides, "mixer": "bk"})
        leak = ResNetBKConfig(**{**found["resnet-bk"].own_fields(), "causal": False})
        return {**found, "resnet-bk": leak}

    monkeypatch.setattr(suite, "contestant_configs", leaking_configs)
    monkeypatch.setattr(suite, "_check_models", lambda models, training, device: None)
    report = suite.run_benchmark(smoke_config, tmp_path / "bench", command=["bench"])
    assert [gate.name for gate in report.gates if not gate.passed] == ["ResNet-BK: no logit depends on a later token"]
    assert all(result is None for result in vars(report.results).values())
