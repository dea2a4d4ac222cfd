"""No token's logits depend on a later token; and the bidirectional variant fails the same check by far."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM


@pytest.fixture(scope="module", params=["resolvent", "bk", "attention", "local"])
def model(request):
    torch.manual_seed(0)
    return ResNetBKForCausalLM(ResNetBKConfig.from_preset("tiny", mixer=request.param)).double()


def largest_change_before(model, seed, length, position, *, training):
    """max |change of a logit before ``position``| when the token there changes, routing noise held fixed."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(512, (2, length), generator=generator)
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 1 + torch.randint(510, (2,), generator=generator)) % 512
    model.train(training)
    logits = []
    for row in (tokens, changed):
        torch.manual_seed(seed)
        with torch.no_grad():
            logits.append(model(row).logits)
    difference = (logits[0] - logits[1]).abs()
    assert difference[:, position:].max() > 1e-6, "the changed token should matter from its own position on"
    return difference[:, :position].max().item()


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), length=st.integers(2, 96), share=st.floats(0, 1))
def test_no_logit_reads_a_later_token(model, training, seed, length, share):
    position = 1 + round(share * (length - 2))
    assert largest_change_before(model, seed, length, position, training=training) <= 1e-10


@pytest.mark.parametrize("mixer", ["bk", "attention"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_the_bidirectional_variant_fails_by_orders_of_magnitude(mixer, training):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="leak"):
        config = ResNetBKConfig.from_preset("tiny", mixer=mixer, causal=False)
        model = ResNetBKForCausalLM(config).double()
    assert largest_change_before(model, seed=1, length=32, position=16, training=training) > 1e-4
