"""Host memory for what does not live on the device: pinned to the byte where there is a GPU, and marked as such.

torch's own allocator of pinned memory rounds a request up to a power of two, which can double it. Here pages of the
operating system are registered with the driver instead.
"""

import mmap
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from resnet_bk.imagined import is_imagined

ALIGNMENT = 64  # bytes: a cache line, and more than any vector instruction asks for

# Storages that were made here, by address of the C++ object. On a machine without a GPU they are what would not be on
# one: a tracker of device memory leaves them out.
_made_here: dict[int, weakref.ref[torch.UntypedStorage]] = {}
# While it is so, a tensor that appears is one of these, before it can be entered there.
_being_made: list[bool] = []


def host_empty(*size: int, dtype: torch.dtype, pinned: bool | None = None) -> Tensor:
    """A tensor in host memory, uninitialised.

    ``pinned`` registers exactly its bytes with the driver, so that copies to and from a GPU need not wait; None means
    where there is a GPU.

    Raises:
        RuntimeError: the driver refused to register it (a limit on locked memory, say).
    """
    if is_imagined():
        return _imagined_empty(size, dtype)
    num_bytes = dtype.itemsize * torch.Size(size).numel()
    pin = num_bytes > 0 and (torch.cuda.is_available() if pinned is None else pinned)
    if pin:
        # Pages of its own: the driver refuses a page that it knows already.
        storage = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8).untyped_storage()
        _register(storage)
    else:
        storage = torch.UntypedStorage(num_bytes)  # type: ignore[no-untyped-call]
    # Marked before there is a tensor: whoever watches tensors must know at once.
    _mark(storage)
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage).view(size)


def host_arena(shapes: Sequence[Sequence[int]], dtype: torch.dtype, *, pinned: bool | None = None) -> list[Tensor]:
    """Tensors of these shapes side by side in one piece of host memory, each ``ALIGNMENT`` bytes apart or less."""
    step = ALIGNMENT // dtype.itemsize
    numels = [torch.Size(shape).numel() for shape in shapes]
    rooms = [-(-numel // step) * step for numel in numels]
    parts: tuple[Tensor, ...] = torch.split(host_empty(sum(rooms), dtype=dtype, pinned=pinned), rooms)
    return [part[:numel].view(torch.Size(shape)) for part, numel, shape in zip(parts, numels, shapes, strict=True)]


def is_host_memory(tensor: Tensor) -> bool:
    """Whether the tensor's memory was made here, which says that it would not be on the device."""
    return bool(_being_made) or tensor.untyped_storage()._cdata in _made_here


def _imagined_empty(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    _being_made.append(True)
    try:
        tensor = torch.empty(*size, dtype=dtype)
    finally:
        _being_made.pop()
    _mark(tensor.untyped_storage())
    return tensor


def _mark(storage: torch.UntypedStorage) -> None:
    key = storage._cdata
    _made_here[key] = weakref.ref(storage, partial(_forget, key))


def _forget(key: int, _reference: object) -> None:
    del _made_here[key]


def _register(storage: torch.UntypedStorage) -> None:
    address = storage.data_ptr()
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = runtime.cudaHostRegister(address, storage.nbytes(), 0)
    if int(error) != 0:
        raise RuntimeError(
            f"could not pin {storage.nbytes():,} bytes of host memory ({error}); raise `ulimit -l`, or use less"
        )
    # Weak references are called before the memory goes.
    weakref.finalize(storage, runtime.cudaHostUnregister, address)
