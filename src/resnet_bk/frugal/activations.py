"""Tensors that autograd saves for backward, waiting in host memory instead of on the device."""

import weakref
from collections import deque
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from resnet_bk.frugal.driver import side_stream
from resnet_bk.frugal.host import host_empty, is_host_memory

# Tensors whose copy may still be running. The device's memory holds no more of them than this, and computing waits
# for a copy only if it is this many tensors ahead of it.
IN_FLIGHT = 2
MIN_BYTES = 1 << 20


class HostActivations:
    """What autograd saves while this is entered goes to host memory, and comes back in backward.

    It works around any forward, that of a compiled model too, may be entered again and again, and gives the gradients
    that there are without it, bit for bit. On a GPU, copies run beside the computation: out while the next layers
    compute, and back, last saved first, one tensor before it is needed. A tensor that is saved several times is copied
    once. Buffers are used again from step to step, as registering memory with the driver is slow; ``empty_pool`` frees
    them.

    Parameters and other leaves that need a gradient stay where they are, with their views, since they are on the device
    anyway; so does what is in ``host`` memory already, is expanded, or has fewer than ``min_bytes`` bytes.

    A saved tensor must not be changed in place while its copy is under way; backward says so, as it does without this.
    Not for several threads at once.

    >>> x = torch.ones(4, requires_grad=True)
    >>> with HostActivations(min_bytes=1) as host:
    ...     y = (2 * x).square().sum()
    >>> host.waiting_bytes
    16
    >>> y.backward()
    >>> x.grad
    tensor([8., 8., 8., 8.])
    """

    def __init__(self, *, min_bytes: int = MIN_BYTES) -> None:
        if min_bytes < 1:
            raise ValueError(f"min_bytes is {min_bytes}; give 1 to take every tensor, or more")
        self.min_bytes = min_bytes
        self.waiting_bytes = 0
        self._free: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = {}
        self._known: weakref.WeakValueDictionary[tuple[Any, ...], _Waiting] = weakref.WeakValueDictionary()
        self._in_flight: deque[weakref.ref[_Waiting]] = deque()
        self._newest: weakref.ref[_Waiting] | None = None
        self._entered: list[torch.autograd.graph.saved_tensors_hooks] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        # Nothing may still be written to buffers that go with this.
        weakref.finalize(self, _synchronize, self._streams)

    def __enter__(self) -> Self:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._entered.append(hooks)
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.pop().__exit__(*error)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same one: what waits belongs to graphs, which are not copied."""
        return self

    @property
    def pool_bytes(self) -> int:
        """Bytes of the buffers that are free to be used again."""
        return sum(buffer.nbytes for buffers in self._free.values() for buffer in buffers)

    def empty_pool(self) -> None:
        """Frees the buffers that nothing waits in; on a GPU this waits for copies under way."""
        _synchronize(self._streams)
        self._free.clear()

    def _pack(self, tensor: Tensor) -> Any:
        if not self._is_worth_it(tensor):
            # A result that its own graph node kept would never be freed; a leaf has no node, and must stay itself.
            return tensor if tensor.is_leaf else tensor.detach()
        storage = tensor.untyped_storage()
        place = (storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        waiting = self._known.get(place)
        # An address may come again, for another storage.
        if waiting is None or waiting.storage() is None:
            waiting = self._known[place] = _Waiting(self, tensor, self._newest)
            self._newest = weakref.ref(waiting)
            self._in_flight.append(self._newest)
            self._land()
        return waiting

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Waiting):
            tensor: Tensor = packed
            return tensor
        tensor = packed.on_device()
        before = None if packed.before is None else packed.before()
        if before is not None:
            before.fetch()
        return tensor

    def _is_worth_it(self, tensor: Tensor) -> bool:
        # Subclasses, a compiler's fake tensors among them, may have no memory of their own.
        if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.nbytes < self.min_bytes:
            return False
        base = tensor if tensor._base is None else tensor._base
        is_weight = isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad)
        is_expanded = any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return not (is_weight or is_expanded or is_host_memory(tensor))

    def _land(self) -> None:
        """Lets go of device memory, oldest first.

        The tensors are held here until the computing stream has been told to wait for their copies, rather than left to
        ``record_stream``: with that the allocator takes memory back when it sees, while launching, that a copy has
        ended. But launching runs ahead of the GPU by many layers, and their inputs would all stay.
        """
        while len(self._in_flight) > IN_FLIGHT:
            waiting = self._in_flight.popleft()()
            if waiting is not None:
                waiting.leave_device()

    def take(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer ``(num_elements,)`` for copies to and from ``device``, a free one if there is one of that size."""
        free = self._free.get((num_elements, dtype, device))
        buffer = free.pop() if free else host_empty(num_elements, dtype=dtype, pinned=device.type == "cuda")
        self.waiting_bytes += buffer.nbytes
        return buffer

    def give_back(self, buffer: Tensor, device: torch.device) -> None:
        """A copy from it may still be under way: whatever is written to it next comes behind, on the same stream."""
        self.waiting_bytes -= buffer.nbytes
        self._free.setdefault((buffer.numel(), buffer.dtype, device), []).append(buffer)

    def copy(self, target: Tensor, source: Tensor, device: torch.device) -> "_Copy | None":
        """Copies beside the computation, behind all that it was given so far; at once where that is not possible."""
        side = self._streams.get(device) or side_stream(device)
        if side is None:
            target.copy_(source)
            return None
        self._streams[device] = side
        computing = torch.cuda.current_stream(device)
        side.wait_stream(computing)
        with torch.cuda.stream(side):
            target.copy_(source, non_blocking=True)
        return _Copy(side.record_event(), computing)

    def wait(self, copy: "_Copy") -> None:
        """Whatever is computed next comes behind the copy, and so does whatever gets the device memory in it."""
        for stream in {copy.computing, torch.cuda.current_stream(copy.computing.device)}:
            stream.wait_event(copy.done)


