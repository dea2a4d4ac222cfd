"""Streamed weights: the same training bit for bit, in the memory of two blocks, whatever happens in between."""

import copy
import gc
import io
import random
import weakref
from functools import partial

import pytest
import torch
from told_of_loads import ToldOfLoads
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from resnet_bk.frugal.homes import weight_home
from resnet_bk.frugal.host import is_host_memory
from resnet_bk.frugal.streaming import stream_blocks
from resnet_bk.memory.tracking import TensorTracker
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM

CPU = torch.device("cpu")
WIDTH = 32


class Block(nn.Module):
    """As a transformer's, with parameters of its own, a buffer, and an output that is a tuple."""

    def __init__(self, width=WIDTH, dropout=0.1):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.gain = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("scale", torch.full((), 0.5))
        self.fails = False

    def forward(self, x):
        h = self.norm(x)
        x = x + self.dropout(self.mix(h).tanh() * self.gain)
        if self.fails:
            raise FloatingPointError("in the middle of a block")
        # The last gradient but one is made before anything of the block is needed again.
        return x + self.scale * self.down(self.dropout(F.gelu(self.up(x)))) + self.bias, h.detach()


class Toy(nn.Module):
    """An embedding, blocks and a head. ``through`` is how a block is called, with every one of them checkpointed."""

    def __init__(self, depth=4, width=WIDTH, dropout=0.1):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.head = nn.Linear(width, 11)
        self.through = partial(checkpoint, use_reentrant=False)
        self.order = range(depth)

    def forward(self, tokens):
        x = self.embed(tokens)
        for index in self.order:
            x, _ = self.through(self.blocks[index], x) if self.through else self.blocks[index](x)
        return self.head(x)

    def loss(self, tokens):
        return F.cross_entropy(self(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())


def twins(depth=4, **options):
    """A toy model, and the same one streamed."""
    torch.manual_seed(0)
    plain = Toy(depth, **options)
    streamed = copy.deepcopy(plain)
    return plain, streamed, stream_blocks(list(streamed.blocks), CPU, model=streamed)


def batch(seed):
    return torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(seed))


def assert_idle(model):
    """All parameters of the blocks are the host's, and so are their gradients."""
    for parameter in model.blocks.parameters():
        assert parameter.data_ptr() == weight_home(parameter).data_ptr()
        assert is_host_memory(parameter.data)
        assert parameter.grad is None or is_host_memory(parameter.grad)


def assert_same(plain, streamed, what=lambda parameter: parameter):
    for (name, expected), got in zip(plain.named_parameters(), streamed.parameters(), strict=True):
        if what(expected) is None:
            assert what(got) is None, name
        else:
            assert torch.equal(what(expected), what(got)), name


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower on more, and by far where others use them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def steps(model, *, num_steps=3, micro_batches=1, backward=lambda model, tokens: model.loss(tokens).backward()):
    """Losses and gradients do not show, but what AdamW has made of them does, in every bit."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, fused=True)
    for step in range(num_steps):
        torch.manual_seed(step)
        random.seed(step)
        optimizer.zero_grad()
        for micro_batch in range(micro_batches):
            backward(model, batch(10 * step + micro_batch))
        yield {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()


def assert_same_gradients(expected, got):
    for name, gradient in expected.items():
        assert (gradient is None) == (got[name] is None), name
        assert gradient is None or torch.equal(gradient, got[name]), name


def assert_trains_alike(plain, streamed, **options):
    for expected, got in zip(steps(plain, **options), steps(streamed, **options), strict=True):
        assert_idle(streamed)
        assert_same_gradients(expected, got)
    assert_same(plain, streamed)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batches", [1, 3], ids=["at once", "accumulated"])
def test_training_is_the_same_bit_for_bit(depth, micro_batches):
    plain, streamed, _ = twins(depth)
    before = copy.deepcopy(plain)
    assert_trains_alike(plain, streamed, micro_batches=micro_batches)
    assert all(not torch.equal(a, b) for a, b in zip(before.parameters(), streamed.parameters(), strict=True))


def forward_of_its_own(model):
    """Checkpointing that replaces ``forward`` itself, so that the second pass goes past the module's call and hooks."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    model.through = None


def reentrant(model):
    model.through = partial(checkpoint, use_reentrant=True)


def without_early_stop(model):
    model.through = partial(checkpoint, use_reentrant=False, early_stop=False)


