"""Each strategy's plan against tensors that real steps made, on the device and on the host."""

import functools
from dataclasses import replace

import pytest
import torch

from resnet_bk.bench.contestants import build_model, random_batch
from resnet_bk.frugal.gradients import HostGradient
from resnet_bk.memory.activations import TrainingShape
from resnet_bk.memory.parameters import count_parameters
from resnet_bk.memory.plan import PROCESS_BYTES, Budget, activation_parts, plan_strategy
from resnet_bk.memory.strategy import STRATEGIES
from resnet_bk.memory.tracking import TensorTracker, training_tensors
from resnet_bk.models import ResNetBKConfig
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.step import train_step
from resnet_bk.training.strategy import prepare_training, strategy_of, training_fields

CPU = torch.device("cpu")
# What dominates, the fields that differ from preset tiny's, batch size, sequence length.
CASES = {
    "activations": ({"num_layers": 6, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 256}, 4, 128),
    "inputs that are worth moving": ({"num_layers": 12, "hidden_size": 64, "vocab_size": 128}, 8, 512),
    "head": ({"num_layers": 4, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 4096}, 2, 32),
    "tied head": ({"num_layers": 3, "hidden_size": 64, "vocab_size": 4096, "tie_word_embeddings": True}, 2, 32),
    "weights": ({"num_layers": 4, "hidden_size": 64, "intermediate_size": 512, "vocab_size": 128}, 1, 16),
}
BY_NAME = {strategy.name: strategy for strategy in STRATEGIES}
IN_SINGLE = {
    f"{strategy.name}, fp32": replace(strategy, half=False, half_weights=False)
    for strategy in STRATEGIES
    if strategy.offload_optimizer
}


def on_host(tensor):
    return isinstance(tensor, HostGradient)


@functools.cache
def measured(mixer, case, name, micro_batches=1):
    """Peaks of tensors on the device and on the host in a second step, and the plan."""
    overrides, batch_size, length = CASES[case]
    config = ResNetBKConfig.from_preset("tiny", mixer=mixer, **{"intermediate_size": 128, **overrides})
    fields = training_fields((BY_NAME | IN_SINGLE)[name], "bf16")
    sizes = {"batch_size": micro_batches * batch_size, "micro_batch_size": batch_size, "sequence_length": length}
    training = TrainingConfig(**sizes, **fields)
    prepared = prepare_training(build_model(config, seed=0).train(), training, CPU)
    batch = random_batch(config, micro_batches * batch_size, length, CPU)
    arguments = (prepared.model, prepared.optimizer, prepared.scaler, [batch], training)
    train_step(*arguments, 0, by_block=prepared.by_block)
    # The second step is the first that has the optimizer's moments; the gradients of the first are still there.
    with TensorTracker() as tracker:
        # Not by a name of their own: that would keep the old gradients alive.
        tracker.include(x for x in training_tensors(prepared.model, prepared.optimizer) if not on_host(x))
        tracker.include(batch)
        train_step(*arguments, 1, by_block=prepared.by_block)
    shape = TrainingShape(batch_size=batch_size, sequence_length=length, micro_batches=micro_batches)
    plan = plan_strategy(strategy_of(training), config, shape, count_parameters(config), Budget())
    return tracker.peak_bytes, tracker.peak_host_bytes, plan


def kept_on_a_gpu(mixer, case, name):
    overrides, batch_size, length = CASES[case]
    config = ResNetBKConfig.from_preset("tiny", mixer=mixer, **{"intermediate_size": 128, **overrides})
    shape = TrainingShape(batch_size=batch_size, sequence_length=length)
    parts = activation_parts(config, shape, (BY_NAME | IN_SINGLE)[name])
    return sum(part.num_bytes for part in parts if part.name == "experts' products")


@pytest.mark.parametrize("name", BY_NAME | IN_SINGLE)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mixer", ["resolvent", "bk", "attention"])
def test_the_planned_peak_of_each_strategy_is_not_below_the_measured_one(mixer, case, name):
    on_device, _, plan = measured(mixer, case, name)
    # On a CPU selective checkpointing computes the experts' products again, which on a GPU it keeps.
    assert on_device <= plan.tensor_bytes
    assert plan.tensor_bytes - kept_on_a_gpu(mixer, case, name) <= 1.25 * on_device


@pytest.mark.parametrize("name", [name for name, strategy in (BY_NAME | IN_SINGLE).items() if strategy.goes_by_block])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mixer", ["resolvent", "attention"])
def test_the_planned_peak_of_several_micro_batches_block_by_block(mixer, case, name):
    on_device, on_host, plan = measured(mixer, case, name, micro_batches=4)
    assert on_device <= plan.tensor_bytes <= 1.25 * on_device
    assert on_host <= plan.host_bytes - PROCESS_BYTES


@pytest.mark.parametrize("mixer", ["resolvent", "bk", "attention"])
def test_each_strategy_saves_what_it_is_for(mixer):
    peaks = {name: measured(mixer, "inputs that are worth moving", name)[0] for name in BY_NAME}
    assert list(peaks.values()) == sorted(peaks.values(), reverse=True)
    assert len(set(peaks.values())) == len(peaks)


@pytest.mark.parametrize("mixer", ["resolvent", "bk", "attention"])
def test_moved_inputs_are_on_the_host_instead(mixer):
    case = "inputs that are worth moving"
    before, after = (measured(mixer, case, name) for name in ("offloaded optimizer", "offloaded activations"))
    inputs = 4 * 8 * 512 * 64
    # Each block's, the loss's and a gradient.
    assert (12 + 2) * inputs <= after[1] - before[1] <= 1.01 * (12 + 2) * inputs
    # Of twelve inputs six are on the device at once, or what goes with them.
    assert 5 * inputs <= before[0] - after[0] <= 8 * inputs


@pytest.mark.parametrize("name", ["offloaded optimizer", "streamed weights"])
def test_what_the_host_needs_is_planned(name):
    # Masters, moments, gradients: allocated before anybody watched, so that they are asked for one by one.
    _, _, plan = measured("resolvent", "weights", name)
    total = count_parameters(
        ResNetBKConfig.from_preset("tiny", **{"intermediate_size": 128, **CASES["weights"][0]})
    ).total
    parts = plan.host_parts
    assert (parts["fp32 weights"], parts["optimizer"], parts["gradients"]) == (4 * total, 8 * total, 4 * total)
    assert plan.host_bytes - PROCESS_BYTES == sum(parts.values()) - PROCESS_BYTES
