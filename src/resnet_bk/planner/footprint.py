"""From the tensors of a step to what torch's allocator and the driver say of it on a GPU."""

from dataclasses import dataclass

from resnet_bk.imagined import Machine
from resnet_bk.memory.allocator import CachingAllocator
from resnet_bk.planner.recorder import Event
from resnet_bk.planner.trace import Trace

# What cuBLAS takes for each thread that multiplies matrices, forward and backward, through torch's allocator: from
# compute capability 9 on, and before. Source: torch's aten/src/ATen/cuda/CublasHandlePool.cpp.
WORKSPACE_BYTES_FROM_9, WORKSPACE_BYTES = 32 * 2**20, 8_519_680
CUBLAS_THREADS = 2
# What is too small for anybody to follow it: the least that makes no recorded step larger than its prediction.
SMALL_CHANGE = 2**20


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes on a GPU: of tensors, allocated (rounded, with cuBLAS's workspaces), and reserved from the driver."""

    tensor_bytes: int
    allocated_bytes: int
    reserved_bytes: int


def footprint(trace: Trace, *, expandable: bool = False) -> Footprint:
    """Replays a trace on a simulated allocator; ``expandable`` segments are those that ``train`` has under a budget.

    Without a GPU there is no such allocator: all three are the tensors' own bytes.
    """
    if trace.machine.kind != "cuda":
        return Footprint(
            tensor_bytes=trace.peak_bytes, allocated_bytes=trace.peak_bytes, reserved_bytes=trace.peak_bytes
        )
    allocated = _replayed(trace, expandable=expandable, copies_take_time=False).peak_allocated_bytes
    # Memory that is still being copied from is no longer allocated, but not free either.
    reserved = _replayed(trace, expandable=expandable, copies_take_time=True).peak_reserved_bytes
    return Footprint(tensor_bytes=trace.peak_bytes, allocated_bytes=allocated, reserved_bytes=max(allocated, reserved))


def workspace_bytes(machine: Machine) -> int:
    """cuBLAS's, of all threads."""
    return CUBLAS_THREADS * (WORKSPACE_BYTES_FROM_9 if machine.capability >= (9, 0) else WORKSPACE_BYTES)


def _replayed(trace: Trace, *, expandable: bool, copies_take_time: bool) -> CachingAllocator:
    replay = _Replay(CachingAllocator(expandable=expandable), trace.copied_away if copies_take_time else frozenset())
    for event in trace.resident:
        replay.follow(event)
    replay.allocator.allocate(SMALL_CHANGE)
    for _ in range(CUBLAS_THREADS):
        replay.allocator.allocate(workspace_bytes(trace.machine) // CUBLAS_THREADS)
    replay.allocator.reset_peaks()
    for event in trace.events:
        replay.follow(event)
    return replay.allocator


class _Replay:
    """Events on an allocator. What is copied away, as a block's gradients are, goes when the next begin to leave."""

    def __init__(self, allocator: CachingAllocator, copied_away: frozenset[int]) -> None:
        self.allocator, self._copied_away = allocator, copied_away
        self._handles: dict[int, int] = {}
        self._leaving: list[int] = []
        self._more_may_leave = False

    def follow(self, event: Event) -> None:
        if event.num_bytes > 0:
            self._more_may_leave = False
            self._handles[event.tensor] = self.allocator.allocate(event.num_bytes)
            return
        handle = self._handles.pop(event.tensor, None)
        if handle is None:
            return
        if event.tensor in self._copied_away:
            self._leave(handle)
        else:
            self.allocator.free(handle)

    def _leave(self, handle: int) -> None:
        if not self._more_may_leave:
            for gone in self._leaving:
                self.allocator.free(gone)
            self._leaving.clear()
        self._more_may_leave = True
        self._leaving.append(handle)