def nested(model):
    inner = partial(checkpoint, use_reentrant=False)
    model.through = lambda block, x: checkpoint(inner, block, x, use_reentrant=False)


def saved_on_cpu(model):
    inner = model.through

    def through(block, x):
        with torch.autograd.graph.save_on_cpu():
            return inner(block, x)

    model.through = through


@pytest.mark.parametrize("checkpointed", [forward_of_its_own, reentrant, without_early_stop, nested, saved_on_cpu])
def test_any_way_to_checkpoint_will_do(checkpointed):
    plain, streamed, _ = twins()
    checkpointed(streamed)
    assert_trains_alike(plain, streamed)


def test_a_segment_of_two_blocks_is_checkpointed_too_coarsely():
    _, streamed, _ = twins()
    both = nn.Sequential(*streamed.blocks[:2])
    both.forward = lambda x: streamed.blocks[1](streamed.blocks[0](x)[0])
    with pytest.raises(RuntimeError, match="checkpoint the blocks, each by itself"):
        checkpoint(both, streamed.embed(batch(0)), use_reentrant=False)[0].sum().backward()
    assert_idle(streamed)


def skips_at_random(model):
    model.order = type("Chance", (), {"__iter__": lambda _: iter([i for i in range(4) if random.random() < 0.6])})()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: m.blocks[1].requires_grad_(False), id="a frozen block"),
        pytest.param(lambda m: (m.blocks[0].requires_grad_(False), m.embed.requires_grad_(False)), id="frozen start"),
        pytest.param(lambda m: [b.mix.requires_grad_(False) for b in m.blocks], id="frozen matrices"),
        pytest.param(lambda m: setattr(m, "order", [0, 2]), id="blocks left out"),
        pytest.param(skips_at_random, id="blocks left out at random"),
        pytest.param(lambda m: setattr(m, "order", [3, 0, 1]), id="another order"),
        pytest.param(lambda m: setattr(m, "order", [0, 1, 2, 3, 1, 1]), id="blocks used again"),
        pytest.param(lambda m: m.to(torch.float64), id="float64"),
        pytest.param(lambda m: [b.mix.weight.data.transpose_(0, 1) for b in m.blocks], id="transposed"),
        pytest.param(lambda m: setattr(m.blocks[2], "extra", nn.Parameter(torch.ones(0))), id="an empty parameter"),
    ],
)
def test_any_sequence_of_blocks_will_do(change):
    torch.manual_seed(0)
    plain = Toy()
    change(plain)
    streamed = copy.deepcopy(plain)
    stream_blocks(list(streamed.blocks), CPU)
    assert_trains_alike(plain, streamed, micro_batches=2)


def test_several_dtypes_in_a_block():
    torch.manual_seed(0)
    plain = Toy(3)
    for block in plain.blocks:
        block.mix.bfloat16()
        block.mix.register_forward_pre_hook(lambda _, args: args[0].bfloat16())
        block.down.double()
        block.down.register_forward_pre_hook(lambda _, args: args[0].double())
        block.down.register_forward_hook(lambda _, args, y: y.float())
    streamed = copy.deepcopy(plain)
    stream_blocks(list(streamed.blocks), CPU)
    assert {p.dtype for p in streamed.blocks.parameters()} == {torch.float32, torch.bfloat16, torch.float64}
    assert_trains_alike(plain, streamed, micro_batches=2)


@pytest.mark.parametrize("inside", ["each pass", "the whole run"])
def test_bfloat16_autocast(inside):
    plain, streamed, _ = twins()
    for model in (plain, streamed):
        model.head.requires_grad_(False)  # its cast would be kept, over the steps that change it
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=True)

    def backward(model, tokens):
        if inside == "the whole run":
            return model.loss(tokens).backward()
        with autocast(cache_enabled=model is streamed):
            loss = model.loss(tokens)
        return loss.backward()

    if inside == "each pass":
        assert_trains_alike(plain, streamed, micro_batches=2, backward=backward)
    else:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            expected = [*steps(plain)]
        with autocast():
            got = [*steps(streamed)]
            assert torch.is_autocast_cache_enabled()
        assert len(expected) == len(got) == 3
        for gradients in zip(expected, got, strict=True):
            assert_same_gradients(*gradients)
        assert_same(plain, streamed)


