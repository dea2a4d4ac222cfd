"""Blocks that keep little: the same losses, gradients and random numbers, in less memory."""

import copy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from resnet_bk.frugal.activations import HostActivations
from resnet_bk.frugal.checkpointing import SAVED_OPERATORS, checkpoint_blocks, uncheckpoint_blocks
from resnet_bk.memory.tracking import TensorTracker
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM

MIXERS = ["resolvent", "bk", "attention", "local"]
POLICIES = ["full", "selective", "offload"]
BATCH, LENGTH, WIDTH = 4, 20, 32
every_policy = pytest.mark.parametrize("policy", POLICIES)
every_mixer = pytest.mark.parametrize("mixer", MIXERS)


pytestmark = pytest.mark.usefixtures("one_thread")


class Watched(TorchDispatchMode):
    """Changes nothing; but the inside of a custom operator does not see autocast under any dispatch mode."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Result:
    """A module's own kind of output, which no pytree knows."""

    value: torch.Tensor


class Block(nn.Module):
    """Random numbers in a forward that takes and gives more than tensors."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Dropout(0.3)

    def forward(self, x, others=None, *, scale=1.0):
        hidden = self.dropout(nn.functional.gelu(self.up(x)))
        x = x + self.down(hidden) * scale
        if others is not None:
            x = x + others["bias"] + others["shifts"][0].value
        return x, {"x": x}, Result(x.mean())


class Counted(Block):
    """It counts its runs."""

    runs = 0

    def forward(self, *args, **kwargs):
        self.runs += 1
        return super().forward(*args, **kwargs)


class Stack(nn.Module):
    def __init__(self, depth=3, width=WIDTH, kind=Block):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(kind(width) for _ in range(depth))

    def forward(self, x):
        total = x.new_zeros(())
        for block in self.blocks:
            x, named, result = block(x, {"bias": x.mean(0), "shifts": [Result(x[:1])]}, scale=0.5)
            total = total + result.value + named["x"].square().mean()
        return x.square().mean() + total


def batch(width=WIDTH, length=LENGTH):
    return torch.randn(BATCH, length, width, generator=torch.Generator().manual_seed(5))


def language_model(mixer, **overrides):
    torch.manual_seed(0)
    return ResNetBKForCausalLM(ResNetBKConfig.from_preset("tiny", mixer=mixer, **overrides)).train()


def tokens():
    return torch.randint(512, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def checkpointed(blocks, policy):
    return checkpoint_blocks(blocks, policy, host=HostActivations(min_bytes=1) if policy == "offload" else None)


def trained(model, loss_of, batches, *, autocast=False):
    """Losses, gradients summed over ``batches``, and the random number that comes next; all forwards come first."""
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        losses = [loss_of(part) for part in batches]
    after_forward = torch.rand(1)
    for loss in losses:
        loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    return [*(loss.detach() for loss in losses), *gradients, after_forward, torch.rand(1)]


def assert_same(ours, plain):
    assert len(ours) == len(plain)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def padding():
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, :7], mask[1, 15:] = 0, 0
    return mask


DOCUMENTS = (torch.arange(LENGTH) // 6).expand(BATCH, -1)
INPUTS = {
    "whole-rows": {},
    "documents": {"document_ids": DOCUMENTS},
    "padding": {"attention_mask": padding()},
}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16-autocast"])
@pytest.mark.parametrize("inputs", INPUTS)
@every_mixer
def test_a_language_model_trains_the_same(mixer, inputs, autocast):
    model = language_model(mixer)

    def loss_of(rows):
        row, *others = rows
        return model(row, labels=row, **dict(zip(INPUTS[inputs], others, strict=True))).loss

    batches = list(zip(*(x.chunk(2) for x in (tokens(), *INPUTS[inputs].values())), strict=True))
    plain = trained(model, loss_of, batches, autocast=autocast)
    with Watched():
        watched = trained(model, loss_of, batches, autocast=autocast)
    for policy in POLICIES:
        with checkpointed(model.model.layers, policy):
            ours = trained(model, loss_of, batches, autocast=autocast)
        assert_same(ours, watched if policy == "selective" else plain)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16-autocast"])
@every_policy
def test_any_module_trains_the_same(policy, autocast):
    model = Stack()
    batches = batch().chunk(2)
    plain = trained(model, model, batches, autocast=autocast)
    checkpointed(model.blocks, policy)
    assert_same(trained(model, model, batches, autocast=autocast), plain)


@every_policy
def test_dropout_in_a_sequential(policy):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Tanh()) for _ in range(4)))
    plain = trained(model, lambda x: model(x).square().mean(), batch().chunk(2))
    checkpointed(model, policy)
    assert_same(trained(model, lambda x: model(x).square().mean(), batch().chunk(2)), plain)


@every_policy
def test_gradients_reach_inputs_wherever_they_are(policy):
    block, results = Block(), []
    for use in (False, True):
        if use:
            checkpointed([block], policy)
        torch.manual_seed(1)
        x, bias, scale = (batch().requires_grad_() for _ in range(3))
        y, named, result = block(x, {"bias": bias, "shifts": [Result(2 * x)]}, scale=scale)
        loss = y.square().sum() + named["x"].sum() + result.value
        results.append([y.detach(), *torch.autograd.grad(loss, [x, bias, scale, *block.parameters()])])
    assert_same(*results)


@every_policy
def test_a_block_runs_once_without_training_and_twice_with_it(policy):
    model = Stack(depth=1, kind=Counted)
    (block,) = model.blocks
    checkpointed([block], policy)
    model.eval()
    model(batch()).backward()
    assert block.runs == 1, "evaluation"
    model.train()
    with torch.no_grad():
        model(batch())
    assert block.runs == 2, "no gradient"
    loss = model(batch())
    assert block.runs == 3, "forward"
    loss.backward()
    assert block.runs == 4, "backward"


@every_policy
def test_nothing_but_forward_changes_and_removal_restores_it(policy):
    model, seen = Stack(), []
    model.blocks[0].register_forward_hook(lambda *_: seen.append("after"))
    model.blocks[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    before = [dict(vars(module)) for module in model.modules()]
    names, keys = [name for name, _ in model.named_parameters()], list(model.state_dict())
    handle = checkpointed(model.blocks, policy)
    assert all(type(block) is Block for block in model.blocks)
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == keys
    model(batch()).backward()
    assert seen == ["before", "after"], "the second pass is of the forward alone"
    handle.remove()
    handle.remove()
    after = [dict(vars(module)) for module in model.modules()]
    for ours, theirs in zip(after, before, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(ours[name] is value for name, value in theirs.items() if name != "training")


def test_a_forward_that_somebody_set_is_run_and_comes_back():
    block = Block()
    block.forward = forward = partial(Block.forward, block, scale=2.0)
    expected = block.eval()(batch())[0]
    with checkpoint_blocks([block]):
        assert torch.equal(block(batch())[0], expected)
        assert torch.equal(block.train(False)(batch())[0], expected)
    assert block.forward is forward


@every_policy
def test_a_deep_copy_is_checkpointed_by_itself(policy):
    model = Stack(kind=Counted)
    plain = trained(model, model, batch().chunk(2))
    handle = checkpointed(model.blocks, policy)
    twin = copy.deepcopy(model)
    handle.remove()
    model.zero_grad()
    runs = [block.runs for block in twin.blocks]
    assert_same(trained(twin, twin, batch().chunk(2)), plain)
    assert [block.runs - before for block, before in zip(twin.blocks, runs, strict=True)] == [4] * 3
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [block.runs for block in model.blocks] == runs
    uncheckpoint_blocks(twin.blocks)
    assert all("forward" not in vars(block) for block in twin.blocks)


@pytest.mark.parametrize("policy", ["full", "offload"])
def test_backward_twice_through_a_graph_that_is_kept(policy):
    model = Stack()
    checkpointed(model.blocks, policy)
    loss = model(batch())
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert_same(torch.autograd.grad(loss, list(model.parameters())), first)


def peaks(model, blocks, policy, loss_of):
    """Most bytes in a step on the device, beyond parameters and gradients, and on the host; the second step's."""
    handle = checkpointed(blocks, policy) if policy else None
    loss_of().backward()
    model.zero_grad(set_to_none=False)
    with TensorTracker() as tracker:
        tracker.include([*model.parameters(), *(parameter.grad for parameter in model.parameters())])
        resident = tracker.current_bytes
        loss_of().backward()
    if handle is not None:
        handle.remove()
    return tracker.peak_bytes - resident, tracker.peak_host_bytes


