"""A machine that a training step is imagined on, so that it can be planned where there is none.

Inside ``imagining`` tensors are torch's fake ones, which have shapes and no numbers. What code chooses by device it
chooses as on that machine, kernels are not launched, and what other threads would do is done at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What code may ask of a device: ``cpu`` or ``cuda``, and the latter's compute capability and number of
    multiprocessors (0 where it is not known)."""

    kind: str
    capability: tuple[int, int] = (0, 0)
    multiprocessors: int = 0


_machines: list[Machine] = []
_listeners: list[Callable[[Tensor], None]] = []
_recordings: list[None] = []


@contextmanager
def imagining(machine: Machine) -> Iterator[None]:
    """Has this process behave as on ``machine``, with fake tensors. Not for several threads at once."""
    _machines.append(machine)
    try:
        yield
    finally:
        _machines.pop()


@contextmanager
def hearing_of_copies(listener: Callable[[Tensor], None]) -> Iterator[None]:
    """Has ``listener`` told of each tensor that is copied away beside what the device computes.

    Its memory is not free before the copy has ended, however early nobody else needs it any more.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.pop()


def is_copied_away(tensor: Tensor) -> None:
    """Tells whoever listens, on an imagined machine."""
    if _machines and _listeners:
        _listeners[-1](tensor)


@contextmanager
def recording() -> Iterator[None]:
    """What is allocated meanwhile is in the memory of CUDA graphs, which nobody else gets: an imagined machine asks."""
    _recordings.append(None)
    try:
        yield
    finally:
        _recordings.pop()


def is_recorded() -> bool:
    """Whether what is done at the moment is recorded."""
    return bool(_recordings)


def is_imagined() -> bool:
    """Whether nothing is computed at the moment."""
    return bool(_machines)


def kind_of(device: torch.device) -> str:
    """``device.type``, or that of the machine which is imagined."""
    return _machines[-1].kind if _machines else device.type


def multiprocessors_of_imagined() -> int:
    """Of the machine which is imagined; 0 where they are not known."""
    return _machines[-1].multiprocessors if _machines else 0


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, or of the machine which is imagined."""
    return _machines[-1].capability if _machines else torch.cuda.get_device_capability(device)