@pytest.mark.parametrize("mixer", ["resolvent", "bk", "attention", "local"])
def test_the_language_model_trains_alike(mixer):
    config = ResNetBKConfig.from_preset("tiny", mixer=mixer, hidden_size=32, num_layers=3, vocab_size=61)
    torch.manual_seed(0)
    plain = ResNetBKForCausalLM(config).train()
    streamed = copy.deepcopy(plain)
    for block in streamed.model.layers:
        block.register_forward_pre_hook(lambda block, _: None)
    stream_blocks(list(streamed.model.layers), CPU, model=streamed)
    for block in streamed.model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def backward(model, tokens):
        tokens = tokens.repeat(1, 3)
        model(tokens, labels=tokens).loss.backward()

    for expected, got in zip(
        steps(plain, micro_batches=2, backward=backward),
        steps(streamed, micro_batches=2, backward=backward),
        strict=True,
    ):
        assert_same_gradients(expected, got)
    assert_same(plain, streamed)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_needs_no_checkpoint(context):
    plain, streamed, _ = twins()
    plain.through = streamed.through = None
    tokens = batch(0)
    with context():
        for model in (plain.eval(), streamed.eval()):
            model(tokens)
        assert torch.equal(plain(tokens), streamed(tokens))
    assert_idle(streamed)


def test_a_forward_without_backward_leaves_nothing_behind():
    plain, streamed, _ = twins()
    for _ in range(2):
        streamed.loss(batch(0))
        assert_idle(streamed)
    assert_trains_alike(plain, streamed)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_backward_without_recomputation_is_refused(depth):
    plain, streamed, _ = twins(depth)
    streamed.through = None
    loss = streamed.loss(batch(0))
    with pytest.raises(RuntimeError, match="checkpoint the blocks"):
        loss.backward()
    assert_idle(streamed)
    streamed.through = plain.through
    streamed.zero_grad()
    assert_trains_alike(plain, streamed)


def test_backward_without_recomputation_is_refused_for_a_bare_weight():
    class Scale(nn.Module):
        """What autograd keeps of this is the parameter itself."""

        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x):
            return x * self.gain

    scales = nn.ModuleList([Scale(), Scale(), Scale()])
    stream_blocks(list(scales), CPU)
    x = torch.randn(3, WIDTH, requires_grad=True)
    for scale in scales:
        x = scale(x)
    with pytest.raises(RuntimeError, match="checkpoint the blocks"):
        x.sum().backward()


def test_a_graph_that_is_not_used_is_freed():
    _, streamed, _ = twins()
    streamed.through = None
    left = []
    with TensorTracker() as tracker:
        for _ in range(3):
            loss = streamed.loss(batch(0))
            assert tracker.current_bytes > (left[0] if left else 0) + 20 * batch(0).numel() * WIDTH * 4
            del loss
            left.append(tracker.current_bytes)
    assert len(set(left)) == 1


def test_second_derivatives_are_refused():
    _, streamed, _ = twins()
    loss = streamed.loss(batch(0))
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, streamed.embed.weight, create_graph=True)
    assert_idle(streamed)


def test_a_block_may_differentiate_inside_its_forward():
    class Force(nn.Module):
        """Minus the gradient of an energy."""

        def __init__(self):
            super().__init__()
            self.energy = nn.Linear(WIDTH, 1)

        def forward(self, x):
            with torch.enable_grad():
                x = x if x.requires_grad else x.clone().requires_grad_()
                energy = (self.energy(x).tanh() ** 2).sum()
                return x - torch.autograd.grad(energy, x, create_graph=True)[0]

    torch.manual_seed(0)
    plain = nn.ModuleList([Force(), Force(), Force()])
    streamed = copy.deepcopy(plain)
    stream_blocks(list(streamed), CPU)
    for blocks in (plain, streamed):
        x = torch.ones(3, WIDTH)
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False, early_stop=False)
        x.square().sum().backward()
    assert_same(plain, streamed, what=lambda parameter: parameter.grad)


def test_a_graph_that_outlives_streaming_is_refused():
    _, streamed, handle = twins(2)
    streamed.through = None
    loss = streamed.loss(batch(0))
    handle.remove(CPU)
    with pytest.raises(RuntimeError, match="checkpoint the blocks"):
        loss.backward()


def test_a_graph_can_be_used_twice():
    plain, streamed, _ = twins()

    def backward(model, tokens):
        loss = model.loss(tokens)
        loss.backward(retain_graph=True)
        loss.backward()

    assert_trains_alike(plain, streamed, backward=backward)


