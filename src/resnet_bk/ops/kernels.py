"""Triton kernels that are launched from Python."""

from collections.abc import Callable
from typing import Any

import triton

from resnet_bk.imagined import is_imagined


class Kernel:
    """A function compiled by Triton, as ``triton.jit`` makes it; on an imagined machine a launch does nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.compiled: Any = triton.jit(function)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return _nothing if is_imagined() else self.compiled[grid]


def kernel(function: Callable[..., Any]) -> Kernel:
    """Decorates what is launched; what other kernels call is ``triton.jit``'s."""
    return Kernel(function)


def _nothing(*_: Any, **__: Any) -> None:
    """What a launch does where nothing is computed."""
