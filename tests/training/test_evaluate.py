"""The held-out loss is a plain mean over windows, and evaluating changes nothing about the model."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.training.evaluate import Evaluation, evaluate

VOCAB = 50


@pytest.fixture(scope="module", params=["resolvent", "bk", "attention"])
def model(request):
    torch.manual_seed(0)
    config = ResNetBKConfig.from_preset("tiny", vocab_size=VOCAB, mixer=request.param, initializer_range=0.5)
    return ResNetBKForCausalLM(config)


def random_tokens(length):
    return np.random.default_rng(0).integers(VOCAB, size=length).astype(np.uint16)


@torch.no_grad()
def plain_loss(model, tokens, sequence_length):
    """One window after the other, each alone."""
    ids, losses = torch.from_numpy(tokens.astype(np.int64)), []
    for begin in range(0, len(ids) - 1, sequence_length):
        window = ids[begin : begin + sequence_length + 1]
        logits = model(window[None, :-1]).logits[0]
        losses.append(F.cross_entropy(logits.double(), window[1:], reduction="none"))
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize(("length", "batch_size"), [(200, 3), (193, 4), (33, 2), (17, 5), (2, 1)])
def test_the_loss_is_the_plain_mean_over_the_same_windows(model, length, batch_size):
    model.eval()
    tokens = random_tokens(length)
    evaluation = evaluate(model, tokens, batch_size=batch_size, sequence_length=16)
    assert evaluation.tokens == length - 1
    assert evaluation.loss == pytest.approx(plain_loss(model, tokens, 16), rel=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 16, 50, 199, 1000])
def test_max_tokens_takes_whole_windows_spread_over_the_text(model, max_tokens):
    model.eval()
    tokens = random_tokens(16 * 12 + 1)
    evaluation = evaluate(model, tokens, batch_size=3, sequence_length=16, max_tokens=max_tokens)
    windows = min(12, -(-max_tokens // 16))
    starts = [window * 12 // windows * 16 for window in range(windows)]
    wanted = np.mean([plain_loss(model, tokens[start : start + 17], 16) for start in starts])
    assert evaluation.tokens == 16 * windows
    assert evaluation.loss == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_mode_weights_and_gradients_are_as_they_were(model, training):
    model.train(training)
    model.zero_grad()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    torch.manual_seed(1)
    first = evaluate(model, random_tokens(100), batch_size=2, sequence_length=16)
    torch.manual_seed(2)
    second = evaluate(model, random_tokens(100), batch_size=2, sequence_length=16)
    assert first == second, "no routing noise in an evaluation"
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bf16_gives_nearly_the_loss_of_fp32_and_not_exactly_it(model):
    model.eval()
    options = {"batch_size": 4, "sequence_length": 16}
    full = evaluate(model, random_tokens(200), **options)
    half = evaluate(model, random_tokens(200), precision="bf16", **options)
    assert half.loss == pytest.approx(full.loss, rel=0.02)
    assert half.loss != full.loss


def test_perplexity_and_bits_per_byte():
    evaluation = Evaluation(loss=math.log(8), tokens=30)
    assert evaluation.perplexity == pytest.approx(8)
    assert evaluation.bits_per_byte(45) == pytest.approx(3 * 30 / 45)
    assert Evaluation(loss=1e4, tokens=1).perplexity == math.inf


def test_guessing_bytes_evenly_costs_eight_bits_a_byte():
    assert Evaluation(loss=math.log(256), tokens=1000).bits_per_byte(1000) == pytest.approx(8)
