"""The head of a token to decode: its matrix is read once, unless calling the head is more than multiplying."""

import pytest
import torch

from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM, modeling


@pytest.fixture
def model():
    return ResNetBKForCausalLM(ResNetBKConfig.from_preset("tiny", vocab_size=32)).eval()


@pytest.fixture
def products(monkeypatch):
    """Counts the head's products without a call of the head."""
    calls, real = [], modeling.linear
    monkeypatch.setattr(modeling, "linear", lambda *args: (calls.append(args), real(*args))[1])
    return calls


@torch.no_grad()
@pytest.mark.parametrize(("tokens", "expected"), [(1, 1), (2, 0)])
def test_only_a_single_token_passes_the_head_by(model, products, tokens, expected):
    hidden_BND = torch.randn(1, tokens, model.config.hidden_size)
    torch.testing.assert_close(model._logits(hidden_BND), model.lm_head(hidden_BND))
    assert len(products) == expected


@torch.no_grad()
def test_a_heads_hooks_are_called(model, products):
    model.lm_head.register_forward_hook(lambda module, args, output: output + 1)
    hidden_BND = torch.randn(1, 1, model.config.hidden_size)
    torch.testing.assert_close(model._logits(hidden_BND), model.lm_head(hidden_BND))
    assert not products