def test_two_graphs_at_once():
    plain, streamed, _ = twins()

    def backward(model, tokens):
        losses = [model.loss(tokens), model.loss(tokens + 1 - tokens)]
        losses[0].backward()
        losses[1].backward()

    assert_trains_alike(plain, streamed, backward=backward)


def test_gradients_can_be_asked_for_as_values():
    plain, streamed, _ = twins(dropout=0.0)
    steps_of_both = [next(steps(model)) for model in (plain, streamed)]
    values = [torch.autograd.grad(model.loss(batch(1)), [*model.parameters()]) for model in (plain, streamed)]
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    assert_idle(streamed)
    # What was in parameter.grad is still there.
    for name, parameter in streamed.named_parameters():
        assert torch.equal(parameter.grad, steps_of_both[0][name])


@pytest.mark.parametrize("where", ["forward", "recomputation", "backward", "hook of a gradient", "writer"])
def test_an_error_leaves_everything_idle_and_usable(where):
    plain, streamed, handle = twins()
    failing = streamed.blocks[2]
    tokens = batch(0)

    def raise_it(*_):
        # A new one each time: one that is kept keeps its frames, and in older torch a checkpoint's hooks with them.
        raise FloatingPointError("in the middle")

    handles = []
    if where == "forward":
        failing.fails = True
    elif where == "backward":
        handles.append(failing.up.register_forward_hook(lambda _, args, y: y.register_hook(raise_it) and None))
    elif where == "hook of a gradient":
        handles.append(failing.up.weight.register_post_accumulate_grad_hook(raise_it))
    elif where == "writer":
        told = ToldOfLoads(failing, raise_it)
    with pytest.raises(FloatingPointError, match="in the middle"):
        loss = streamed.loss(tokens)
        failing.fails = where == "recomputation"
        loss.backward()
    # At once, so that what an optimizer or zero_grad does next is not undone later.
    assert_idle(streamed)
    assert not handle._gradients._aside
    failing.fails = False
    for registered in handles:
        registered.remove()
    if where == "writer":
        told.call = lambda: None
    streamed.zero_grad()
    assert_trains_alike(plain, streamed)


def test_an_optimizers_hook_has_the_gradient_first():
    plain, streamed, _ = twins()
    next(steps(plain))
    taken = {}

    def take(parameter):
        # On the device, with the weights of the device.
        assert not is_host_memory(parameter.grad)
        taken[parameter] = parameter.grad
        parameter.grad = None

    def backward(model, tokens):
        # After the hooks of a first pass, as an optimizer that is made late.
        model.loss(tokens)
        for parameter in model.blocks.parameters():
            parameter.register_post_accumulate_grad_hook(take)
        torch.manual_seed(0)
        model.loss(tokens).backward()

    next(steps(streamed, backward=backward))
    assert all(parameter.grad is None for parameter in streamed.blocks.parameters())
    for expected, parameter in zip(plain.blocks.parameters(), streamed.blocks.parameters(), strict=True):
        assert torch.equal(expected.grad, taken[parameter])


def test_a_gradient_is_the_devices_until_every_hook_has_seen_it():
    _, streamed, _ = twins(dropout=0.0)
    seen = []

    def look(parameter):
        seen.append((parameter.grad.clone(), is_host_memory(parameter.grad), is_host_memory(parameter.data)))

    parameter = streamed.blocks[1].up.weight
    parameter.register_post_accumulate_grad_hook(look)
    for _ in range(2):
        streamed.loss(batch(0)).backward()
    (first, *places), (second, *same_places) = seen
    assert places == same_places == [False, False]
    # What there was before is on the host, where the sum is made.
    assert torch.equal(first, second)
    assert torch.equal(parameter.grad, first + second)


def test_what_a_hook_puts_in_the_gradients_place_stays_there():
    class Elsewhere(torch.Tensor):
        """As that of an optimizer which keeps gradients in a way of its own."""

    _, streamed, _ = twins()

    def replace(parameter):
        parameter.grad = parameter.grad.as_subclass(Elsewhere)

    parameter = streamed.blocks[1].up.weight
    parameter.register_post_accumulate_grad_hook(replace)
    streamed.loss(batch(0)).backward()
    first = parameter.grad
    assert type(first) is Elsewhere
    streamed.loss(batch(0)).backward()
    assert type(parameter.grad) is Elsewhere
    assert_idle_but = [p for p in streamed.blocks.parameters() if p is not parameter]
    assert all(is_host_memory(p.grad) for p in assert_idle_but)


