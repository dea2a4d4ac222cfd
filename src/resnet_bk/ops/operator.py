"""torch operators whose bodies a tracker of memory may look into."""

from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

# By overload: what the operator runs. To torch's modes an operator is one call, whatever it allocates inside.
BODIES: dict[Any, Callable[..., Any]] = {}

# Backends that numba compiles: they work in memory that no tensor has, and allocate next to nothing but their results.
OPAQUE_BACKENDS = ("cpu",)


def operator(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """``torch.library.custom_op`` of a function that writes to none of its arguments."""

    def register(body: Callable[..., Any]) -> CustomOpDef:
        made = torch.library.custom_op(name, mutates_args=())(body)
        namespace, _, own = name.partition("::")
        BODIES[getattr(getattr(torch.ops, namespace), own).default] = body
        return made

    return register


def body_of(overload: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """What one of our operators runs in torch, called with ``args``; None for anything else."""
    body = BODIES.get(overload)
    backend = args[-1] if args and isinstance(args[-1], str) else None
    return None if backend in OPAQUE_BACKENDS else body
