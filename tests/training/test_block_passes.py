"""Which passes of a step block by block are replayed, that they are the same, and what happens if they cannot be."""

import pytest
import torch
from small_training import finish, resume, start

from resnet_bk.errors import UserError
from resnet_bk.frugal.micro_batches import MicroBatches
from resnet_bk.frugal.recorded import RecordedPasses
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.step import train_step
from resnet_bk.training.strategy import describe_strategy, prepare_training

CPU = torch.device("cpu")
BY_BLOCK = {"checkpointing": "offload", "offload_optimizer": True, "stream_weights": True}
LAYERS, ROWS, LENGTH = 4, 6, 12


class Session:
    def __init__(self, *, model=(), rows=2, spare=False, **training):
        torch.manual_seed(0)
        config = ResNetBKConfig.from_preset("tiny", vocab_size=64, num_layers=LAYERS, **dict(model))
        options = {**BY_BLOCK, "batch_size": ROWS, "sequence_length": LENGTH, "warmup_steps": 2, "device": "cpu"}
        self.config = TrainingConfig(**{**options, **training})
        model = ResNetBKForCausalLM(config).train()
        for block in model.model.layers if spare else ():
            block.spare = torch.nn.Parameter(torch.ones(3, 3))
        self.prepared = prepare_training(model, self.config, CPU)
        self.micro_batches, self.number, self.why_not = MicroBatches(rows), 0, []
        self.prepared.by_block.on_unrecorded = self.why_not.append

    def step(self):
        size = (self.config.batch_size, LENGTH + 1)
        ids = torch.randint(64, size, generator=torch.Generator().manual_seed(self.number))
        prepared = self.prepared
        arguments = (prepared.model, prepared.optimizer, prepared.scaler, [(ids[:, :-1], ids[:, 1:])], self.config)
        result = train_step(
            *arguments, self.number, device=CPU, micro_batches=self.micro_batches, by_block=prepared.by_block
        )
        self.number += 1
        return float(result.cross_entropy), result.expert_load.tolist()

    def weights(self):
        return {name: value.clone() for name, value in self.prepared.model.state_dict().items()}


@pytest.fixture
def runs(monkeypatch):
    """The keys of the passes that were run."""
    keys, run = [], RecordedPasses.run

    def noting(passes, key, body, given):
        keys.append(key)
        return run(passes, key, body, given)

    monkeypatch.setattr(RecordedPasses, "run", noting)
    return keys


def assert_same(one, other):
    ours, theirs = one.weights(), other.weights()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_all_passes_but_the_first_steps_are_replayed(runs):
    plain, replayed = Session(), Session(cuda_graphs=True)
    assert replayed.step() == plain.step() and not runs
    assert replayed.step() == plain.step()
    pieces = ROWS // 2
    assert [key[0] for key in runs] == ["forward"] * LAYERS * pieces + ["backward"] * LAYERS * pieces
    assert len({key[1] for key in runs}) == 2, "blocks of both kinds"
    assert_same(replayed, plain)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 7}, "micro-batches are of two sizes"),
        ({"model": {"dropout": 0.1}}, "each pass has a dropout of its own"),
    ],
)
def test_passes_that_are_not_alike_are_computed_one_by_one(runs, options, said):
    plain, replayed = Session(**options), Session(**options, cuda_graphs=True)
    for _ in range(3):
        assert replayed.step() == plain.step()
    assert not runs and replayed.why_not == [said]
    assert_same(replayed, plain)


def test_tokens_that_are_lost_are_so_before_all_blocks(runs):
    model = {"token_dropout": 0.25}
    plain, replayed = Session(model=model), Session(model=model, cuda_graphs=True)
    for _ in range(3):
        assert replayed.step() == plain.step()
    assert runs and Session().step() != Session(model=model).step()
    assert_same(replayed, plain)


def test_each_block_has_its_own_bias_of_the_router(runs):
    model = {"router_bias_update_rate": 0.1, "num_experts": 4}
    plain, replayed = Session(model=model), Session(model=model, cuda_graphs=True)
    for _ in range(4):
        assert replayed.step() == plain.step()
    assert runs
    assert_same(replayed, plain)


