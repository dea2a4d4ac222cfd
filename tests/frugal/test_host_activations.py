"""Saved tensors in host memory: gradients stay the same, and little stays on the device."""

import gc
import weakref

import pytest
import torch
from torch import nn

from resnet_bk.frugal.activations import IN_FLIGHT, HostActivations
from resnet_bk.frugal.host import host_empty, is_host_memory
from resnet_bk.memory.tracking import TensorTracker

WIDTH = 24


pytestmark = pytest.mark.usefixtures("one_thread")


class LateCopies(HostActivations):
    """A stream whose copies all end as late as they may: when something waits for them, or for one behind them.

    What they read and write is not kept alive, as a GPU does not either.
    """

    def __init__(self, **options):
        super().__init__(**options)
        self.queue, self.begun = [], 0

    def copy(self, target, source, device):
        self.begun += 1
        self.queue.append((self.begun, weakref.ref(target), weakref.ref(source)))
        return self.begun

    def wait(self, copy):
        while self.queue and self.queue[0][0] <= copy:
            target, source = (reference() for reference in self.queue.pop(0)[1:])
            if target is not None:
                assert source is not None, "read after it was freed"
                target.copy_(source)


class Layer(nn.Module):
    """What it saves: an input that is used twice, a result, a view of a weight, and something in another order."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        mixed = (self.up(x).exp().mT @ x).mT
        return x + self.down(mixed.tanh() * x[:, :1].expand_as(mixed))


def stack(depth=5):
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(depth)))


def batch():
    return torch.rand(2, WIDTH, WIDTH, generator=torch.Generator().manual_seed(3))


def gradients(model, host=None, x=None):
    model.zero_grad()
    x = batch() if x is None else x
    if host is None:
        loss = model(x).square().mean()
    else:
        with host:
            loss = model(x).square().mean()
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def assert_same(ours, plain):
    assert len(ours) == len(plain)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def held(tensor, host):
    """``tensor`` saved under ``host``, as the object that autograd keeps."""
    with host:
        return host._pack(tensor)


@pytest.mark.parametrize("kind", [HostActivations, LateCopies], ids=["at-once", "late"])
@pytest.mark.parametrize("min_bytes", [1, 2 * WIDTH * WIDTH * 4 + 1], ids=["all", "none"])
def test_gradients_are_the_same_step_after_step(kind, min_bytes):
    model, host = stack(), kind(min_bytes=min_bytes)
    plain = gradients(model)
    for _ in range(3):
        assert_same(gradients(model, host), plain)
        assert host.waiting_bytes == 0
    assert (host.pool_bytes > 0) == (min_bytes == 1)


@pytest.mark.parametrize("kind", [HostActivations, LateCopies], ids=["at-once", "late"])
def test_two_graphs_at_a_time_in_any_order_of_backward(kind):
    model, host = stack(), kind(min_bytes=1)
    rows = [batch(), batch() * 2]
    for order in ([0, 1], [1, 0]):
        totals = []
        for ours in (True, False):
            model.zero_grad()
            losses = []
            for row in rows:
                if ours:
                    with host:
                        losses.append(model(row).square().mean())
                else:
                    losses.append(model(row).square().mean())
            for index in order:
                losses[index].backward()
            totals.append([parameter.grad.clone() for parameter in model.parameters()])
        assert_same(*totals)


@pytest.mark.parametrize("kind", [HostActivations, LateCopies], ids=["at-once", "late"])
def test_backward_twice_through_a_graph_that_is_kept(kind):
    model, host = stack(), kind(min_bytes=1)
    results = []
    for context in (None, host):
        x = batch().requires_grad_()
        if context is None:
            loss = model(x).square().mean()
        else:
            with context:
                loss = model(x).square().mean()
        first = torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=True)
        second = torch.autograd.grad(loss, [x, *model.parameters()])
        assert_same(first, second)
        results.append(first)
    assert_same(*results)


def test_a_second_derivative_is_the_same():
    results = []
    for host in (None, HostActivations(min_bytes=1)):
        x = batch().requires_grad_()
        y = 2 * x  # no leaf
        if host is None:
            loss = y.exp().sum()
        else:
            with host:
                loss = y.exp().sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append([first, *torch.autograd.grad(first.square().sum(), x)])
    assert_same(*results)


def test_the_next_tensor_is_on_its_way_before_it_is_needed():
    host = LateCopies(min_bytes=1)
    packed = [held(batch() + number, host) for number in range(3 + IN_FLIGHT)]
    assert torch.equal(host._unpack(packed[2]), batch() + 2)
    begun = host.begun
    assert torch.equal(host._unpack(packed[1]), batch() + 1)
    assert host.begun == begun + 1, "only the one of the next"
    assert torch.equal(host._unpack(packed[0]), batch())
    assert host.begun == begun + 1, "there is no other"


def test_memory_that_is_copied_to_is_not_given_away():
    host = LateCopies(min_bytes=1)
    packed = [held(batch() + number, host) for number in range(2 + IN_FLIGHT)]
    host._unpack(packed[1])
    assert host.queue, "the next is on its way"
    del packed
    assert not host.queue, "waited for, although nobody wants it"


SHAPES = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 2),
    "permuted": lambda x: x.permute(2, 0, 1),
    "slice": lambda x: x[:, 2:7],
    "column": lambda x: x[..., 3],
    "scalar": lambda x: x.sum(),
    "one-row": lambda x: x[:1].mT,
    "complex": lambda x: torch.complex(x, -x).conj(),
    "bool": lambda x: x > 0.5,
    "bfloat16": lambda x: x.bfloat16().mT,
}


@pytest.mark.parametrize("kind", [HostActivations, LateCopies], ids=["at-once", "late"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_comes_back_has_the_values_type_and_strides(shape, kind):
    host = kind(min_bytes=1)
    tensor = SHAPES[shape](batch())
    packed = held(tensor, host)
    later = [held(batch(), host) for _ in range(IN_FLIGHT)]  # so that it has left the device
    back = host._unpack(packed)
    assert back.untyped_storage()._cdata != tensor.untyped_storage()._cdata
    assert torch.equal(back, tensor)
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert back.stride() == (torch.empty_like(tensor).stride() if shape != "column" else back.contiguous().stride())
    assert host.waiting_bytes == tensor.nbytes + sum(one.host.nbytes for one in later)


STAYING = {
    "parameter": lambda: nn.Parameter(batch()),
    "view-of-parameter": lambda: nn.Parameter(batch()).mT,
    "leaf": lambda: batch().requires_grad_(),
    "view-of-leaf": lambda: batch().requires_grad_()[1:],
    "frozen-parameter": lambda: nn.Parameter(batch(), requires_grad=False),
    "host-memory": lambda: host_empty(2, WIDTH, WIDTH, dtype=torch.float32).zero_(),
    "expanded": lambda: batch()[:, :1].expand(2, WIDTH, WIDTH),
    "sparse": lambda: batch().to_sparse(),
    "small": lambda: 2 * batch()[0, 0, 0],
    "empty": lambda: batch()[:0],
}


@pytest.mark.parametrize("kind", STAYING)
def test_what_stays_where_it_is(kind):
    host = HostActivations(min_bytes=8)
    tensor = STAYING[kind]()
    back = host._unpack(held(tensor, host))
    assert host.waiting_bytes == 0
    if kind == "sparse":
        assert back.is_sparse
    else:
        assert back.untyped_storage()._cdata == tensor.untyped_storage()._cdata
    if tensor.is_leaf:
        assert back is tensor


def test_results_that_stay_are_freed_with_their_graph():
    # A node that keeps its own result keeps itself: no garbage collector sees that cycle.
    host = HostActivations(min_bytes=1 << 30)
    with TensorTracker() as tracker:
        x = batch().requires_grad_()
        before = tracker.current_bytes
        with host:
            y = x.exp()
        del y
        assert tracker.current_bytes == before


def test_a_tensor_saved_by_several_operators_is_stored_once():
    host = HostActivations(min_bytes=1)
    x = 2 * batch().requires_grad_()
    with host:
        y = [x.square(), x.sin(), x * x]
    assert host.waiting_bytes == x.nbytes
    sum(part.sum() for part in y).backward()
    assert host.waiting_bytes == 0


@pytest.mark.parametrize("change", ["in place", "another at its address"])
def test_other_values_are_stored_again(change):
    host = HostActivations(min_bytes=1)
    x = batch()
    packed = held(x, host)
    others = [held(batch(), host) for _ in range(IN_FLIGHT)]
    if change == "in place":
        x.add_(1)
    else:
        del x
        x = batch() + 1
    again = held(x, host)
    assert again is not packed
    assert torch.equal(host._unpack(packed), batch())
    assert torch.equal(host._unpack(again), batch() + 1)
    assert len(others) == IN_FLIGHT


@pytest.mark.parametrize("later", [0, IN_FLIGHT])
def test_a_change_in_place_during_the_copy_is_refused(later):
    host = LateCopies(min_bytes=1)
    x = 2 * batch().requires_grad_()
    with host:
        y = x.square().sum()
    x.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        if later:
            _kept = [held(batch(), host) for _ in range(later)]
        y.backward()


def test_device_memory_does_not_grow_with_depth_and_host_memory_does():
    peaks = {}
    size = batch().nbytes
    for depth in (6, 12):
        layers = [nn.Tanh() for _ in range(depth)]
        model, host = nn.Sequential(*layers), HostActivations(min_bytes=1)
        with TensorTracker() as tracker:
            gradients(nn.Sequential(nn.Linear(WIDTH, WIDTH), model), host)
        peaks[depth] = (tracker.peak_bytes, tracker.peak_host_bytes)
    (device, host_bytes), (deeper_device, deeper_host_bytes) = peaks.values()
    assert deeper_device == device
    assert deeper_host_bytes - host_bytes == 6 * size


def test_the_pool_does_not_grow_from_step_to_step_and_can_be_emptied():
    model, host = stack(), HostActivations(min_bytes=1)
    gradients(model, host)
    with TensorTracker() as tracker:
        pool_bytes = host.pool_bytes
        for _ in range(3):
            gradients(model, host)
            assert host.pool_bytes == pool_bytes > 0
    assert tracker.peak_host_bytes <= pool_bytes
    host.empty_pool()
    assert (host.pool_bytes, host.waiting_bytes) == (0, 0)
    assert_same(gradients(model, host), gradients(model))


def test_a_graph_without_backward_gives_its_memory_back():
    model, host = stack(), HostActivations(min_bytes=1)
    with host:
        loss = model(batch()).sum()
    assert host.waiting_bytes > 0
    waiting = host.waiting_bytes
    del loss
    assert (host.waiting_bytes, host.pool_bytes) == (0, waiting)
    reference = weakref.ref(host)
    del host
    gc.collect()
    assert reference() is None


def test_it_may_be_entered_inside_itself_and_an_error_leaves_it():
    model, host = stack(), HostActivations(min_bytes=1)
    with pytest.raises(KeyError), host, host:
        raise KeyError
    x = 2 * batch().requires_grad_()
    x.square()
    assert host.waiting_bytes == 0, "no longer entered"
    assert_same(gradients(model, host), gradients(model))


def test_a_threshold_of_nothing_is_refused():
    with pytest.raises(ValueError, match="min_bytes is 0"):
        HostActivations(min_bytes=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gradients_on_a_gpu_are_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.Tanh()) for _ in range(20))).cuda()
    x = torch.randn(8192, 512, device="cuda")
    plain = gradients(model, x=x)
    host = HostActivations(min_bytes=1)
    for _ in range(5):
        assert_same(gradients(model, host, x), plain)
    buffers = [buffer for buffers in host._free.values() for buffer in buffers]
    assert all(buffer.is_pinned() and is_host_memory(buffer) for buffer in buffers)
    assert host.pool_bytes == sum(buffer.nbytes for buffer in buffers) > 0
