"""From the tensors of a step to what torch's allocator and the driver say of it on a GPU."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from resnet_bk.imagined import Machine
from resnet_bk.memory.allocator import CachingAllocator
from resnet_bk.planner.recorder import GRAPHS, Event
from resnet_bk.planner.trace import Trace
from resnet_bk.training.budget import SMALL_CUBLAS_BYTES

# What cuBLAS takes for each thread that multiplies matrices, forward and backward, through torch's allocator: from
# compute capability 9 on, and before or where it is told to. Source: torch's aten/src/ATen/cuda/CublasHandlePool.cpp.
WORKSPACE_BYTES_FROM_9, WORKSPACE_BYTES = 32 * 2**20, SMALL_CUBLAS_BYTES
CUBLAS_THREADS = 2
# What cuBLASLt, which products with a bias go to, takes besides for each thread that does some. Source: torch's
# aten/src/ATen/cuda/CUDABlas.cpp; measured on an H100 (benchmarks/results/gpu/planner.json: gpt2 and gpt_neox).
BIASED_PRODUCTS_BYTES = 2**20
# What nobody can follow: tensors too small, and which blocks have a rest of up to 1 MiB that is not split off. With it
# no recorded step is larger than its prediction; the closest had 844 KiB.
SMALL_CHANGE = 7 * 2**17
# What ranks exchange waits on streams of its own, and how long is a matter of their speed: on two H100s a step had
# 0.05% more than is replayed here (benchmarks/results/gpu/sharded.json).
SHARE_OF_EXCHANGE = 1 / 1000
# Of the most that may be reserved, what usually is. From 94% to 101% were seen, and once 90%
# (benchmarks/results/gpu/planner-budgets.json and frugal.json).
USUALLY_RESERVED = 0.975


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes on a GPU: of tensors, allocated (rounded, with cuBLAS's workspaces), and reserved from the driver.

    Memory that is still being copied from is no longer allocated, but not free either, and how long is a matter of the
    machine. ``most_reserved_bytes`` are of copies that take as long as they may: a budget has to have room for them.
    ``reserved_bytes`` are what is expected, between them and copies that take no time.
    """

    tensor_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    most_reserved_bytes: int


def footprint(trace: Trace, *, expandable: bool = False, small_workspaces: bool = False) -> Footprint:
    """Replays a trace on a simulated allocator; ``expandable`` segments and ``small_workspaces`` are those that
    ``train`` has under a budget, the latter cuBLAS's.

    Without a GPU there is no such allocator: all are the tensors' own bytes.
    """
    own = trace.peak_bytes
    if trace.machine.kind != "cuda":
        return Footprint(tensor_bytes=own, allocated_bytes=own, reserved_bytes=own, most_reserved_bytes=own)
    libraries = _of_libraries(trace, small_workspaces)
    at_once, late = (
        _replayed(trace, libraries, expandable=expandable, copies_take_time=slow) for slow in (False, True)
    )
    allocated = at_once.peak_allocated_bytes
    if any(origin.stream > 0 for origin in trace.origins):
        allocated += round(SHARE_OF_EXCHANGE * allocated)
    least, most = sorted(max(allocated, replay.peak_reserved_bytes) for replay in (at_once, late))
    return Footprint(
        tensor_bytes=own,
        allocated_bytes=allocated,
        reserved_bytes=max(least, round(USUALLY_RESERVED * most)),
        most_reserved_bytes=most,
    )


def larger(one: Footprint, other: Footprint) -> Footprint:
    """The larger of both, byte count by byte count."""
    return Footprint(**{name: max(size, getattr(other, name)) for name, size in asdict(one).items()})


def workspace_bytes(machine: Machine, *, small: bool = False) -> int:
    """cuBLAS's, of all threads; ``small`` ones are smaller only where they are large."""
    large = machine.capability >= (9, 0) and not small
    return CUBLAS_THREADS * (WORKSPACE_BYTES_FROM_9 if large else WORKSPACE_BYTES)


def _of_libraries(trace: Trace, small_workspaces: bool) -> list[int]:
    products = [workspace_bytes(trace.machine, small=small_workspaces) // CUBLAS_THREADS] * CUBLAS_THREADS
    return products + [BIASED_PRODUCTS_BYTES] * trace.threads_of_biased_products


def _replayed(trace: Trace, libraries: list[int], *, expandable: bool, copies_take_time: bool) -> CachingAllocator:
    """The step after the first one. Where moments are on the device, the first has none yet, and the segments that it
    leaves are not those that a step with moments would ask for."""
    copied_away: frozenset[int] = trace.copied_away if copies_take_time else frozenset()
    replay = _Replay(CachingAllocator(expandable=expandable), trace, copied_away)
    # Graphs are recorded on a stream of their own, for which libraries take as much again.
    for stream in (0, GRAPHS) if any(origin.stream == GRAPHS for origin in trace.origins) else (0,):
        for num_bytes in (SMALL_CHANGE, *libraries):
            replay.allocator.allocate(num_bytes, stream=stream)
    moments = [event for event in trace.resident if trace.kinds.get(event.tensor) == "optimizer"]
    if moments:
        replay.first_step(trace, moments)
    else:
        replay.follow(trace.resident)
    replay.allocator.reset_peaks()
    replay.follow(trace.events)
    return replay.allocator


class _Replay:
    """Events on an allocator. What is copied away, as a block's gradients are, goes when the next begin to leave."""

    def __init__(self, allocator: CachingAllocator, trace: Trace, copied_away: frozenset[int]) -> None:
        self.allocator, self._copied_away = allocator, copied_away
        self._origins = trace.origins
        self._handles: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._leaving: list[int] = []
        self._more_may_leave = False

    def follow(self, events: Iterable[Event]) -> None:
        """Tensors come, or go if they are there."""
        for event in events:
            if event.num_bytes > 0:
                self._more_may_leave = False
                self._handles[event.tensor] = self._allocate(event)
                self._sizes[event.tensor] = event.num_bytes
            elif event.tensor in self._handles:
                handle = self._handles.pop(event.tensor)
                if event.tensor in self._copied_away:
                    self._leave(handle)
                else:
                    self.allocator.free(handle)

    def first_step(self, trace: Trace, moments: list[Event]) -> None:
        """Weights, a step, and the moments that come at its end; the gradients that it leaves are the resident ones."""
        freed = {event.tensor for event in trace.events if event.num_bytes < 0}
        gradients = [event for event in trace.resident if event.tensor in freed]
        apart = {event.tensor for event in (*gradients, *moments)}
        self.follow(event for event in trace.resident if event.tensor not in apart)
        before = set(self._handles)
        self.follow(trace.events)
        self._rename(before, gradients)
        self.follow(moments)

    def _rename(self, before: set[int], known: list[Event]) -> None:
        """What a step has left beyond ``before`` becomes what is known to be left, size by size; the rest goes."""
        left: dict[int, list[int]] = {}
        for tensor in [tensor for tensor in self._handles if tensor not in before]:
            left.setdefault(self._sizes[tensor], []).append(self._handles.pop(tensor))
        for event in known:
            handles = left.get(event.num_bytes)
            self._handles[event.tensor] = handles.pop(0) if handles else self._allocate(event)
        for handles in left.values():
            for handle in handles:
                self.allocator.free(handle)

    def _allocate(self, event: Event) -> int:
        return self.allocator.allocate(event.num_bytes, stream=self._origins[event.tensor].stream)

    def _leave(self, handle: int) -> None:
        if not self._more_may_leave:
            for gone in self._leaving:
                self.allocator.free(gone)
            self._leaving.clear()
        self._more_may_leave = True
        self._leaving.append(handle)
