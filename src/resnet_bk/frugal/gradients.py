"""Gradients that left the device as backward made them, and still are where torch's tools look for them."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from resnet_bk.frugal.driver import side_stream
from resnet_bk.frugal.host import host_empty
from resnet_bk.imagined import is_copied_away, is_imagined

# Gradients on their way at once take at most as much memory as so many of the largest: one that arrives, one that is
# added up, one to spare. Of smaller ones there are more, so that a block's whole crowd of them need not wait.
LANDING_PLACES = 3
DEPARTURES = 2  # weights on their way back at once: one that leaves while the next is rounded


class HostGradient(Tensor):
    """A parameter's gradient whose numbers are in host memory, as a tensor that ``parameter.grad`` may be.

    To torch it is a tensor on the parameter's device, so that ``clip_grad_norm_``, ``GradScaler`` and a loop of one's
    own work as ever; what they compute is computed on the host. Results that are not written into it are host tensors.
    ``gradient += more``, which is how backward accumulates, sends ``more`` to the host and does not wait.
    """

    host: Tensor
    receive: Callable[[Tensor], None]
    wait: Callable[[], None]

    @staticmethod
    def __new__(
        cls, host: Tensor, device: torch.device, *, receive: Callable[[Tensor], None], wait: Callable[[], None]
    ) -> "HostGradient":
        """``receive`` adds a gradient to ``host`` some time later; ``wait`` returns when that has been done."""
        wrapper = Tensor._make_wrapper_subclass(cls, host.shape, strides=host.stride(), dtype=host.dtype, device=device)
        wrapper.host, wrapper.receive, wrapper.wait = host, receive, wait
        return wrapper

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"HostGradient({self.host!r}, device={str(self.device)!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.add_.Tensor and not kwargs and _is_more(*args):
            args[0].receive(args[1])
            return args[0]
        wrappers: dict[int, HostGradient] = {}
        moved: list[tuple[Tensor, Tensor]] = []

        def to_host(x: Any) -> Any:
            if isinstance(x, HostGradient):
                x.wait()
                wrappers[id(x.host)] = x
                return x.host
            if isinstance(x, Tensor) and x.device.type != "cpu":
                moved.append((x, x.cpu()))
                return moved[-1][1]
            return x

        result = func(*tree_map(to_host, args), **tree_map(to_host, kwargs))
        if func._schema.is_mutable:
            for there, here in moved:
                there.copy_(here)
        return tree_map(lambda x: wrappers.get(id(x), x), result)


def _is_more(gradient: Any, more: Any, *rest: Any) -> bool:
    return (
        isinstance(gradient, HostGradient)
        and isinstance(more, Tensor)
        and not isinstance(more, HostGradient)
        and more.shape == gradient.shape
        and not rest
    )


class Courier:
    """Takes gradients to the host and weights back, in order, while the caller goes on.

    On a GPU there is a stream for each direction. All work on host memory is done by one thread, in the order in which
    it was asked for, so that nobody reads what is half written.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="host-optimizer")
        self._on_gpu = device.type == "cuda"
        self._down, self._up = side_stream(device), side_stream(device)
        self._landings = _Landings()
        self._departures = [_Place() for _ in range(DEPARTURES)]
        self._last: Future[None] | None = None

    def do(self, work: Callable[[], None]) -> Future[None]:
        """Has the worker do something after everything before it."""
        self._last = _done_at_once(work) if is_imagined() else self._worker.submit(work)
        return self._last

    def wait(self) -> None:
        """Returns when all work so far is done; raises what it raised."""
        if self._last is not None:
            self._last.result()

    def bring(self, gradient: Tensor, then: Callable[[Tensor], object]) -> Future[None]:
        """Copies a gradient to the host and has the worker call ``then`` with it; its memory is free afterwards."""
        landing = self._landings.free_for(gradient)
        place = landing.room_for(gradient)
        if self._down is None:
            is_copied_away(gradient)
            place.copy_(gradient)
            arrived = None
        else:
            self._down.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._down):
                place.copy_(gradient, non_blocking=True)
                arrived = self._down.record_event()
            # The allocator may give the memory to somebody else only behind this copy.
            gradient.record_stream(self._down)

        def work() -> None:
            if arrived is not None:
                arrived.synchronize()
            then(place)

        landing.future = self.do(work)
        return landing.future

    def send(self, source: Tensor, weight: Tensor, after: "torch.cuda.Event | None") -> "torch.cuda.Event | None":
        """From the worker: writes ``source`` into ``weight``, on the host or on the device, rounded to its type.

        On a GPU the copy begins after the event ``after``, and the event returned is its end.
        """
        if weight.device.type == "cpu" or self._up is None:
            weight.copy_(source)
            return None
        departure = self._departures[0]
        self._departures.reverse()
        departure.wait()
        # Rounded here: half the bytes on the way, and no room on the device for more than the weight itself.
        place = departure.room_for(weight).copy_(source)
        with torch.cuda.stream(self._up):
            if after is not None:
                self._up.wait_event(after)
            weight.copy_(place, non_blocking=True)
            departure.event = self._up.record_event()
        event: torch.cuda.Event = departure.event
        return event

    def moment(self) -> "torch.cuda.Event | None":
        """What the device has been asked to do so far, as an event to wait for."""
        return torch.cuda.current_stream(self.device).record_event() if self._on_gpu else None


def _done_at_once(work: Callable[[], None]) -> Future[None]:
    future: Future[None] = Future()
    work()
    future.set_result(None)
    return future


class _Landings:
    """Places for gradients that arrive."""

    def __init__(self) -> None:
        self._places: list[_Place] = []  # those that have waited longest first
        self._largest = 0

    def free_for(self, gradient: Tensor) -> "_Place":
        """A place that is large enough; waits for one only where all that may be are in use."""
        num_bytes = gradient.nbytes
        self._largest = max(self._largest, num_bytes)
        chosen = self._chosen(num_bytes)
        if chosen in self._places:
            self._places.remove(chosen)
        self._places.append(chosen)
        return chosen

    def _chosen(self, num_bytes: int) -> "_Place":
        fitting = [place for place in self._places if place.size >= num_bytes]
        free = [place for place in fitting if place.is_free()]
        if free:
            return min(free, key=lambda place: place.size)
        most = LANDING_PLACES * self._largest
        if sum(place.size for place in self._places) + num_bytes <= most:
            return _Place()
        if fitting:
            # Waiting is quicker than pinning other memory.
            fitting[0].wait()
            return fitting[0]
        while sum(place.size for place in self._places) + num_bytes > most:
            self._places.pop(0).wait()
        return _Place()


class _Place:
    """A piece of host memory that grows to the largest tensor that has been there."""

    def __init__(self) -> None:
        self.future: Future[None] | None = None
        self.event: Any = None
        self._bytes: Tensor | None = None

    @property
    def size(self) -> int:
        """In bytes."""
        return 0 if self._bytes is None else self._bytes.numel()

    def is_free(self) -> bool:
        """Whether what was there is no longer needed."""
        return self.future is None or self.future.done()

    def room_for(self, like: Tensor) -> Tensor:
        """Room for a tensor of this shape and type."""
        if self.size < like.nbytes:
            self._bytes = None  # before the new one: never both
            self._bytes = host_empty(like.nbytes, dtype=torch.uint8)
        assert self._bytes is not None
        return self._bytes[: like.nbytes].view(like.dtype).view(like.shape)

    def wait(self) -> None:
        """Returns when what was there is no longer needed."""
        if self.future is not None:
            self.future.result()
        if self.event is not None:
            self.event.synchronize()