class _Copy(NamedTuple):
    """A copy under way: when it is done, and the stream whose memory it reads or writes."""

    done: torch.cuda.Event
    computing: torch.cuda.Stream


class _Waiting:
    """A saved tensor in host memory: its copy out may still be under way, or its copy back."""

    def __init__(self, owner: HostActivations, tensor: Tensor, before: "weakref.ref[_Waiting] | None") -> None:
        self.owner, self.before = owner, before
        self.storage = weakref.ref(tensor.untyped_storage())
        self.device = tensor.device
        self.source: Tensor | None = tensor.detach()
        self.version = tensor._version
        self.fetched: Tensor | None = None
        self.fetching: _Copy | None = None
        self.buffer = owner.take(tensor.numel(), tensor.dtype, self.device)
        # Strides as they were: on them depend kernels, and with those the order of sums.
        self.host = self.buffer.as_strided(tensor.shape, _dense_stride(tensor))
        self.sending = owner.copy(self.host, self.source, self.device)

    def __del__(self) -> None:
        if self.fetching is not None:
            # What computes next may get the memory that is being copied to.
            self.owner.wait(self.fetching)
        if hasattr(self, "buffer"):
            self.owner.give_back(self.buffer, self.device)

    def leave_device(self) -> None:
        """From here on it is in host memory alone, for whatever is computed next."""
        self._check()
        if self.sending is not None:
            self.owner.wait(self.sending)
        self.source = None

    def fetch(self) -> None:
        """Begins the copy back."""
        if self.source is None and self.fetched is None:
            # Memory of the computing stream, which the copy waits for: it may have been something else just before.
            self.fetched = torch.empty_strided(
                self.host.shape, self.host.stride(), dtype=self.host.dtype, device=self.device
            )
            self.fetching = self.owner.copy(self.fetched, self.host, self.device)

    def on_device(self) -> Tensor:
        """The tensor, for whatever is computed next; each time in memory of its own, unless it never left."""
        if self.source is not None:
            self._check()
            return self.source
        self.fetch()
        if self.fetching is not None:
            self.owner.wait(self.fetching)
        tensor, self.fetched, self.fetching = self.fetched, None, None
        assert tensor is not None
        return tensor

    def _check(self) -> None:
        if self.source is not None and self.source._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.host.shape)} that backward needs was modified by an inplace operation "
                "while it was copied to host memory; modify a copy of it"
            )


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's strides if they fill memory without gaps, in whatever order, or else those of a contiguous one."""
    dense = 1
    by_stride = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    for stride, size in by_stride:
        if size > 1:
            if stride != dense:
                return _contiguous_stride(tensor.shape)
            dense *= size
    return tensor.stride()


def _contiguous_stride(shape: torch.Size) -> tuple[int, ...]:
    return tuple(shape[axis + 1 :].numel() for axis in range(len(shape)))


def _synchronize(streams: dict[torch.device, torch.cuda.Stream]) -> None:
    for stream in streams.values():
        stream.synchronize()