@every_mixer
def test_memory_grows_with_depth_by_what_the_policy_keeps(mixer):
    row, shallow, deep = tokens(), 2, 4
    growth, device = {}, {}
    for policy in (None, *POLICIES):
        found = []
        for depth in (shallow, deep):
            model = language_model(mixer, num_layers=depth)
            found.append(peaks(model, model.model.layers, policy, lambda m=model: m(row, labels=row).loss))
        (device_bytes, host_bytes), (deep_device_bytes, deep_host_bytes) = found
        growth[policy] = (deep_device_bytes - device_bytes, deep_host_bytes - host_bytes)
        device[policy] = deep_device_bytes
    inputs = (deep - shallow) * BATCH * LENGTH * WIDTH * 4
    assert growth["full"] == (pytest.approx(inputs, rel=0.05), 0)
    assert growth["offload"] == (pytest.approx(0, abs=0.01 * inputs), inputs)
    assert device["offload"] < device["full"] < device["selective"] < device[None]
    assert growth["full"][0] < growth["selective"][0] < growth[None][0] / 2


def test_host_memory_does_not_grow_from_step_to_step():
    model = Stack()
    handle = checkpoint_blocks(model.blocks, "offload", host=HostActivations(min_bytes=batch().nbytes))
    trained(model, model, [batch()])
    pool_bytes = handle.host.pool_bytes
    assert pool_bytes == 3 * batch().nbytes
    for _ in range(3):
        trained(model, model, [batch()])
        assert (handle.host.waiting_bytes, handle.host.pool_bytes) == (0, pool_bytes)


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def run_in_backward(save):
    """Operators of a stack's backward, with ``save``."""
    model = Stack(depth=2)
    checkpoint_blocks(model.blocks, "selective", save=save)
    loss = model(batch())
    with Counter() as counter:
        loss.backward()
    return counter.names


