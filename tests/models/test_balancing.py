"""Experts balanced by a bias in the choice: a buffer that no gradient knows of, moved after each step, and saved."""

import pytest
import torch
from safetensors.torch import load_file

from resnet_bk.layers import MixtureOfExperts
from resnet_bk.memory.parameters import count_parameters
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.optimizer import build_optimizer
from resnet_bk.training.step import build_scaler, train_step

CPU = torch.device("cpu")
RATE = 0.05


def tiny(rate=RATE, **overrides):
    torch.manual_seed(0)
    config = ResNetBKConfig.from_preset("tiny", router_bias_update_rate=rate, num_experts=4, vocab_size=64, **overrides)
    return ResNetBKForCausalLM(config).train()


def batch(rows=8, length=16, seed=0):
    ids = torch.randint(64, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def biases(model):
    return torch.stack([layer.moe.router_bias for layer in model.model.layers])


def steps(model, count, batches=1, **training):
    config = TrainingConfig(warmup_steps=0, gradient_accumulation_steps=batches, **training)
    optimizer, scaler = build_optimizer(model, config), build_scaler(CPU, config.precision)
    return [
        train_step(model, optimizer, scaler, [batch(seed=batches * step + i) for i in range(batches)], config, step)
        for step in range(count)
    ]


def test_without_a_rate_there_is_nothing_new():
    model = tiny(rate=0.0)
    assert not any("bias" in name for name in model.state_dict() if ".moe." in name)
    steps(model, 1)
    model.balance_experts(torch.rand(2, 4))
    assert all(layer.moe.router_bias is None for layer in model.model.layers)


def test_a_bias_of_zero_changes_nothing():
    row, outputs = batch()[0], []
    for model in (tiny(), tiny(rate=0.0)):
        torch.manual_seed(1)
        outputs.append(model(row, labels=row))
    ours, theirs = outputs
    assert torch.equal(ours.loss, theirs.loss) and torch.equal(ours.expert_load, theirs.expert_load)


def test_the_bias_is_no_parameter():
    assert count_parameters(tiny().config).total == count_parameters(tiny(rate=0.0).config).total
    assert not any("router_bias" in name for name, _ in tiny().named_parameters())


@pytest.mark.parametrize("batches", [1, 3])
def test_a_step_moves_each_bias_by_the_rate_against_the_load_of_all_its_batches(batches):
    model = tiny()
    (result,) = steps(model, 1, batches)
    expected = RATE * torch.sign(0.25 - result.expert_load)
    assert torch.allclose(biases(model), expected)
    assert expected.any()


def test_the_bias_is_in_the_choice_and_nowhere_else():
    moe = MixtureOfExperts(
        hidden_size=4, intermediate_size=6, num_experts=3, router_temperature=1.0, router_bias_update_rate=RATE
    ).train()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 50, 4)
    results = []
    for bias in ([0.0, 0.0, 0.0], [0.0, 0.0, 1e3]):
        moe.router_bias.copy_(torch.tensor(bias))
        torch.manual_seed(0)
        results.append(moe(x, None)[1])
    assert results[0].expert_load_E[2] < 1 and results[1].expert_load_E.tolist() == [0, 0, 1]
    probabilities = torch.softmax(moe.router(x.flatten(0, 1)), dim=-1)
    assert torch.allclose(results[1].balancing_loss, 3 * probabilities.mean(0)[2]), "of the logits without it"
    results[1].balancing_loss.backward()
    assert moe.router.weight.grad.abs().sum() > 0 and moe.router_bias.grad is None


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_a_lopsided_router_is_balanced_with_or_without_the_loss(coefficient):
    model = tiny(router_aux_loss_coef=coefficient)
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.moe.router.weight[0], 0.5)
        torch.nn.init.constant_(layer.moe_norm.bias, 0.2)  # so that expert 0 is everybody's favourite, by a logit of 3
    loads = [result.expert_load for result in steps(model, 80, learning_rate=1e-4)]
    assert loads[0].max() > 0.6
    assert torch.stack(loads[-10:]).mean(0).max() < 0.4


def test_the_bias_is_saved_loaded_and_used_in_evaluation(tmp_path):
    model = tiny()
    steps(model, 3)
    model.eval().save_pretrained(tmp_path)
    assert any(name.endswith("router_bias") for name in load_file(tmp_path / "model.safetensors"))
    loaded = ResNetBKForCausalLM.from_pretrained(tmp_path).eval()
    row = batch()[0]
    assert torch.equal(biases(loaded), biases(model)) and biases(loaded).any()
    assert torch.equal(loaded(row).logits, model(row).logits)
    for layer in loaded.model.layers:
        layer.moe.router_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1e3]))
    assert loaded(row).expert_load[:, 3].tolist() == [1, 1]


def test_a_model_saved_without_a_bias_starts_with_none(tmp_path):
    tiny(rate=0.0).save_pretrained(tmp_path)
    model = ResNetBKForCausalLM.from_pretrained(tmp_path, router_bias_update_rate=RATE)
    assert not biases(model).any()


def test_a_negative_rate_is_refused():
    with pytest.raises(ValueError, match=r"router_bias_update_rate is -1\.0; give 0 or more"):
        ResNetBKConfig(router_bias_update_rate=-1.0)
