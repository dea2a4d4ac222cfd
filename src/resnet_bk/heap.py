"""Memory that a CPU has freed stays with the process, for the tensors to come, in large pages where there are any.

By default the C library hands every large block that is freed back to the system, and the next one of that size is
taken page by page anew, whatever the model. Kept, a block is used again at once (benchmarks/freed_memory.py measures
both). The process holds its peak until it ends, and now and then a large block more, where one that is kept is too
small by a cutting: with ``GLIBC_TUNABLES=glibc.malloc.tcache_count=0`` in its environment no cuttings are set aside.

On Linux the heap takes addresses for most of the machine's memory at once, none of it touched, and asks the system for
pages of 2 MiB there: whoever reads a tensor then waits less to learn where its next page is.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch

# Names and numbers are those of <malloc.h>.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
NEVER = -1
GROWTH = 64 << 20  # bytes by which the heap grows at once
# Of blocks that begin at multiples of 64 bytes, sizes of what is cut off, and how many of each a thread sets aside.
CUTTINGS, SET_ASIDE = range(24, 121, 16), 7

_kept = False


def keep_freed_memory(device: "torch.device") -> bool:
    """Whether this process, which computes on ``device``, keeps what it frees from here on.

    False on a GPU, whose tensors torch keeps by itself and whose host may need the room, and with a C library other
    than glibc. Calling it again changes nothing. It is of the whole process and cannot be undone.
    """
    global _kept  # noqa: PLW0603  (what this process has told its C library)
    if device.type == "cpu" and not _kept:
        _kept = _tell_glibc()
    return _kept


def freed_memory() -> str:
    """What becomes of memory that is freed: ``kept`` or ``returned``, for whoever reads a figure."""
    return "kept" if _kept else "returned"


def give_back_freed_memory() -> None:
    """Returns what is kept at the moment, so that what a process takes from here on shows in what it holds."""
    if _kept:
        library = ctypes.CDLL(None)
        library.malloc_trim(0)
        _ask_for_large_pages(library)


def prefer_large_pages(address: int, num_bytes: int) -> None:
    """Asks for pages of 2 MiB where this memory has not been touched yet; the system may have none, or none to ask."""
    advise = _madvise()
    if advise is not None:
        begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(begin, num_bytes - (begin - address), mmap.MADV_HUGEPAGE)


@lru_cache(maxsize=1)
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's, where there are large pages to ask for (Linux)."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return cast(Callable[[int, int, int], int], function)


def _tell_glibc() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  (another C library's mallopt does nothing)
    except (OSError, AttributeError):
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER, M_TOP_PAD: GROWTH}
    told = all(library.mallopt(name, value) == 1 for name, value in settings.items())
    if told:
        _fill_small_places(library)
        _ask_for_large_pages(library)
    return told


def _fill_small_places(library: ctypes.CDLL) -> None:
    """An aligned block is cut out of a slightly larger one, and a thread sets the first few cuttings of a size aside
    instead of joining them to their neighbours: each keeps a large block that was freed from being large enough."""
    malloc, free = _malloc_and_free(library)
    for block in [malloc(size) for size in CUTTINGS for _ in range(SET_ASIDE)]:
        free(block)


def _ask_for_large_pages(library: ctypes.CDLL) -> None:
    """For what the heap takes next: it grows once by as much as it may well come to need, for a hint is of addresses
    that it has. Where the system refuses either, or a limit counts addresses, pages are small and all else is the same.
    """
    import resource  # not everywhere is there one

    if any(
        resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    ):
        return
    size = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 8 * 7
    while not _is_promised(size + 2 * GROWTH):
        size //= 2
    malloc, free = _malloc_and_free(library)
    block = malloc(size)
    if block is None:
        return
    free(block)  # to the heap's end, where it came from
    library.sbrk.restype, library.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    end: int = library.sbrk(0)
    if block < end:  # else it came from elsewhere
        prefer_large_pages(block, end - block)


def _is_promised(num_bytes: int) -> bool:
    """Whether the system would give so many addresses. Asked of malloc, a refusal would have it leave its heap."""
    try:
        mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return num_bytes <= 2 * GROWTH  # as little as that is malloc's own business
    return True


def _malloc_and_free(library: ctypes.CDLL) -> tuple[Callable[[int], int | None], Callable[[int | None], None]]:
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    return library.malloc, library.free