PRODUCT = torch.ops.aten.addmm
SAVE = {
    "default": (SAVED_OPERATORS, True),
    "packet": ([PRODUCT], True),
    "overload": ([PRODUCT.default], True),
    "name": (["aten::addmm"], True),
    "unknown-name": (["nobody::nothing"], False),
    "nothing": ([], False),
    "function": (
        lambda ctx, op, *args, **kwargs: (
            CheckpointPolicy.MUST_SAVE if op is PRODUCT.default else CheckpointPolicy.PREFER_RECOMPUTE
        ),
        True,
    ),
}


@pytest.mark.parametrize("save", SAVE)
def test_what_is_saved_does_not_run_again(save):
    operators, are_saved = SAVE[save]
    names = run_in_backward(operators)
    assert names.count("aten::gelu") == 2
    # The first product of each block; after that nothing of the second pass is needed.
    assert names.count("aten::addmm") == (0 if are_saved else 2)


def test_the_operators_saved_by_default_exist():
    def exists(name):
        namespace, operator = name.split("::")
        return hasattr(getattr(torch.ops, namespace), operator)

    assert [name for name in SAVED_OPERATORS if not exists(name)] == []


def test_selective_keeps_what_the_language_model_computes_at_most_cost():
    model, row = language_model("resolvent"), tokens()
    checkpoint_blocks(model.model.layers, "selective")
    loss = model(row, labels=row).loss
    with Counter() as counter:
        loss.backward()
    assert "resnet_bk::carry_backward" in counter.names
    assert {"resnet_bk::carry", "resnet_bk::bk_tunnel"}.isdisjoint(counter.names)


