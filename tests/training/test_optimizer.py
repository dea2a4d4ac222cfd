"""What decays, and the learning rate of every step."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.optimizer import build_optimizer, learning_rate, set_learning_rate

VARIANTS = [
    {"mixer": mixer, "tie_word_embeddings": tied, "max_position_embeddings": table}
    for mixer in ("resolvent", "bk", "attention")
    for tied in (False, True)
    for table in (None, 16)
]


def tiny(**overrides):
    torch.manual_seed(0)
    return ResNetBKForCausalLM(ResNetBKConfig.from_preset("tiny", vocab_size=64, **overrides))


def is_matrix_that_decays(name, tied):
    vectors = ("norm", "bias", "energy", "raw_eta", "log_rate", "log_amplitude", "skip", "convolution")
    vectors_and_tables = (*vectors, "embed_tokens", "embed_positions")
    return not any(part in name for part in vectors_and_tables) and not (tied and name == "lm_head.weight")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_matrices_decay_and_embeddings_norms_filters_and_energies_do_not(variant):
    model = tiny(**variant)
    optimizer = build_optimizer(model, TrainingConfig(weight_decay=0.3))
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decays = {name: decay_of[id(parameter)] for name, parameter in model.named_parameters()}
    assert decays == {name: 0.3 * is_matrix_that_decays(name, variant["tie_word_embeddings"]) for name in decays}
    assert set(decays.values()) == {0.0, 0.3}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_parameter_is_in_exactly_one_group(variant):
    model = tiny(**variant)
    optimizer = build_optimizer(model, TrainingConfig())
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted({id(parameter) for parameter in model.parameters()})


def test_without_a_gradient_to_follow_only_matrices_shrink_by_rate_times_decay():
    model = tiny()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, TrainingConfig(weight_decay=0.5, learning_rate=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = 1 - 0.1 * 0.5 if is_matrix_that_decays(name, tied=False) else 1.0
        torch.testing.assert_close(parameter.detach(), kept * before[name])


def test_frozen_parameters_are_left_out():
    model = tiny()
    model.lm_head.weight.requires_grad_(False)
    optimizer = build_optimizer(model, TrainingConfig())
    grouped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert id(model.lm_head.weight) not in grouped
    assert len(grouped) == len(list(model.parameters())) - 1


def test_the_configuration_reaches_the_optimizer():
    optimizer = build_optimizer(tiny(), TrainingConfig(learning_rate=0.5, beta1=0.7, beta2=0.8))
    set_learning_rate(optimizer, 0.25)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"]) == (0.25, (0.7, 0.8))


CONFIGS = st.builds(
    TrainingConfig,
    steps=st.integers(1, 5000),
    warmup_steps=st.integers(0, 200),
    decay_steps=st.none() | st.integers(1, 5000),
    learning_rate=st.floats(1e-6, 1.0),
    min_learning_rate_ratio=st.floats(0, 1),
)


@given(config=CONFIGS)
@settings(deadline=None)
def test_the_rate_rises_in_a_line_then_falls_to_its_end(config):
    rates = [learning_rate(config, step) for step in range(config.warmup_steps + 1200)]
    warm, after = rates[: config.warmup_steps], rates[config.warmup_steps :]
    for step, rate in enumerate(warm):
        assert rate == pytest.approx(config.learning_rate * (step + 1) / config.warmup_steps)
    rounding = 1e-12 * config.learning_rate
    assert all(later <= earlier + rounding for earlier, later in itertools.pairwise(after))
    lowest = config.learning_rate * config.min_learning_rate_ratio
    assert all(lowest - rounding <= rate <= config.learning_rate + rounding for rate in after)


def test_the_cosine_is_half_way_in_the_middle_and_stays_at_its_end():
    config = TrainingConfig(steps=500, warmup_steps=20, decay_steps=120, learning_rate=1.0, min_learning_rate_ratio=0.2)
    assert learning_rate(config, 19) == 1.0
    assert learning_rate(config, 20) == 1.0
    assert learning_rate(config, 45) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(config, 70) == pytest.approx(0.6)
    for step in (120, 121, 499, 10_000):
        assert learning_rate(config, step) == pytest.approx(0.2)


@given(shorter=st.integers(1, 1000), longer=st.integers(1, 1000))
@settings(deadline=None)
def test_short_runs_are_prefixes_of_each_other(shorter, longer):
    ours, theirs = TrainingConfig(steps=shorter), TrainingConfig(steps=longer)
    for step in range(min(shorter, longer)):
        assert learning_rate(ours, step) == learning_rate(theirs, step)


def test_long_runs_are_prefixes_where_the_decay_is_given():
    ours, theirs = (TrainingConfig(steps=steps, decay_steps=9000) for steps in (3000, 9000))
    assert all(learning_rate(ours, step) == learning_rate(theirs, step) for step in range(0, 3000, 7))


def test_without_decay_steps_a_long_run_decays_to_its_own_end():
    config = TrainingConfig(steps=4000, learning_rate=1.0, min_learning_rate_ratio=0.1)
    assert learning_rate(config, 1000) > 0.8
    assert learning_rate(config, 3999) == pytest.approx(0.1, abs=1e-5)
