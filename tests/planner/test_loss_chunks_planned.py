"""The loss's chunk in the planner: trace and formulas follow it, a search takes smaller ones where logits matter."""

from dataclasses import replace

import pytest
import torch

from resnet_bk.errors import UserError
from resnet_bk.imagined import Machine
from resnet_bk.memory.parameters import count_parameters
from resnet_bk.memory.plan import AT_THE_LOSS, Budget, plan_strategy
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.planner.devices import DEVICES
from resnet_bk.planner.search import candidates, choose_training
from resnet_bk.planner.trace import trace_training
from resnet_bk.planner.verify import verify_training
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.strategy import describe_strategy, prepare_training, strategy_of, training_shape

CPU, CUDA = Machine(kind="cpu"), Machine(kind="cuda", capability=(9, 0))
H100 = DEVICES["h100"]
# A large vocabulary beside a small model.
MODEL = ResNetBKConfig.from_preset("tiny", hidden_size=256, vocab_size=65_536, num_layers=2)
TRAINING = TrainingConfig(batch_size=16, sequence_length=512, precision="bf16", checkpointing="full")


def test_it_is_a_field_of_training_that_the_model_gets():
    training = TrainingConfig(batch_size=2, sequence_length=8, loss_chunk_tokens=3)
    config = ResNetBKConfig.from_preset("tiny")
    assert ResNetBKForCausalLM(config).loss_chunk_tokens is None
    prepared = prepare_training(ResNetBKForCausalLM(config), training, torch.device("cpu"))
    assert prepared.model.loss_chunk_tokens == 3
    assert describe_strategy(training) == "logits of 3 tokens at once"
    with pytest.raises(UserError, match="loss_chunk_tokens is 0; give a number of at least 1, or leave it out"):
        TrainingConfig(loss_chunk_tokens=0)


@pytest.mark.parametrize("chunk", [256, 128])
def test_formulas_and_trace_follow_it(chunk):
    peaks = {}
    for training in (TRAINING, replace(TRAINING, loss_chunk_tokens=chunk)):
        shape, counts = training_shape(training), count_parameters(MODEL)
        plan = plan_strategy(strategy_of(training), MODEL, shape, counts, Budget())
        trace = trace_training(MODEL, training, CUDA)
        assert plan.tensor_bytes == pytest.approx(trace.peak_bytes, rel=0.03)
        peaks[training.loss_chunk_tokens] = trace.peak_bytes
    assert peaks[chunk] < peaks[None]


def test_a_real_step_follows_it_too():
    config = ResNetBKConfig.from_preset("tiny", vocab_size=5000)
    training = TrainingConfig(batch_size=4, sequence_length=64, loss_chunk_tokens=40)
    traced = trace_training(config, training, CPU).peak_bytes
    measured = verify_training(config, training, torch.device("cpu")).tensor_bytes
    assert measured <= traced <= 1.005 * measured
    assert traced < trace_training(config, replace(training, loss_chunk_tokens=None), CPU).peak_bytes


def test_smaller_chunks_are_tried_where_most_is_at_the_loss_and_cost_time():
    ways = candidates(MODEL, TRAINING, H100, fixed={"checkpointing", "precision"})
    counts = count_parameters(MODEL)
    rules = {}
    for way in (way for way in ways if way.training.loss_chunk_tokens is None):
        rules[replace(way.training, loss_chunk_tokens=None)] = way
    smaller = [way for way in ways if way.training.loss_chunk_tokens is not None]
    assert smaller
    for way in smaller:
        rule = rules[replace(way.training, loss_chunk_tokens=None)]
        assert way.device_bytes < rule.device_bytes
        assert way.cost.device_seconds > rule.cost.device_seconds
        plan = plan_strategy(strategy_of(rule.training), MODEL, training_shape(rule.training), counts, Budget())
        assert plan.moment == AT_THE_LOSS


def test_a_budget_between_takes_a_smaller_chunk():
    fixed = {"checkpointing", "precision", "micro_batch_size", "offload_optimizer"}
    wide = choose_training(MODEL, TRAINING, Budget(gpu_bytes=80 * 10**9), H100, fixed=fixed)
    assert wide.training.loss_chunk_tokens is None
    tight = choose_training(MODEL, TRAINING, Budget(gpu_bytes=wide.gpu_bytes - 20_000_000), H100, fixed=fixed)
    assert tight.training.loss_chunk_tokens is not None
    kept = choose_training(
        MODEL, replace(TRAINING, loss_chunk_tokens=300), Budget(gpu_bytes=80 * 10**9), H100, fixed={"loss_chunk_tokens"}
    )
    assert kept.training.loss_chunk_tokens == 300
