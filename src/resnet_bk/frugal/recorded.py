"""Passes of blocks recorded once as CUDA graphs, and replayed for all blocks that are alike.

A block's pass is a hundred kernels and more, and where a piece of a batch is small, asking for them one by one takes
longer than they do. Blocks whose weights come and go compute in the same two places, one after the other: what was
recorded of one block there is what every block like it would ask for.

What a recorded pass reads and leaves is always in the same memory, its *rooms*; all passes share them, and a pool for
what they need in between. On a CPU a pass is computed again each time it is replayed, from and into the same rooms.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_bk.frugal.driver import side_stream
from resnet_bk.imagined import recording

# From what is in the rooms to the results.
Pass = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class RecordedPasses:
    """Runs passes and remembers them by a key, which says all that a pass depends on but what is in the rooms.

    A pass must have been computed before, on as much, so that kernels are compiled; it must not draw random numbers or
    wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = side_stream(device)
        self._rooms: dict[Hashable, Tensor] = {}
        self._recorded: dict[Hashable, tuple[Any, list[Tensor]]] = {}
        self._pool: Any = None

    @torch.no_grad()
    def run(self, key: Hashable, body: Pass, given: Sequence[Tensor]) -> list[Tensor]:
        """The results of ``body`` of what is ``given``, in memory of their own.

        Raises:
            torch.OutOfMemoryError: there is no room to record it; nothing has been computed.
        """
        rooms = [self._room("given", number, tensor) for number, tensor in enumerate(given)]
        for room, tensor in zip(rooms, given, strict=True):
            room.copy_(tensor)
        if self._stream is None:
            with recording():
                left = self._leave(body(rooms))
        else:
            if key not in self._recorded:
                self._recorded[key] = self._record(body, rooms)
            graph, left = self._recorded[key]
            graph.replay()
        return [room.clone() for room in left]

    def forget(self) -> None:
        """Gives all memory back."""
        self._recorded.clear()
        self._rooms.clear()
        self._pool = None

    def _record(self, body: Pass, rooms: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads, as the optimizer's, go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            left = self._leave(body(rooms))
        return graph, left

    def _leave(self, results: Sequence[Tensor]) -> list[Tensor]:
        rooms = [self._room("left", number, tensor) for number, tensor in enumerate(results)]
        for room, tensor in zip(rooms, results, strict=True):
            room.copy_(tensor)
        return rooms

    def _room(self, use: str, number: int, like: Tensor) -> Tensor:
        key = (use, number, like.shape, like.dtype)
        if key not in self._rooms:
            self._rooms[key] = torch.empty_like(like, memory_format=torch.contiguous_format)
        return self._rooms[key]
