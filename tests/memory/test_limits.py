"""What does not fit is refused in words, before anything is allocated."""

import psutil
import pytest
import torch

from resnet_bk.errors import UserError
from resnet_bk.memory import limits
from resnet_bk.memory.activations import TrainingShape
from resnet_bk.memory.plan import PROCESS_BYTES, Budget, make_plan
from resnet_bk.memory.strategy import STRATEGIES
from resnet_bk.models import ResNetBKConfig

CPU, SHAPE = torch.device("cpu"), TrainingShape(batch_size=4, sequence_length=64)


@pytest.fixture
def config():
    return ResNetBKConfig.from_preset("tiny")


def check(config, strategy=STRATEGIES[0], device=CPU):
    limits.check_training_fits(config, SHAPE, strategy, device=device)


@pytest.mark.parametrize("index", range(len(STRATEGIES)), ids=[strategy.name for strategy in STRATEGIES])
def test_what_the_planner_predicts_is_what_must_be_free(config, monkeypatch, index):
    plan = make_plan(config, SHAPE, Budget()).strategies[index]
    needed = plan.tensor_bytes + plan.host_bytes - PROCESS_BYTES
    monkeypatch.setattr(limits, "available_bytes", lambda: needed)
    check(config, STRATEGIES[index])
    monkeypatch.setattr(limits, "available_bytes", lambda: needed - 1)
    with pytest.raises(UserError, match="resnet-bk plan"):
        check(config, STRATEGIES[index])


def test_on_a_gpu_the_host_needs_room_for_the_weights(config, monkeypatch):
    gpu = torch.device("cuda")
    total = make_plan(config, SHAPE, Budget()).counts.total
    monkeypatch.setattr(limits, "available_bytes", lambda: 4 * total)
    check(config, device=gpu)
    monkeypatch.setattr(limits, "available_bytes", lambda: 4 * total - 1)
    with pytest.raises(UserError, match="resnet-bk plan"):
        check(config, device=gpu)


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "CGROUP", tmp_path)
    machine = limits.available_bytes()
    assert 0 < machine <= psutil.virtual_memory().total + psutil.swap_memory().total
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\ninactive_file 100000\n")
    assert limits.available_bytes() == 400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert limits.available_bytes() > 400_000


def test_an_allocation_that_fails_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58)
    assert limits.is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**40, 2**40, device="meta")
    assert limits.is_out_of_memory(caught.value)
    assert limits.is_out_of_memory(MemoryError())
    assert not limits.is_out_of_memory(RuntimeError("shapes differ"))
