"""The optimizer on the host with weights on a GPU, against torch's AdamW on the host with the same gradients."""

import pytest
import torch
from torch import nn

from resnet_bk.frugal import OffloadedAdamW, checkpoint_blocks, half_weights, stream_blocks
from resnet_bk.frugal.host import host_empty

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GPU = torch.device("cuda")


def network(width=256, layers=4):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(layers)))


def inputs(step, micro_step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 * step + micro_step)
    return torch.randn(64, 256, generator=generator).to(GPU, dtype)


class ByHand:
    """Masters on the host, updated by torch; the model on the GPU has them rounded."""

    def __init__(self, dtype):
        self.model = network().to(GPU)
        self.masters = [parameter.detach().cpu().clone().requires_grad_() for parameter in self.model.parameters()]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-3, fused=True)
        if dtype != torch.float32:
            half_weights(self.model, dtype, keep=lambda *_: False)

    def step(self, losses, clip):
        totals = [torch.zeros_like(master) for master in self.masters]
        for loss in losses(self.model):
            self.model.zero_grad()
            loss.backward()
            for total, parameter in zip(totals, self.model.parameters(), strict=True):
                total.add_(parameter.grad.cpu())
        for master, total in zip(self.masters, totals, strict=True):
            master.grad = total
        if clip:
            torch.nn.utils.clip_grad_norm_(self.masters, 0.1)
        self.optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
                parameter.copy_(master)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("mode", ["clipped", "after backward", "in backward"])
@pytest.mark.parametrize("with_blocks", [False, True], ids=["no blocks", "blocks"])
def test_weights_are_those_that_torch_makes_on_the_host(dtype, accumulation, mode, with_blocks):
    ours, reference = network().to(GPU), ByHand(dtype)
    optimizer = OffloadedAdamW(ours.parameters(), lr=1e-3, blocks=ours if with_blocks else ())
    if dtype != torch.float32:
        half_weights(ours, dtype, keep=lambda *_: False)
    for step in range(10):

        def losses(model, step=step):
            for micro_step in range(accumulation):
                yield model(inputs(step, micro_step, dtype)).float().square().mean()

        optimizer.zero_grad()
        for micro_step, loss in enumerate(losses(ours)):
            if mode == "in backward" and micro_step == accumulation - 1:
                with optimizer.updating_in_backward():
                    loss.backward()
            else:
                loss.backward()
        if mode == "clipped":
            torch.nn.utils.clip_grad_norm_(ours.parameters(), 0.1)
        optimizer.step()
        reference.step(losses, clip=mode == "clipped")
    optimizer.synchronize()
    for (name, a), b in zip(ours.named_parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_loss_scale_works_with_half_weights():
    model = network().to(GPU)
    optimizer = OffloadedAdamW(model.parameters(), lr=1e-3)
    half_weights(model, torch.float16, keep=lambda *_: False)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    scales, first = [], [parameter.detach().clone() for parameter in model.parameters()]
    for step in range(40):
        optimizer.zero_grad()
        scaler.scale(model(inputs(step, 0, torch.float16)).float().square().mean()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if step == 0:
            optimizer.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), first, strict=True)), "it was skipped"
    assert scales[0] == 2.0**39
    assert scales[-1] < 2.0**39
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), first, strict=True))


@pytest.mark.parametrize("in_backward", [False, True], ids=["after backward", "in backward"])
def test_reserved_memory_growing_step_after_step(in_backward):
    model = network(width=1024, layers=12).to(GPU)
    optimizer = OffloadedAdamW(model.parameters(), lr=1e-3, blocks=model)
    x, reserved = torch.randn(64, 1024, device=GPU), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if in_backward:
            with optimizer.updating_in_backward():
                loss.backward()
        else:
            loss.backward()
        optimizer.step()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[5]


@pytest.mark.parametrize("in_backward", [False, True], ids=["after backward", "in backward"])
def test_with_streamed_and_checkpointed_blocks_it_is_the_same(in_backward):
    ours, reference = network(), ByHand(torch.float32)
    optimizer = OffloadedAdamW(ours.parameters(), lr=1e-3, device=GPU, blocks=ours)
    stream_blocks(list(ours), GPU)
    checkpoint_blocks(list(ours), "full")
    for step in range(10):
        optimizer.zero_grad()
        loss = ours(inputs(step, 0)).square().mean()
        if in_backward:
            with optimizer.updating_in_backward():
                loss.backward()
        else:
            loss.backward()
        optimizer.step()
        reference.step(lambda model, step=step: [model(inputs(step, 0)).square().mean()], clip=False)
    optimizer.synchronize()
    for (name, a), b in zip(ours.named_parameters(), reference.model.parameters(), strict=True):
        assert a.device.type == "cpu"
        assert torch.equal(a, b.cpu()), name


def test_host_memory_is_pinned_to_the_byte():
    tensor = host_empty(1_000_003, dtype=torch.uint8)
    assert tensor.is_pinned()
    assert tensor.untyped_storage().nbytes() == 1_000_003
    there = torch.empty_like(tensor, device=GPU).copy_(tensor.fill_(7), non_blocking=True)
    torch.cuda.synchronize()
    assert bool((there == 7).all())
    del tensor, there
    # The driver knows none of its pages any more.
    again = [host_empty(1_000_003, dtype=torch.uint8) for _ in range(10)]
    assert all(tensor.is_pinned() for tensor in again)
