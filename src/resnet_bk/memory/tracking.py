"""Bytes of live tensors, on any device, by watching every storage come and go."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from resnet_bk.frugal.gradients import HostGradient
from resnet_bk.frugal.host import is_host_memory
from resnet_bk.frugal.local import local_tensor
from resnet_bk.ops.operator import body_of


class TensorTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the bytes of tensors made while it is active, and the most there ever were at once.

    Storages are counted, so views cost nothing twice, and in-place work nothing at all; a storage counts until it is
    freed, also when only autograd holds it. Tensors that were there before count if ``include`` is told of them. Memory
    of ``frugal.host``, which waits on the host for a device, is counted apart: ``host_bytes``, ``peak_host_bytes``.

    It looks into our own operators, but for those that numba compiles. What torch's allocate and free inside themselves
    is not seen, nor is an allocator's rounding, nor what another thread allocates. While anybody watches so, autograd
    adds up the gradients of a tensor with two uses in a new tensor, and in place otherwise: of a tied matrix there may
    be one gradient more.

    >>> with TensorTracker() as tracker:
    ...     x = torch.zeros(1000)
    >>> tracker.peak_bytes
    4000
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live: dict[int, tuple[int, bool, Any]] = {}
        self.current_bytes = 0
        self.peak_bytes = 0
        self.host_bytes = 0
        self.peak_host_bytes = 0

    def include(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that exist already: a model's parameters, an optimizer's moments."""
        for tensor in tensors:
            self._track(local_tensor(tensor))

    def reset_peak(self) -> None:
        """Starts new peaks from what is live now."""
        self.peak_bytes, self.peak_host_bytes = self.current_bytes, self.host_bytes

    @contextmanager
    def hearing_of_resizes(self) -> Iterator[None]:
        """Meanwhile memory counts that is given back, or taken again, under a tensor that stays.

        So FSDP2 does with gathered weights, by no operator that a mode would hear of.
        """
        resize = torch.UntypedStorage.resize_

        def heard(storage: Any, num_bytes: int) -> Any:
            result = resize(storage, num_bytes)
            self._resized(storage._cdata, num_bytes)
            return result

        torch.UntypedStorage.resize_ = heard  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    def _resized(self, key: int, num_bytes: int) -> None:
        known = self._live.get(key)
        if known is None or known[0] == num_bytes:
            return
        before, on_host, reference = known
        self._live[key] = (num_bytes, on_host, reference)
        self._count(key, num_bytes - before, on_host)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # what it does with this rank's part comes here again
        result = self._call(func, args, kwargs or {})
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor) and not isinstance(
                leaf, HostGradient
            ):  # whose numbers are a tensor's elsewhere
                self._track(leaf)
        return result

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inside = body_of(func, args) or _parts_of(func)
        if inside is None:
            return func(*args, **kwargs)
        with self:
            return inside(*args, **kwargs)

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        known = self._live.get(key)
        if known is not None and known[0] == num_bytes:
            return
        # A storage that was resized in place is the same one with another size.
        reference = known[2] if known else weakref.ref(storage, partial(self._freed, key))
        on_host = known[1] if known else is_host_memory(tensor)
        self._live[key] = (num_bytes, on_host, reference)
        self._count(key, num_bytes - (known[0] if known else 0), on_host)

    def _freed(self, key: int, _reference: Any) -> None:
        num_bytes, on_host, _ = self._live.pop(key)
        self._count(key, -num_bytes, on_host)

    def _count(self, _key: int, num_bytes: int, on_host: bool) -> None:
        if on_host:
            self.host_bytes += num_bytes
            self.peak_host_bytes = max(self.peak_host_bytes, self.host_bytes)
        else:
            self.current_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.current_bytes)


@cache
def _parts_of(func: Any) -> Any:
    """What an operator that is made of others calls; None for all that have kernels of their own."""
    torchs = isinstance(func, OpOverload) and func.namespace == "aten"
    return func.decompose if torchs and func._can_decompose() else None


def training_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What outlives a step: parameters, buffers, gradients and the optimizer's state."""
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return [*parameters, *model.buffers(), *gradients, *state]
