"""On a GPU: passes that are recorded and replayed compute what those that are asked for one by one do."""

import pytest
import torch

from resnet_bk.frugal.micro_batches import MicroBatches
from resnet_bk.frugal.recorded import RecordedPasses
from resnet_bk.memory.limits import is_out_of_memory
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.step import train_step
from resnet_bk.training.strategy import prepare_training

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
GPU = torch.device("cuda")
BY_BLOCK = {"checkpointing": "offload", "offload_optimizer": True, "stream_weights": True, "micro_batch_size": 2}
ROWS, LENGTH, STEPS = 8, 64, 6


class Session:
    """Training of six blocks of two kinds, which stand in either of two places on the device."""

    def __init__(self, *, model=(), rows=2, **training):
        torch.manual_seed(0)
        config = ResNetBKConfig.from_preset("tiny", vocab_size=64, num_layers=6, **dict(model))
        options = {**BY_BLOCK, "batch_size": ROWS, "sequence_length": LENGTH, "warmup_steps": 2, "learning_rate": 3e-3}
        self.config = TrainingConfig(**{**options, **training})
        self.prepared = prepare_training(ResNetBKForCausalLM(config).train(), self.config, GPU)
        self.micro_batches = MicroBatches(rows, is_out_of_memory=is_out_of_memory)
        self.why_not, self.number = [], 0
        self.prepared.by_block.on_unrecorded = self.why_not.append

    def step(self):
        ids = torch.randint(64, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(self.number))
        prepared = self.prepared
        result = train_step(
            prepared.model,
            prepared.optimizer,
            prepared.scaler,
            [(ids[:, :-1], ids[:, 1:])],
            self.config,
            self.number,
            device=GPU,
            micro_batches=self.micro_batches,
            by_block=prepared.by_block,
        )
        self.number += 1
        return float(result.cross_entropy)

    def weights(self):
        self.prepared.optimizer.synchronize()
        return {name: value.detach().cpu().double() for name, value in self.prepared.model.state_dict().items()}


def distance(one, other):
    """Of weights, relative to how large they are."""
    ours, theirs = one.weights(), other.weights()
    return max(float((ours[name] - theirs[name]).norm() / (1e-3 + theirs[name].norm())) for name in theirs)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("mixer", ["resolvent", "bk", "attention"])
def test_replayed_steps_are_those_of_plain_ones(mixer, clips, precision):
    options = {"model": {"mixer": mixer}, "precision": precision, "max_grad_norm": 1.0 if clips else None}
    options["half_weights"] = precision != "fp32"
    plain, again, replayed = Session(**options), Session(**options), Session(**options, cuda_graphs=True)
    curves = [[session.step() for _ in range(STEPS)] for session in (plain, again, replayed)]
    assert curves[2] == pytest.approx(curves[0], rel=1e-5 if precision == "fp32" else 3e-3)
    # Kernels that add up in no fixed order are not the same twice either.
    assert distance(replayed, plain) <= 1e-5 + 10 * distance(again, plain)
    assert replayed.prepared.by_block._passes is not None and not replayed.why_not


@pytest.mark.parametrize("model", [{"router_bias_update_rate": 0.1, "num_experts": 4}, {"router_aux_loss_coef": 0.0}])
def test_what_blocks_have_besides_weights_is_each_ones_own(model):
    plain, again, replayed = Session(model=model), Session(model=model), Session(model=model, cuda_graphs=True)
    curves = [[session.step() for _ in range(STEPS)] for session in (plain, again, replayed)]
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)
    assert distance(replayed, plain) <= 1e-5 + 10 * distance(again, plain)


def test_evaluation_in_between_changes_nothing():
    straight, interrupted = Session(cuda_graphs=True), Session(cuda_graphs=True)
    for _ in range(STEPS):
        expected = straight.step()
        assert interrupted.step() == pytest.approx(expected, rel=1e-5)
        model = interrupted.prepared.model
        model.eval()
        with torch.no_grad():
            model(torch.randint(64, (3, 50), device=GPU))
        model.train()


def test_where_memory_does_not_suffice_training_goes_on_without(monkeypatch):
    leave = RecordedPasses._leave

    def more_than_there_is(recorded, results):
        torch.empty(2**50, dtype=torch.uint8, device=GPU)
        return leave(recorded, results)

    plain, replayed = Session(), Session(cuda_graphs=True)
    monkeypatch.setattr(RecordedPasses, "_leave", more_than_there_is)
    losses, found = ([session.step() for _ in range(STEPS)] for session in (plain, replayed))
    assert found == pytest.approx(losses, rel=1e-5)
    assert replayed.why_not == ["memory did not suffice"] and replayed.micro_batches.rows == 2