def test_a_weight_without_a_gradient_stays_as_it_is(runs):
    """Where it had one of zeros, it would decay."""
    plain, replayed = Session(spare=True), Session(spare=True, cuda_graphs=True)
    for _ in range(3):
        assert replayed.step() == plain.step()
    assert runs
    assert_same(replayed, plain)
    assert all(torch.equal(block.spare, torch.ones(3, 3)) for block in replayed.prepared.model.model.layers)


@pytest.mark.parametrize("at", [0, 1, LAYERS * ROWS // 2 - 1, LAYERS * ROWS // 2, LAYERS * ROWS // 2 + 4], ids=str)
def test_without_memory_to_record_in_the_step_goes_on_as_it_would_have(monkeypatch, at):
    """The pass that fails, and those behind it, are computed one by one: in this step and in all others."""
    plain, replayed = Session(), Session(cuda_graphs=True)
    run, count = RecordedPasses.run, 0

    def failing(passes, key, body, given):
        nonlocal count
        count += 1
        if count > at:
            raise torch.OutOfMemoryError("no room")
        return run(passes, key, body, given)

    monkeypatch.setattr(RecordedPasses, "run", failing)
    for _ in range(4):
        assert replayed.step() == plain.step()
    assert count == at + 1 and replayed.why_not == ["memory did not suffice"] and replayed.micro_batches.rows == 2
    assert_same(replayed, plain)


def test_smaller_micro_batches_are_recorded_anew(runs):
    """After a step that found no memory, from the second one on as many rows on."""
    plain, replayed = Session(), Session(cuda_graphs=True)
    for session in (plain, replayed):
        session.step()
        session.step()
        session.micro_batches.rows, session.micro_batches.proven = 1, False
    before = len(runs)
    assert replayed.step() == plain.step()
    assert len(runs) == before and replayed.prepared.by_block._passes is None, "and what was recorded is forgotten"
    assert replayed.step() == plain.step()
    assert {key[2][0] for key in runs[before:]} == {1}
    assert_same(replayed, plain)


def test_another_error_is_not_hidden(monkeypatch):
    def failing(*_):
        raise RuntimeError("something else")

    replayed = Session(cuda_graphs=True)
    replayed.step()
    monkeypatch.setattr(RecordedPasses, "run", failing)
    with pytest.raises(RuntimeError, match="something else"):
        replayed.step()


def test_a_step_that_failed_leaves_nothing_in_the_next_ones_sums(monkeypatch):
    plain, replayed = Session(), Session(cuda_graphs=True)
    replayed.step(), plain.step()
    run, count = RecordedPasses.run, 0

    def failing_once(passes, key, body, given):
        nonlocal count
        count += 1
        if count == LAYERS * ROWS // 2 + 2:
            raise KeyboardInterrupt
        return run(passes, key, body, given)

    monkeypatch.setattr(RecordedPasses, "run", failing_once)
    with pytest.raises(KeyboardInterrupt):
        replayed.step()
    assert replayed.step() == plain.step()
    assert_same(replayed, plain)


def test_noise_that_is_drawn_before_is_the_noise_that_would_be_drawn():
    torch.manual_seed(0)
    model = ResNetBKForCausalLM(ResNetBKConfig.from_preset("tiny", vocab_size=64)).train()
    moe, x = model.model.layers[0].moe, torch.randn(2, 5, model.config.hidden_size)
    for rows in (None, (1, 4)):
        torch.manual_seed(1)
        expected, routing = moe(x, None, rows)
        after = torch.get_rng_state()
        torch.manual_seed(1)
        noise = moe.noise(x, rows)
        assert torch.equal(torch.get_rng_state(), after)
        found, again = moe(x, None, rows, noise)
        assert torch.equal(found, expected) and torch.equal(again.balancing_loss, routing.balancing_loss)


def test_a_run_that_goes_on_where_there_is_no_gpu_says_so(tmp_path, text_file):
    finish(start(tmp_path / "run", text_file, steps=2, **BY_BLOCK, cuda_graphs=True))
    said = []
    resume(tmp_path / "run", steps=3, observer=said.append)
    assert said == [{"no_cuda_graphs": "this is a CPU"}]


def test_only_a_step_block_by_block_is_replayed():
    with pytest.raises(UserError, match="--checkpointing offload"):
        TrainingConfig(cuda_graphs=True)
    assert "replayed from CUDA graphs" in describe_strategy(TrainingConfig(**BY_BLOCK, cuda_graphs=True))