def test_an_update_of_the_weights_on_the_device_is_refused():
    _, streamed, _ = twins()

    def update(parameter):
        with torch.no_grad():
            parameter.sub_(parameter.grad)

    streamed.blocks[1].up.weight.register_post_accumulate_grad_hook(update)
    with pytest.raises(RuntimeError, match="write to weight_home"):
        streamed.loss(batch(0)).backward()
    assert_idle(streamed)


def test_an_update_of_the_homes_in_backward():
    plain, streamed, _ = twins()

    def update(parameter):
        with torch.no_grad():
            weight_home(parameter).sub_(parameter.grad)

    for model in (plain, streamed):
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(update)
        torch.manual_seed(3)
        for step in range(3):
            model.zero_grad()
            model.loss(batch(step)).backward()
    assert_same(plain, streamed)


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda p, value: p.data.copy_(value), id="data"),
        pytest.param(lambda p, value: weight_home(p).copy_(value), id="home"),
        pytest.param(lambda p, value: p.detach().copy_(value), id="parameter"),
    ],
)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_is_written_while_idle_counts_from_the_next_pass(write, depth):
    plain, streamed, _ = twins(depth, dropout=0.0)
    for model in (plain, streamed):
        model.loss(batch(0)).backward()
        with torch.no_grad():
            model.loss(batch(0))
            for parameter in model.parameters():
                write(parameter, parameter * 1.5)
        model.zero_grad()
        model.loss(batch(1)).backward()
    assert_same(plain, streamed, what=lambda parameter: parameter.grad)


def test_what_was_fetched_ahead_and_not_used_is_not_used_later():
    plain, streamed, _ = twins(dropout=0.0)
    outputs = []
    for model in (plain, streamed):
        with torch.no_grad():
            model.order = [0]  # the next is fetched
            model(batch(0))
            model.blocks[1].gain.mul_(3)
            model.order = [1, 2]
            outputs.append(model(batch(0)))
            model.order = [0]
            model(batch(0))
            for parameter in model.blocks[1].parameters():
                weight_home(parameter).mul_(0.5)
            model.order = [1, 2]
            outputs.append(model(batch(0)))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


def test_state_dict_there_and_back():
    plain, streamed, _ = twins(dropout=0.0)
    for step in (steps(plain), steps(streamed)):
        next(step)
        next(step, None)
    saved = streamed.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in plain.state_dict().items())
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    torch.manual_seed(5)
    other = Toy(dropout=0.0)
    assert not torch.equal(other(batch(0)), plain(batch(0)))
    stream_blocks(list(other.blocks), CPU)
    other(batch(0))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(batch(0)), plain(batch(0)))
    assert_idle(other)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped since"])
def test_removed_it_is_an_ordinary_model(wrapped):
    plain, streamed, handle = twins()
    if wrapped:
        forward_of_its_own(streamed)
    first = next(steps(streamed))
    handle.remove(CPU)
    assert handle.device_bytes == handle.host_bytes == 0
    for name, parameter in streamed.named_parameters():
        assert not is_host_memory(parameter)
        assert weight_home(parameter).data_ptr() == parameter.data_ptr()
        assert torch.equal(parameter.grad, first[name])
    assert wrapped == any("forward" in vars(block) for block in streamed.blocks)
    streamed.zero_grad()
    streamed = copy.deepcopy(streamed)
    for expected, got in zip(steps(plain), steps(streamed), strict=True):
        assert_same_gradients(expected, got)
    if not wrapped:
        stream_blocks(list(streamed.blocks), CPU)
        streamed.zero_grad()
        assert_trains_alike(plain, streamed)


def test_gradients_that_were_there_before_stay():
    plain, streamed = Toy(dropout=0.0), None
    next(steps(plain))
    streamed = copy.deepcopy(plain)
    for expected, parameter in zip(plain.parameters(), streamed.parameters(), strict=True):
        parameter.grad = expected.grad.clone()
    stream_blocks(list(streamed.blocks), CPU)
    for model in (plain, streamed):
        model.loss(batch(1)).backward()
    assert_same(plain, streamed, what=lambda parameter: parameter.grad)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: torch.save(model, io.BytesIO())], ids=["copy", "save"])
