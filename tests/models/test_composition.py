"""The model inside what training wraps around it: activation checkpointing, FSDP2."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM

MIXERS = ["resolvent", "bk", "attention", "local"]


def build(mixer):
    torch.manual_seed(0)
    model = ResNetBKForCausalLM(ResNetBKConfig.from_preset("tiny", mixer=mixer)).train()
    row = torch.randint(model.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(1))
    return model, row


def gradients(model, row):
    torch.manual_seed(7)  # the routing noise
    loss = model(row, labels=row).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_checkpointed_block_gives_the_same_loss_and_gradients(mixer):
    model, row = build(mixer)
    loss, expected = gradients(model, row)
    again, _ = build(mixer)
    for block in again.model.layers:
        forward = block.forward
        block.forward = lambda *inputs, forward=forward: checkpoint(forward, *inputs, use_reentrant=False)
    checkpointed_loss, actual = gradients(again, row)
    assert torch.equal(checkpointed_loss, loss)
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# An attention block returns its keys and values, which are views; nothing writes to them.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_sharded_model_gives_the_same_loss_and_gradients(mixer, one_process):
    model, row = build(mixer)
    loss, expected = gradients(model, row)
    sharded, _ = build(mixer)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for block in sharded.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded_loss, actual = gradients(sharded, row)
    assert torch.equal(sharded_loss, loss)
    for name, gradient in expected.items():
        assert torch.allclose(actual[name].full_tensor(), gradient, atol=1e-7), name
