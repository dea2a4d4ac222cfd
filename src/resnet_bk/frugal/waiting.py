"""Tensors that wait in host memory, each under its name, until they are needed on the device again."""

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_bk.frugal.driver import side_stream
from resnet_bk.frugal.host import host_empty
from resnet_bk.imagined import kind_of

# Copies to the host that may be under way at once. What they read stays on the device until they have ended.
UNDER_WAY = 2


class WaitingTensors:
    """Takes tensors to host memory and brings them back one ahead of their use, beside what the device computes.

    Places in host memory are kept, for the next tensor of the same name, shape and type. On a CPU everything is as on
    a GPU, without streams.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._down, self._up = side_stream(device), side_stream(device)
        self._places: dict[Hashable, Tensor] = {}
        self._names: dict[Hashable, tuple[Hashable, Any]] = {}  # each one's place, and the end of its copy there
        self._leaving: deque[tuple[Any, Tensor]] = deque()
        self._latest: tuple[Hashable, Tensor] | None = None

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory, in use or kept for the next step."""
        return sum(place.nbytes for place in self._places.values())

    @torch.no_grad()
    def put(self, name: Hashable, tensor: Tensor, *, place: Hashable = None) -> None:
        """Has a tensor wait; it must not be changed any more. Names that share a ``place`` follow each other there."""
        tensor = tensor.detach()
        key = name if place is None else place
        there = self._place(key, tensor)
        ended = None
        if self._down is None:
            there.copy_(tensor)
        else:
            self._down.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._down):
                there.copy_(tensor, non_blocking=True)
                ended = self._down.record_event()
        if kind_of(self.device) == "cuda":
            self._leaving.append((ended, tensor))
            # Whoever asks for work faster than it is done would fill the device with what is yet to leave.
            while len(self._leaving) > UNDER_WAY:
                self._first_has_left()
        self._names[name] = key, ended
        self._latest = name, tensor

    def each(self, names: Sequence[Sequence[Hashable]]) -> Iterator[list[Tensor]]:
        """The tensors of each group of names, on the device, each in memory of its own but for the one put last.

        The next group is fetched while one is used; those of its names that are not there yet, when their turn comes.
        """
        ahead: list[tuple[Tensor, Any] | None] = [None] * len(names[0]) if names else []
        for number, group in enumerate(names):
            fetched = [self._fetch(name) if early is None else early for name, early in zip(group, ahead, strict=True)]
            following = names[number + 1] if number + 1 < len(names) else []
            ahead = [self._fetch(name) if name in self._names else None for name in following]
            tensors = [self._arrived(*pair) for pair in fetched]
            del fetched
            yield tensors
            del tensors

    def end(self) -> None:
        """Forgets what waits, once no copy is under way. Memory on the host is kept."""
        while self._leaving:
            self._first_has_left()
        self._names.clear()
        self._latest = None

    def _first_has_left(self) -> None:
        ended, _ = self._leaving.popleft()
        if ended is not None:
            ended.synchronize()

    def _place(self, key: Hashable, tensor: Tensor) -> Tensor:
        there = self._places.get(key)
        if there is None or there.shape != tensor.shape or there.dtype != tensor.dtype:
            self._places.pop(key, None)
            there = None  # before the new one: never both
            there = self._places[key] = host_empty(*tensor.shape, dtype=tensor.dtype)
        return there

    def _fetch(self, name: Hashable) -> tuple[Tensor, Any]:
        """The tensor on the device, and the end of its copy there."""
        if self._latest is not None and self._latest[0] == name:
            return self._latest[1], None
        key, left = self._names[name]
        there = self._places[key]
        if self._up is None:
            return there.clone(), None
        # Memory of the computing stream, which the copy waits for: it may have been something else just before.
        here = torch.empty(there.shape, dtype=there.dtype, device=self.device)
        self._up.wait_stream(torch.cuda.current_stream(self.device))
        self._up.wait_event(left)
        with torch.cuda.stream(self._up):
            here.copy_(there, non_blocking=True)
            return here, self._up.record_event()

    def _arrived(self, tensor: Tensor, arrived: Any) -> Tensor:
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)
        return tensor
