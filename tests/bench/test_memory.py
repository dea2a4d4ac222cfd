"""Bytes through a step, the planner beside them, and a planted leak."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from resnet_bk.bench import memory
from resnet_bk.bench.cells import Outcome
from resnet_bk.bench.contestants import contestant_configs
from resnet_bk.bench.profiles import PROFILES
from resnet_bk.bench.setup import Setup
from resnet_bk.bench.subject import Subject, random_tokens
from resnet_bk.schema import CellStatus, Failure
from resnet_bk.training.config import DataConfig, TrainingConfig

CPU = torch.device("cpu")
VOCABULARY = 64
TRAINING = TrainingConfig(batch_size=4, sequence_length=64, device="cpu")
MEGABYTE = 10**6


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads that wait for each other on a busy machine are no part of what is tested."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Plain(nn.Module):
    """A model of nobody's."""

    def __init__(self, vocab_size=VOCABULARY):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab_size, 32), nn.Linear(32, vocab_size)

    def forward(self, ids):
        return self.head(self.embedding(ids).relu())


class Leaking(Plain):
    def __init__(self, vocab_size=VOCABULARY):
        super().__init__(vocab_size)
        self.kept = []

    def forward(self, ids):
        self.kept.append(torch.zeros(1000))
        return super().forward(ids)


class ThroughNumpy(Plain):
    """Goes where a trace, which has no numbers, cannot follow."""

    def forward(self, ids):
        return super().forward(torch.from_numpy(ids.numpy()))


class Hungry(Plain):
    """Takes memory that is no tensor's."""

    def forward(self, ids):
        np.ones(200 * MEGABYTE, dtype=np.uint8).sum()
        return super().forward(ids)


def measured(model, training=TRAINING):
    batch = random_tokens(VOCABULARY, training.batch_size, training.sequence_length, CPU)
    return memory.measure_model_memory("model", Subject.of(model, training, batch))


def setup_of(**changes):
    return Setup(
        preset="tiny",
        overrides={},
        baseline=None,
        vocab_size=VOCABULARY,
        data=DataConfig(),
        training=TRAINING,
        profile=PROFILES["smoke"],
        **changes,
    )


@pytest.mark.parametrize("key", ["resnet-bk", "transformer", "seed-mixer"])
def test_the_moments_of_a_step_are_in_order_and_the_planner_knew_the_worst(key):
    config = contestant_configs("tiny", {"vocab_size": VOCABULARY})[key]
    subject = Subject.build(config, TRAINING, random_tokens(VOCABULARY, 4, 64, CPU))
    weights = sum(parameter.nbytes for parameter in subject.model.parameters())
    tensors = len(list(subject.model.parameters()))
    buffers = sum(buffer.nbytes for buffer in subject.model.buffers())
    found = memory.measure_model_memory(key, subject)
    assert found.after_load == weights + buffers + subject.inputs.nbytes + subject.targets.nbytes
    assert found.optimizer == 2 * weights + 4 * tensors
    assert found.after_load + found.optimizer < found.after_forward <= found.peak_forward <= found.peak_step
    assert found.peak_backward <= found.peak_step
    assert found.grown_per_step == 0
    assert found.reserved is None
    assert found.predicted_peak == pytest.approx(found.peak_step, rel=1e-3)
    assert sum(part.num_bytes for part in found.parts) == found.predicted_peak


def test_a_model_of_nobodys_is_predicted_too():
    found = measured(Plain())
    assert found.predicted_peak == pytest.approx(found.peak_step, rel=1e-3)
    assert {part.kind for part in found.parts} >= {"weights", "optimizer", "activations"}


def test_the_optimizer_that_a_subject_has_is_the_one_that_is_predicted():
    model = Plain()
    batch = random_tokens(VOCABULARY, 4, 64, CPU)
    plain_sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    found = memory.measure_model_memory("model", Subject.of(model, TRAINING, batch, optimizer=plain_sgd))
    assert found.optimizer == 0
    assert found.predicted_peak == pytest.approx(found.peak_step, rel=1e-2)


def test_a_leak_is_seen_by_its_bytes():
    assert measured(Leaking()).grown_per_step == 4000


def test_what_waits_for_the_garbage_collector_is_no_leak():
    class Cyclic(Plain):
        def forward(self, ids):
            around = [torch.zeros(1000)]
            around.append(around)
            return super().forward(ids)

    assert measured(Cyclic()).grown_per_step == 0


def test_a_model_that_cannot_be_traced_has_no_prediction_and_all_else():
    found = measured(ThroughNumpy())
    assert found.predicted_peak is None
    assert found.parts == []
    assert found.peak_step == pytest.approx(measured(Plain()).peak_step, rel=0.01)


def test_the_process_has_memory_that_is_no_tensors():
    hungry = measured(Hungry())
    assert 190 * MEGABYTE <= hungry.process < 400 * MEGABYTE, "pages of a process are counted in batches"
    assert hungry.peak_step < 10 * MEGABYTE


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can only begin anew on Linux")
def test_what_the_process_held_before_is_not_the_models():
    np.ones(400 * MEGABYTE, dtype=np.uint8).sum()
    assert measured(Plain()).process < 200 * MEGABYTE


def test_a_peak_is_that_of_a_step_with_moments():
    model = Plain()
    subject = Subject.of(model, TRAINING, random_tokens(VOCABULARY, 4, 64, CPU))
    assert memory.peak_bytes(subject) == measured(Plain()).peak_step


def test_there_is_a_cell_for_each_contestant_that_is_not_withheld():
    assert [cell.name for cell in memory.cells(setup_of(), {})] == ["resnet-bk", "transformer", "seed-mixer"]
    assert "transformer" not in {cell.name for cell in memory.cells(setup_of(withheld={"transformer": "leaks"}), {})}


def test_the_section_is_made_of_what_was_measured():
    setup = setup_of()
    done = Outcome(status=CellStatus(seconds=1.0), result=replace(measured(Plain()), contestant="resnet-bk"))
    larger = replace(done.result, contestant="transformer", peak_step=2 * done.result.peak_step)
    failed = Outcome(
        status=CellStatus(seconds=1.0, failure=Failure(kind="out of memory", message="killed")), result=None
    )
    assert memory.assemble(setup, {}) is None
    alone = memory.assemble(setup, {"resnet-bk": done, "transformer": failed})
    assert [model.contestant for model in alone.models] == ["resnet-bk"]
    assert alone.ratio is None
    both = memory.assemble(setup, {"resnet-bk": done, "transformer": replace(done, result=larger)})
    assert both.ratio == 2