def test_a_copy_is_refused(copied):
    _, streamed, _ = twins()
    with pytest.raises(RuntimeError, match="call remove"):
        copied(streamed)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: m.double(), id="double"),
        pytest.param(lambda m: m.load_state_dict(m.state_dict(), assign=True), id="assign"),
        pytest.param(lambda m: setattr(m.blocks[1], "gain", nn.Parameter(torch.ones(WIDTH))), id="replaced"),
        pytest.param(lambda m: setattr(m.blocks[1], "more", nn.Parameter(torch.ones(WIDTH))), id="added"),
        pytest.param(lambda m: setattr(m.blocks[1].gain, "data", torch.ones(WIDTH)), id="data"),
    ],
)
def test_parameters_that_are_replaced_are_noticed(change):
    _, streamed, _ = twins()
    change(streamed)
    with pytest.raises(RuntimeError, match="replaced or moved"):
        streamed(batch(0))


def tied(model):
    model.blocks[2].up.weight = model.blocks[0].up.weight


def tied_outside(model):
    model.head.weight = model.blocks[1].mix.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))


def shared_outside(model):
    model.blocks[1].borrowed = model.head


def same_memory(model):
    model.blocks[1].mix.weight = nn.Parameter(model.blocks[0].mix.weight.data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tied, "belongs to blocks 0 and 2.*untie"),
        (tied_outside, "head.weight is also a parameter of block 1.*untie"),
        (shared_outside, r"model.head.weight is also a parameter of block 1.*untie"),
        (same_memory, "shares its memory.*clone"),
        (lambda model: model.to("meta"), "not an ordinary dense tensor"),
        (forward_of_its_own, "stream the blocks first"),
        (lambda model: stream_blocks(list(model.blocks[3:]), CPU), "streamed already.*remove"),
        (lambda model: setattr(model, "blocks", nn.ModuleList()), "at least one"),
        (lambda model: model.blocks.append(model.blocks[0].mix), "belongs to blocks 0 and 4"),
    ],
    ids=[
        "tied",
        "tied outside",
        "module of both",
        "same memory",
        "meta",
        "checkpointed before",
        "streamed twice",
        "none",
        "nested",
    ],
)
def test_what_cannot_be_streamed_is_refused(change, message):
    model = Toy()
    change(model)
    before = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        stream_blocks(list(model.blocks), CPU, model=model)
    assert before == [parameter.data_ptr() for parameter in model.parameters()]


def test_a_parameter_shared_inside_one_block_is_fine():
    torch.manual_seed(0)
    plain = Toy()
    for block in plain.blocks:
        block.mix.bias = block.norm.bias
    streamed = copy.deepcopy(plain)
    stream_blocks(list(streamed.blocks), CPU)
    assert_trains_alike(plain, streamed)