WRONG = {
    "policy": ({"policy": "none"}, "policy is 'none'"),
    "host": ({"policy": "full", "host": HostActivations()}, "host is for policy 'offload'"),
    "save": ({"policy": "full", "save": ["aten::mm"]}, "save is for policy 'selective'"),
    "name": ({"policy": "selective", "save": ["mm"]}, "'mm' is no operator's name"),
    "writing-overload": ({"policy": "selective", "save": [torch.ops.aten.mm.out]}, "writes to its arguments"),
    "writing-packet": ({"policy": "selective", "save": [torch.ops.aten.copy_]}, "writes to its arguments"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_is_refused_and_changes_nothing(wrong):
    options, words = WRONG[wrong]
    block = Block()
    with pytest.raises(ValueError, match=words):
        checkpoint_blocks([block], **options)
    assert "forward" not in vars(block)


def test_a_block_inside_another_is_refused():
    outer = torch.nn.Sequential(Block())
    with pytest.raises(ValueError, match="a Block is inside another one"):
        checkpoint_blocks([outer, outer[0]])
    assert "forward" not in vars(outer) and "forward" not in vars(outer[0])


def test_a_block_is_checkpointed_once():
    block, other = Block(), Block()
    handle = checkpoint_blocks([block, block])
    with pytest.raises(ValueError, match="checkpointed already"):
        checkpoint_blocks([other, block])
    assert "forward" not in vars(other)
    handle.remove()
    with pytest.raises(ValueError, match="not checkpointed"):
        uncheckpoint_blocks([block])


class Fickle(nn.Module):
    """Another type in the second pass."""

    runs = 0

    def forward(self, x):
        self.runs += 1
        return (x if self.runs == 1 else x.double()).exp().sum()


def test_a_second_pass_that_differs_is_an_error_unless_nobody_checks():
    checked, unchecked, x = Fickle(), Fickle(), batch().requires_grad_()
    checkpoint_blocks([checked])
    with pytest.raises(RuntimeError, match="different metadata"):
        checked(x).backward()
    checkpoint_blocks([unchecked], determinism_check=False)
    unchecked(x).backward()
    torch.testing.assert_close(x.grad, x.detach().exp())


# torch's own, while it traces and compiles.
compiled_test = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)


def compiled(module, **options):
    torch._dynamo.reset()
    return torch.compile(module, backend="aot_eager", **options)


def assert_close(ours, plain):
    assert len(ours) == len(plain)
    torch.testing.assert_close(ours, plain)


@pytest.mark.slow
@compiled_test
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_a_compiled_language_model_is_one_graph(policy):
    model, row = language_model("resolvent", num_layers=1), tokens()
    plain = trained(model, lambda row: model(row, labels=row, use_cache=False).loss, [row])
    checkpointed(model.model.layers, policy)
    run = compiled(model, fullgraph=True)
    assert_close(trained(model, lambda row: run(row, labels=row, use_cache=False).loss, [row]), plain)


@compiled_test
@pytest.mark.parametrize("when", ["before", "after"])
@every_policy
def test_blocks_may_be_compiled_before_and_after(policy, when):
    model = Stack(depth=2)
    plain = trained(model, model, [batch()])
    if when == "after":
        checkpointed(model.blocks, policy)
    torch._dynamo.reset()
    model.blocks = nn.ModuleList(torch.compile(block, backend="aot_eager") for block in model.blocks)
    if when == "before":
        checkpointed(model.blocks, policy)
    assert_close(trained(model, model, [batch()]), plain)


@compiled_test
def test_a_compiled_model_copies_to_host_memory_with_a_context_around_it():
    model = Stack()
    plain = trained(model, model, [batch()])
    checkpoint_blocks(model.blocks)
    run, host = compiled(model, fullgraph=True), HostActivations(min_bytes=batch().nbytes)
    waiting = []

    def loss_of(x):
        with host:
            loss = run(x)
        waiting.append(host.waiting_bytes)
        return loss

    assert_close(trained(model, loss_of, [batch()]), plain)
    assert waiting[0] >= 3 * batch().nbytes
    assert host.waiting_bytes == 0


@compiled_test
def test_offload_is_refused_in_one_graph_and_right_in_several():
    model = Stack(depth=1)
    plain = trained(model, model, [batch()])
    checkpointed(model.blocks, "offload")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="HostActivations"):
        compiled(model, fullgraph=True)(batch())
    assert_close(trained(model, compiled(model), [batch()]), plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_policy
def test_a_gpu_trains_the_same(policy):
    model, x = Stack(depth=8, width=512).cuda(), batch(width=512, length=1024).cuda()
    plain = trained(model, model, x.chunk(2))
    checkpointed(model.blocks, policy)
    for _ in range(3):
        assert_same(trained(model, model, x.chunk(2)), plain)
