"""One optimizer step: accumulation, clipping, precision, and noise that depends on nothing but its place."""

import copy

import numpy as np
import pytest
import torch
from small_training import TEXT, refused
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.data import TokenSplit, train_tokenizer, training_batch
from resnet_bk.training.evaluate import evaluate
from resnet_bk.training.micro_step import seed_micro_step
from resnet_bk.training.optimizer import build_optimizer
from resnet_bk.training.step import build_scaler, choose_device, train_step

CPU = torch.device("cpu")
MIXERS = ["resolvent", "bk", "attention"]


def tiny(**overrides):
    torch.manual_seed(0)
    return ResNetBKForCausalLM(ResNetBKConfig.from_preset("tiny", vocab_size=64, **overrides)).train()


def random_batch(rows=8, length=12, seed=0):
    ids = torch.randint(64, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def pieces(batch, count):
    return list(zip(batch[0].chunk(count), batch[1].chunk(count), strict=True))


def one_step(model, batches, *, step=0, optimizer=None, scaler=None, **training):
    config = TrainingConfig(**{"warmup_steps": 0, "gradient_accumulation_steps": len(batches), **training})
    optimizer = optimizer or build_optimizer(model, config)
    scaler = scaler or build_scaler(CPU, config.precision)
    return train_step(model, optimizer, scaler, batches, config, step)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def without_noise(monkeypatch):
    """Routing by the logits alone, so that rows do not depend on which batch they are in."""
    monkeypatch.setattr("resnet_bk.layers.mixture.gumbel_noise", torch.zeros_like)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("count", [2, 4])
def test_k_micro_batches_are_one_k_times_as_large(without_noise, mixer, count):
    batch = random_batch()
    # The balancing loss is of a batch and not a mean over rows, so it is left out; SGD, because Adam's first step
    # is the gradient's sign, which rounding decides where the gradient is next to nothing.
    whole = tiny(mixer=mixer, router_aux_loss_coef=0.0)
    parts = copy.deepcopy(whole)
    results = []
    for model, batches in ((whole, [batch]), (parts, pieces(batch, count))):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        results.append(one_step(model, batches, optimizer=optimizer, learning_rate=0.5, max_grad_norm=1e9))
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(weights(parts)[name], weights(whole)[name], rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(results[1].cross_entropy, results[0].cross_entropy)
    torch.testing.assert_close(results[1].grad_norm, results[0].grad_norm)
    torch.testing.assert_close(results[1].expert_load, results[0].expert_load)


def test_micro_batches_of_a_step_have_noise_of_their_own():
    batch = random_batch(rows=2)
    model = tiny()
    once = one_step(copy.deepcopy(model), [batch])
    twice = one_step(copy.deepcopy(model), [batch, batch])
    assert not torch.equal(once.expert_load, twice.expert_load)


def test_large_gradients_are_clipped_to_the_norm_and_small_ones_are_not():
    model, batch = tiny(), random_batch()
    free = one_step(copy.deepcopy(model), [batch], max_grad_norm=1e9)
    norm = float(free.grad_norm)
    clipped_model = copy.deepcopy(model)
    clipped = one_step(clipped_model, [batch], max_grad_norm=norm / 10)
    assert float(clipped.grad_norm) == pytest.approx(norm), "the norm that is reported is the one before clipping"
    left = torch.cat([gradient.flatten() for gradient in gradients(clipped_model).values()]).norm()
    assert float(left) == pytest.approx(norm / 10, rel=1e-3)
    unclipped_model = copy.deepcopy(model)
    one_step(unclipped_model, [batch], max_grad_norm=norm * 10)
    left = torch.cat([gradient.flatten() for gradient in gradients(unclipped_model).values()]).norm()
    assert float(left) == pytest.approx(norm, rel=1e-5)


def test_gradients_do_not_pile_up_over_steps():
    model, batch = tiny(), random_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options = {"optimizer": optimizer, "learning_rate": 1e-30, "max_grad_norm": 1e9}
    first = one_step(model, [batch], **options)
    assert float(one_step(model, [batch], **options).grad_norm) == float(first.grad_norm)


def test_the_rate_of_the_step_is_the_one_that_is_used():
    model, batch = tiny(), random_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    before = weights(model)
    result = one_step(model, [batch], optimizer=optimizer, step=2, warmup_steps=10, learning_rate=1.0)
    assert result.learning_rate == pytest.approx(0.3)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(weights(model)[name], before[name] - 0.3 * gradient)


def test_a_step_depends_on_its_place_and_not_on_the_generator_it_finds():
    batch, ends = random_batch(), []
    for seed, step, disturbance in ((5, 3, 1), (5, 3, 2), (5, 4, 1), (6, 3, 1)):
        model = tiny()
        torch.manual_seed(disturbance)
        one_step(model, [batch], seed=seed, step=step)
        ends.append(torch.cat([weight.flatten() for weight in weights(model).values()]))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    assert not torch.equal(ends[0], ends[3])


def test_noise_differs_between_places():
    draws = set()
    for place in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 1, 1)]:
        seed_micro_step(*place)
        first = torch.rand(3).tolist()
        seed_micro_step(*place)
        assert torch.rand(3).tolist() == first
        draws.add(tuple(first))
    assert len(draws) == 6