def test_a_weight_that_is_an_output_is_copied():
    class Prompt(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Parameter(torch.randn(4, WIDTH))

        def forward(self, scale):
            return {"tokens": self.tokens[None], "scale": scale}

    prompts = nn.ModuleList([Prompt(), Prompt(), Prompt()])
    expected = [prompt.tokens.detach().clone() for prompt in prompts]
    stream_blocks(list(prompts), CPU)
    outputs = [prompt(2.0)["tokens"] for prompt in prompts]
    sum((i + 1) * y.sum() for i, y in enumerate(outputs)).backward()
    for i in range(3):
        assert torch.equal(outputs[i][0], expected[i])
        assert (prompts[i].tokens.grad == i + 1).all()


def test_whoever_writes_homes_is_waited_for():
    _, streamed, _ = twins()
    events = []
    told = [ToldOfLoads(block, partial(events.append, ("load", index))) for index, block in enumerate(streamed.blocks)]
    assert len(told) == 4
    for index, block in enumerate(streamed.blocks):
        block.norm.register_forward_hook(lambda *_, index=index: events.append(("run", index)))
    streamed.loss(batch(0)).backward()
    assert events == [
        *[("load", 0), ("load", 1), ("run", 0), ("load", 2), ("run", 1), ("load", 3), ("run", 2), ("run", 3)],
        # The last two are still there.
        *[("run", 3), ("load", 1), ("run", 2), ("load", 0), ("run", 1), ("run", 0)],
    ]


def test_the_model_can_be_forgotten():
    _, streamed, handle = twins()
    streamed.loss(batch(0)).backward()
    alive = weakref.ref(handle), weakref.ref(streamed.blocks[0]), weakref.ref(streamed.blocks[0].gain)
    del streamed, handle
    gc.collect()
    assert [reference() for reference in alive] == [None, None, None]


def measured(depth, *, through):
    """Peak bytes on the device and on the host of a training step, and the handle."""
    width = 64
    torch.manual_seed(0)
    model = Toy(depth, width=width)
    model.through = through
    tokens = batch(0)
    with TensorTracker() as tracker:
        handle = stream_blocks(list(model.blocks), CPU)
        tracker.include([*model.embed.parameters(), *model.head.parameters(), *model.buffers(), tokens])
        at_rest = tracker.current_bytes
        for _ in range(2):
            model.zero_grad()
            gc.collect()
            tracker.reset_peak()
            model.loss(tokens).backward()
    outside = sum(p.nbytes for p in [*model.embed.parameters(), *model.head.parameters(), *model.buffers(), tokens])
    return tracker, handle, model, at_rest - outside


def test_the_device_holds_two_blocks_whatever_the_depth():
    through = partial(checkpoint, use_reentrant=False)
    block_bytes = sum(parameter.nbytes for parameter in Block(64).parameters())
    input_bytes = 3 * 8 * 64 * 4
    peaks = {}
    for depth in (4, 12):
        tracker, handle, model, weights_at_rest = measured(depth, through=through)
        assert weights_at_rest == handle.device_bytes == 2 * block_bytes
        assert handle.host_bytes == depth * block_bytes
        assert tracker.host_bytes == 2 * depth * block_bytes, "weights and gradients"
        peaks[depth] = tracker.peak_bytes
        assert_idle(model)
    # Of each block more: its input, and the state of the random numbers, with which it is computed again.
    random_state = torch.get_rng_state().nbytes
    assert peaks[12] - peaks[4] <= 8 * (input_bytes + 4 + 2 * random_state)
    assert peaks[12] < 5 * block_bytes


def test_gradients_leave_the_device_one_by_one():
    class Wide(nn.Module):
        """Eight matrices, whose inputs are small beside them."""

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(128, 128, bias=False) for _ in range(8))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    blocks = nn.ModuleList([Wide() for _ in range(3)])
    matrix_bytes = 128 * 128 * 4
    with TensorTracker() as tracker:
        handle = stream_blocks(list(blocks), CPU)
        x = torch.randn(2, 128)
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        tracker.reset_peak()
        x.sum().backward()
    assert handle.device_bytes == 2 * 8 * matrix_bytes
    # A matrix's gradient, and what torch turns it from into the weight's own strides.
    assert tracker.peak_bytes - handle.device_bytes < 2.5 * matrix_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("micro_batches", [1, 3], ids=["at once", "accumulated"])
def test_on_a_gpu(micro_batches):
    device = torch.device("cuda")
    torch.manual_seed(0)
    plain = Toy(6, width=512)
    streamed = copy.deepcopy(plain)
    plain.to(device)
    stream_blocks(list(streamed.blocks), device)
    streamed.embed.to(device)
    streamed.head.to(device)

    def backward(model, tokens):
        model.loss(tokens.to(device)).backward()

    assert_same(plain, streamed, what=lambda parameter: parameter.detach().cpu())
    for step, (expected, got) in enumerate(
        zip(
            steps(plain, micro_batches=micro_batches, backward=backward),
            steps(streamed, micro_batches=micro_batches, backward=backward),
            strict=True,
        )
    ):
        assert_idle(streamed)
        # The GPU adds up in no fixed order, and Adam divides what is next to nothing by what is next to nothing.
        most = 1e-3 if step else 1e-5
        for name, gradient in expected.items():
            error = (got[name].cpu() - gradient.cpu()).norm() / gradient.cpu().norm()
            assert error < most, f"step {step}: {name} is {error} off"
    with torch.no_grad():
        tokens = batch(0).to(device)
        torch.testing.assert_close(streamed.eval()(tokens), plain.eval()(tokens), rtol=1e-3, atol=1e-3)
    streamed.train()
    streamed.through = None
    loss = streamed.loss(batch(0).to(device))
    with pytest.raises(RuntimeError, match="checkpoint the blocks"):
        loss.backward()
    assert_idle(streamed)
