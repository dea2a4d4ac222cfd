"""Block after block gives the gradients of piece after piece, wherever the weights are."""

import copy
import time
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from told_of_loads import ToldOfLoads
from torch import nn

from resnet_bk.frugal.adamw import update
from resnet_bk.frugal.by_block import backward_by_block
from resnet_bk.frugal.homes import weight_home
from resnet_bk.frugal.host import is_host_memory
from resnet_bk.frugal.optimizer import OffloadedAdamW
from resnet_bk.frugal.streaming import stream_blocks
from resnet_bk.frugal.waiting import UNDER_WAY, WaitingTensors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH, VOCABULARY = 16, 11


class Block(nn.Module):
    """With random numbers, and a scalar that its loss depends on."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.fails_with = None

    def forward(self, x):
        if self.fails_with is not None:
            raise self.fails_with
        hidden = F.dropout(F.gelu(self.up(x)), 0.3)
        return x + self.down(hidden), hidden.square().mean()


class Toy(nn.Module):
    def __init__(self, depth=4):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def loss(self, tokens, seed):
        """As anybody would write it."""
        torch.manual_seed(seed)
        x, scalars = self.embed(tokens), []
        for block in self.blocks:
            x, scalar = block(x)
            scalars.append(scalar)
        return self.end(x, tokens, scalars)

    def end(self, x, tokens, scalars):
        nats = F.cross_entropy(self.head(F.dropout(x, 0.2)).flatten(0, 1), tokens.roll(-1, 1).flatten())
        return nats + 0.1 * torch.stack(scalars).mean()


class InParts:
    def __init__(self, model, pieces):
        self.model, self.pieces, self.blocks = model, pieces, list(model.blocks)
        self.losses = []

    def stem(self, piece):
        torch.manual_seed(piece)
        return self.model.embed(self.pieces[piece])

    def through(self, block, piece, x):
        return block(x)

    def loss(self, piece, x, scalars):
        self.losses.append(self.model.end(x, self.pieces[piece], scalars))
        return self.losses[-1]


def batches(count, step=0):
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(VOCABULARY, (2, 7), generator=generator).to(DEVICE) for _ in range(count)]


def twins(**options):
    torch.manual_seed(0)
    plain = Toy(**options).to(DEVICE)
    return plain, copy.deepcopy(plain)


def assert_close(ours, theirs):
    if DEVICE.type == "cpu":
        assert torch.equal(ours, theirs)
    else:
        assert (ours.cpu() - theirs.cpu()).norm() <= 1e-5 * theirs.cpu().norm()


def assert_same_gradients(ours, theirs):
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None), name
        if expected.grad is not None:
            assert_close(parameter.grad, expected.grad)


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("num_pieces", [1, 2, 5])
def test_gradients_are_those_of_piece_after_piece(depth, num_pieces):
    plain, ours = twins(depth=depth)
    waiting = WaitingTensors(DEVICE)
    for step in range(2):  # gradients of the first are there, and the second adds to them
        pieces = batches(num_pieces, step)
        losses = [plain.loss(piece, seed) for seed, piece in enumerate(pieces)]
        for loss in losses:
            loss.backward()
        parts = InParts(ours, pieces)
        backward_by_block(parts, num_pieces, waiting)
        for got, expected in zip(parts.losses, losses, strict=True):
            assert_close(got.detach(), expected.detach())
        if step == 0:
            first = waiting.host_bytes
            assert_same_gradients(ours, plain)
        elif DEVICE.type == "cpu" and num_pieces == 1:
            assert_same_gradients(ours, plain)
    assert waiting.host_bytes == first, "places are used again"
    # Inputs of blocks and of the loss, and a gradient, for each piece.
    assert first == num_pieces * (depth + 2) * 2 * 7 * WIDTH * 4


def held(streamed, optimizer):
    @contextmanager
    def holding(block, then):
        with ExitStack() as stack:
            if streamed is not None:
                stack.enter_context(streamed.holding(block, then=then))
            if optimizer is not None:
                stack.enter_context(optimizer.holding(block.parameters()))
            yield

    return holding


class Unseeded(InParts):
    """As one writes it without a thought of random numbers."""

    def stem(self, piece):
        return self.model.embed(self.pieces[piece])


def test_one_piece_is_a_plain_step_random_numbers_and_all():
    plain, ours = twins()
    waiting = WaitingTensors(DEVICE)
    for model in (plain, ours):
        torch.manual_seed(3)
        for step in range(2):
            (piece,) = batches(1, step)
            if model is plain:
                x, scalars = model.embed(piece), []
                for block in model.blocks:
                    x, scalar = block(x)
                    scalars.append(scalar)
                model.end(x, piece, scalars).backward()
            else:
                backward_by_block(Unseeded(model, [piece]), 1, waiting)
        drawn = torch.rand(3)
        if model is plain:
            expected = drawn
    assert torch.equal(drawn, expected)
    assert_same_gradients(ours, plain)


def test_pieces_draw_numbers_of_their_own_in_every_step():
    _, ours = twins(depth=2)
    masks: dict[int, list[torch.Tensor]] = {}

    class Logged(Unseeded):
        def through(self, block, piece, x):
            # The blocks' own generator, which goes on as if nobody had looked.
            with torch.random.fork_rng():
                mask = F.dropout(torch.ones(64, device=x.device), 0.5) > 0
            masks.setdefault(self.blocks.index(block), []).append(mask)
            return block(x)

    waiting = WaitingTensors(DEVICE)
    for step in range(2):
        backward_by_block(Logged(ours, batches(3, step)), 3, waiting)
    for of_block in masks.values():
        # Forward and backward of a step meet the same, and nothing else does.
        assert len({tuple(mask.tolist()) for mask in of_block}) == 6 and len(of_block) == 12
        assert torch.equal(torch.stack(of_block[:3]), torch.stack(of_block[3:6]))
    with pytest.raises(ValueError, match="num_pieces is 0"):
        backward_by_block(Unseeded(ours, []), 0, waiting)


@pytest.mark.parametrize("offloaded", [False, True], ids=["torch's optimizer", "offloaded optimizer"])
@pytest.mark.parametrize("streams", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in backward"])
def test_training_with_held_blocks_is_plain_training(monkeypatch, offloaded, streams, in_backward):
    if in_backward and not offloaded:
        pytest.skip("torch's optimizer updates at its step")

    def slow(*arguments, **options):
        time.sleep(0.005)  # on its way when the next step begins
        update(*arguments, **options)

    monkeypatch.setattr("resnet_bk.frugal.optimizer.update", slow)
    plain, ours = twins()
    expected_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, fused=True)
    optimizer = None
    if offloaded:
        optimizer = OffloadedAdamW(ours.parameters(), lr=0.01, blocks=ours.blocks)
    streamed = stream_blocks(list(ours.blocks), DEVICE, model=ours) if streams else None
    ends = [*ours.embed.parameters(), *ours.head.parameters()]
    stepping = optimizer or torch.optim.AdamW(ours.parameters(), lr=0.01, fused=True)
    waiting = WaitingTensors(DEVICE)
    for step in range(4):
        pieces = batches(3, step)
        expected_optimizer.zero_grad()
        for seed, piece in enumerate(pieces):
            plain.loss(piece, seed).backward()
        expected_optimizer.step()
        stepping.zero_grad()
        with ExitStack() as stack:
            if in_backward:
                stack.enter_context(optimizer.updating_in_backward())
            backward_by_block(
                InParts(ours, pieces),
                3,
                waiting,
                holding=held(streamed, optimizer),
                holding_ends=None if optimizer is None else optimizer.holding(ends),
            )
        for parameter in ours.blocks.parameters() if streams else ():
            assert is_host_memory(parameter.data)
        stepping.step()
    if optimizer is not None:
        optimizer.synchronize()
    for parameter, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        if DEVICE.type == "cpu":
            assert torch.equal(weight_home(parameter), expected)
        else:
            assert (weight_home(parameter).cpu() - expected.cpu()).abs().max() < 1e-3


def test_each_block_is_fetched_twice_a_step_and_its_gradients_leave_once(monkeypatch):
    _, ours = twins()
    optimizer = OffloadedAdamW(ours.parameters(), blocks=ours.blocks)
    streamed = stream_blocks(list(ours.blocks), DEVICE)
    fetched, left = [], []
    told = [ToldOfLoads(block, partial(fetched.append, index)) for index, block in enumerate(ours.blocks)]
    assert len(told) == 4
    bring = type(optimizer._courier).bring
    monkeypatch.setattr(
        type(optimizer._courier), "bring", lambda *arguments: left.append(arguments[1].dtype) or bring(*arguments)
    )
    backward_by_block(InParts(ours, batches(5)), 5, WaitingTensors(DEVICE), holding=held(streamed, optimizer))
    # The last block is there already when backward begins.
    assert fetched in ([0, 1, 2, 3, 3, 2, 1, 0], [0, 1, 2, 3, 2, 1, 0])
    inside = sum(1 for _ in ours.blocks.parameters())
    outside = 5 * 2 + 5  # of those that are not held, each piece's leaves by itself
    assert len(left) == inside + outside


def test_half_weights_are_summed_in_single():
    _, ours = twins()
    ours.blocks.bfloat16()
    exact = copy.deepcopy(ours).float()
    optimizer = OffloadedAdamW(ours.parameters(), blocks=ours.blocks)

    class Mixed(InParts):
        def through(self, block, piece, x):
            with torch.autocast(DEVICE.type, torch.bfloat16):
                y, scalar = block(x.bfloat16())
            return y.float(), scalar.float()

    for model, holding in ((ours, held(None, optimizer)), (exact, None)):
        backward_by_block(Mixed(model, batches(5)), 5, WaitingTensors(DEVICE), holding=holding)
    for parameter, expected in zip(ours.blocks.parameters(), exact.blocks.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad.cpu() - expected.grad.cpu()).norm() <= 0.02 * expected.grad.cpu().norm()
        assert not torch.equal(parameter.grad.cpu(), parameter.grad.cpu().bfloat16().float())


def test_frozen_parts_get_no_gradient():
    plain, ours = twins()
    for model in (plain, ours):
        model.embed.requires_grad_(False)
        model.blocks[1].requires_grad_(False)
    pieces = batches(3)
    for seed, piece in enumerate(pieces):
        plain.loss(piece, seed).backward()
    backward_by_block(InParts(ours, pieces), 3, WaitingTensors(DEVICE))
    assert_same_gradients(ours, plain)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_an_error_leaves_everything_usable(when):
    plain, ours = twins()
    streamed = stream_blocks(list(ours.blocks), DEVICE)
    waiting, pieces = WaitingTensors(DEVICE), batches(3)
    holding = held(streamed, None)

    class Failing(InParts):
        def loss(self, *arguments):
            result = super().loss(*arguments)
            ours.blocks[1].fails_with = FloatingPointError("in the middle")
            return result

    if when == "forward":
        ours.blocks[1].fails_with = FloatingPointError("in the middle")
    with pytest.raises(FloatingPointError, match="in the middle"):
        backward_by_block(Failing(ours, pieces), 3, waiting, holding=holding)
    assert all(is_host_memory(parameter.data) for parameter in ours.blocks.parameters())
    ours.blocks[1].fails_with = None
    ours.zero_grad()
    for seed, piece in enumerate(pieces):
        plain.loss(piece, seed).backward()
    backward_by_block(InParts(ours, pieces), 3, waiting, holding=holding)
    assert_same_gradients(ours, plain)


def test_one_block_is_held_at_a_time():
    _, ours = twins()
    streamed = stream_blocks(list(ours.blocks), DEVICE)
    x = torch.randn(2, WIDTH, device=DEVICE)
    with streamed.holding(ours.blocks[0], then=ours.blocks[1]):
        ours.blocks[0](x)
        with pytest.raises(RuntimeError, match="hold the one that runs"):
            ours.blocks[1](x)
        with pytest.raises(RuntimeError, match="one block at a time"), streamed.holding(ours.blocks[2]):
            pass
    assert all(is_host_memory(parameter.data) for parameter in ours.blocks.parameters())


def test_tensors_wait_under_their_names():
    waiting = WaitingTensors(DEVICE)
    tensors = {name: torch.randn(3, 4, device=DEVICE) for name in range(5)}
    for name, tensor in tensors.items():
        waiting.put(name, tensor)
    order = [4, 0, 3, 1, 2]
    for name, (tensor,) in zip(order, waiting.each([[name] for name in order]), strict=True):
        assert torch.equal(tensor, tensors[name])
        assert tensor.device.type == DEVICE.type
    assert len(waiting._leaving) <= UNDER_WAY
    waiting.end()
    assert waiting.host_bytes == 5 * 3 * 4 * 4
    assert list(waiting.each([])) == []


def test_a_name_can_be_put_while_those_before_are_gone_through():
    waiting = WaitingTensors(DEVICE)
    waiting.put(0, torch.zeros(3, device=DEVICE))
    for number, (tensor,) in enumerate(waiting.each([[name] for name in range(4)])):
        assert torch.equal(tensor.cpu(), torch.full((3,), float(number)))
        waiting.put(number + 1, tensor + 1, place=("all share it",))
    assert waiting.host_bytes == 2 * 3 * 4


def test_a_place_grows_and_shrinks_with_what_waits_there():
    waiting = WaitingTensors(DEVICE)
    for size, dtype in ((4, torch.float32), (6, torch.float32), (6, torch.bfloat16), (2, torch.float32)):
        tensor = torch.randn(size, device=DEVICE).to(dtype)
        waiting.put("x", tensor)
        waiting.put("y", tensor)
        ((x,),) = waiting.each([["x"]])
        assert torch.equal(x, tensor)
        waiting.end()
        assert waiting.host_bytes == 2 * size * dtype.itemsize
