"""Training computes its loss without all logits; whoever asks for them gets them, and the same loss."""

import pytest
import torch
from torch import nn

from resnet_bk.memory.tracking import TensorTracker
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM

ROW = torch.randint(512, (2, 17), generator=torch.Generator().manual_seed(0))


def tiny(**overrides):
    torch.manual_seed(0)
    return ResNetBKForCausalLM(ResNetBKConfig.from_preset("tiny", **overrides)).train()


def loss_and_gradients(model, **arguments):
    torch.manual_seed(1)
    model.zero_grad()
    output = model(ROW, labels=ROW, **arguments)
    output.loss.backward()
    return output.loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("training", "targets", "return_logits", "there"),
    [
        (True, True, None, False),
        (True, True, True, True),
        (True, False, None, True),
        (False, True, None, True),
        (False, True, False, False),
        (False, False, None, True),
        (False, False, True, True),
    ],
)
def test_when_there_are_logits(training, targets, return_logits, there):
    output = tiny().train(training)(ROW, labels=ROW if targets else None, return_logits=return_logits)
    assert (output.logits is not None) == there
    assert (output.loss is not None) == targets


def test_neither_targets_nor_logits_is_refused():
    with pytest.raises(ValueError, match="without targets there is nothing but logits to return"):
        tiny()(ROW, return_logits=False)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mixer", ["resolvent", "bk", "attention", "local"])
def test_loss_and_gradients_are_those_of_the_logits(mixer, tied):
    model = tiny(mixer=mixer, tie_word_embeddings=tied)
    ours, theirs = loss_and_gradients(model), loss_and_gradients(model, return_logits=True)
    for mine, wanted in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)


def test_evaluation_gives_the_same_loss_either_way():
    model = tiny().eval()
    torch.testing.assert_close(model(ROW, labels=ROW, return_logits=False).loss, model(ROW, labels=ROW).loss)


class Adapter(nn.Linear):
    """A head that is more than its weight."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", ["class", "hook", "instance"])
def test_a_head_that_is_more_than_its_weight_is_called_as_it_is(change):
    model = tiny()
    plain = loss_and_gradients(model)[0]
    if change == "class":
        head = Adapter(32, 512, bias=False)
        head.load_state_dict(model.lm_head.state_dict())
        model.set_output_embeddings(head)
    elif change == "hook":
        model.lm_head.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    else:
        original = model.lm_head.forward
        model.lm_head.forward = lambda x: 2 * original(x)
    torch.manual_seed(1)
    output = model(ROW, labels=ROW)
    assert output.logits is None
    assert not torch.allclose(output.loss, plain, rtol=1e-4)


def test_no_tensor_of_a_step_has_the_size_of_the_logits():
    model = tiny(vocab_size=20_000, num_layers=1)
    row = torch.randint(20_000, (8, 256))

    class Largest(TensorTracker):
        largest = 0

        def _track(self, tensor):
            super()._track(tensor)
            self.largest = max(self.largest, tensor.untyped_storage().nbytes())

    with Largest() as tracker:
        model(row, labels=row).loss.backward()
    assert tracker.largest < 4 * 20_000 * 8 * 256 / 4