class LogitDtypes(TorchDispatchMode):
    """The types in which hidden states are multiplied with a head of this many tokens."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.seen = vocab_size, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default and args[1].shape[1] == self.vocab_size:
            self.seen |= {args[0].dtype, args[1].dtype}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
@pytest.mark.parametrize("mixer", MIXERS)
def test_mixed_precision_multiplies_in_the_half_type_and_keeps_weights_in_float32(mixer, precision, dtype):
    model, batch = tiny(mixer=mixer, intermediate_size=72), random_batch()
    config = TrainingConfig(precision=precision, learning_rate=0.01, warmup_steps=0, gradient_accumulation_steps=2)
    optimizer, scaler = build_optimizer(model, config), build_scaler(CPU, precision)
    before, losses = weights(model), []
    for step in range(15):
        with LogitDtypes(vocab_size=64) as logits:
            result = train_step(model, optimizer, scaler, pieces(batch, 2), config, step)
        losses.append(float(result.cross_entropy))
        assert logits.seen == {dtype}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
    assert all(not torch.equal(before[name], after) for name, after in weights(model).items())
    assert losses[-1] < losses[0] - 0.3, "the same batch again and again is soon known"


def test_loss_scaling_is_out_of_the_gradients_when_they_are_clipped_and_applied():
    batch, norms = random_batch(), {}
    for precision in ("fp32", "fp16"):
        model = tiny(router_aux_loss_coef=0.0)
        norms[precision] = float(one_step(model, [batch], precision=precision).grad_norm)
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.02)


def test_an_overflow_skips_the_step_and_lowers_the_scale():
    model, batch = tiny(), random_batch()
    config = TrainingConfig(precision="fp16", warmup_steps=0)
    optimizer, scaler = build_optimizer(model, config), build_scaler(CPU, "fp16")
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**100})
    before = weights(model)
    result = train_step(model, optimizer, scaler, [batch], config, 0)
    assert not torch.isfinite(result.grad_norm) and torch.isfinite(result.cross_entropy)
    assert all(torch.equal(before[name], after) for name, after in weights(model).items())
    assert {float(state["step"]) for state in optimizer.state.values()} <= {0.0}
    assert scaler.get_scale() == 2.0**99
    for step in range(1, 120):
        train_step(model, optimizer, scaler, [batch], config, step)
    assert scaler.get_scale() < 2.0**40
    assert all(torch.isfinite(after).all() for after in weights(model).values())
    assert not any(torch.equal(before[name], after) for name, after in weights(model).items())


def test_only_fp16_scales_the_loss():
    assert [build_scaler(CPU, precision).is_enabled() for precision in ("fp32", "bf16", "fp16")] == [False, False, True]


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_short_training_beats_what_knows_only_how_often_each_token_occurs(mixer):
    tokenizer = train_tokenizer("char", [TEXT])
    ids = np.array(tokenizer.encode(TEXT), dtype=np.uint16)
    cut = int(0.8 * len(ids))
    held_out = TokenSplit(name="held out", tokens=ids[cut:], num_bytes=len(ids) - cut, num_documents=1)
    torch.manual_seed(0)
    model = ResNetBKForCausalLM(
        ResNetBKConfig.from_preset("tiny", vocab_size=tokenizer.vocab_size, mixer=mixer)
    ).train()
    assert model.config.max_position_embeddings is None
    config = TrainingConfig(learning_rate=0.01, warmup_steps=10)
    optimizer, scaler = build_optimizer(model, config), build_scaler(CPU, "fp32")
    for step in range(100):
        batch = training_batch(ids[:cut], batch_size=8, sequence_length=32, seed=0, step=step)
        result = train_step(model, optimizer, scaler, [batch], config, step)
    entropy = held_out.unigram_entropy()
    evaluation = evaluate(model, held_out.tokens, batch_size=8, sequence_length=32)
    assert float(result.cross_entropy) < entropy
    assert evaluation.loss < entropy


def test_devices():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "warp drive"):
        with refused(f"device {name} is not available here; use --device auto or cpu"):
            choose_device(name)
