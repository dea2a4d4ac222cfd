"""What torch's caching allocator would make of a list of allocations and frees, without a GPU."""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import NamedTuple

MIB = 1 << 20
SMALLEST_BLOCK = 512
LARGEST_SMALL = MIB  # requests up to here come from the small pool
SMALL_SEGMENT = 2 * MIB
SHARED_SEGMENT = 20 * MIB  # of which requests below OWN_SEGMENT take their parts
OWN_SEGMENT = 10 * MIB  # requests from here on get a segment for themselves
OWN_SEGMENT_STEP = 2 * MIB
MOST = 1 << 60  # torch refuses an exbibyte whatever the device
NOTHING = 0  # the handle of no bytes, as torch's is a null pointer


class OutOfDeviceMemory(MemoryError):  # noqa: N818  # what Python calls it is MemoryError too
    """The device has no room, even without the cache.

    Attributes:
        wanted_bytes: what was asked of the device, a whole segment, as in torch's own message.
        limit_bytes: what may be reserved at most.
    """

    def __init__(self, wanted_bytes: int, limit_bytes: int, reserved_bytes: int) -> None:
        super().__init__(
            f"{wanted_bytes} bytes more do not fit: {reserved_bytes} bytes are reserved of the {limit_bytes} allowed"
        )
        self.wanted_bytes = wanted_bytes
        self.limit_bytes = limit_bytes


class BlockRange(NamedTuple):
    """A block as ``CachingAllocator.blocks`` lists it; addresses and sizes are in bytes."""

    address: int
    num_bytes: int
    segment: int
    """Address at which the block's segment begins, or of an expandable one the stretch with memory."""
    stream: int
    small: bool
    in_use: bool


class CachingAllocator:
    """Simulates the allocator behind ``torch.cuda``, so that its two peaks can be known before a GPU is there.

    The rules are those of torch 2.11's ``c10/cuda/CUDACachingAllocator.cpp`` (``DeviceCachingAllocator``) with default
    settings. Requests are rounded up to 512 bytes. They take the smallest free block of their stream and pool that
    holds them, and leave the rest of it free if that is worth having; otherwise the device gives a new segment. A
    freed block joins its free neighbours, and its bytes stay reserved until the cache is emptied. ``allocated_bytes``
    counts whole blocks: a rest too small to be split off, up to 1 MiB, counts as allocated, as it does in torch.

    With ``expandable`` it is ``expandable_segments:True``: a segment for each stream and pool, which grows by pages of
    2 MiB (small pool) or 20 MiB. ``limit_bytes`` is ``set_per_process_memory_fraction``: before the device is asked for
    a segment, that segment must fit, or else fit without the cache. An expandable segment is held to the same check, by
    the segment that the request would have had otherwise, and may end above the limit by less than a page.

    Not simulated: blocks that other streams use (``record_stream``: here a free is done at once), private pools of CUDA
    graphs, settings that are off by default (``max_split_size_mb``, ``roundup_power2_divisions``,
    ``garbage_collection_threshold``), the device's own lack of memory, and what never goes through the allocator (the
    CUDA context, NCCL). Addresses of new segments rise, which decides between free blocks of one size; a driver
    may place them otherwise.

    >>> allocator = CachingAllocator()
    >>> handle = allocator.allocate(1000)
    >>> allocator.allocated_bytes, allocator.reserved_bytes
    (1024, 2097152)
    >>> allocator.free(handle)
    >>> allocator.allocated_bytes, allocator.reserved_bytes
    (0, 2097152)
    """

    def __init__(self, *, expandable: bool = False, limit_bytes: int | None = None) -> None:
        if limit_bytes is not None and limit_bytes < 0:
            raise ValueError(f"limit_bytes is {limit_bytes}; give 0 or more, or None for no limit")
        self._expandable = expandable
        self._limit_bytes = limit_bytes
        self._device = _Device()
        self._allocated = _Level()
        self._pools: dict[tuple[int, bool], _Pool] = {}
        self._live: dict[int, _Block] = {}
        self._num_handles = 0

    @property
    def allocated_bytes(self) -> int:
        """Bytes of blocks in use, ``torch.cuda.memory_allocated``."""
        return self._allocated.current

    @property
    def peak_allocated_bytes(self) -> int:
        """The most bytes of blocks in use, ``torch.cuda.max_memory_allocated``."""
        return self._allocated.peak

    @property
    def reserved_bytes(self) -> int:
        """Bytes taken from the device, ``torch.cuda.memory_reserved``."""
        return self._device.reserved.current

    @property
    def peak_reserved_bytes(self) -> int:
        """The most bytes taken from the device, ``torch.cuda.max_memory_reserved``."""
        return self._device.reserved.peak

    def reset_peaks(self) -> None:
        """Starts new peaks from what there is now, ``torch.cuda.reset_peak_memory_stats``."""
        self._allocated.reset_peak()
        self._device.reserved.reset_peak()

    def allocate(self, num_bytes: int, *, stream: int = 0) -> int:
        """A handle for ``num_bytes`` bytes on ``stream``, to be freed with; no bytes take nothing.

        Raises:
            OutOfDeviceMemory: the limit is exceeded even without the cache, which is then empty.
        """
        if num_bytes < 0:
            raise ValueError(f"cannot allocate {num_bytes} bytes; give 0 or more")
        if num_bytes == 0:
            return NOTHING
        if num_bytes >= MOST:
            raise OutOfDeviceMemory(num_bytes, MOST, self.reserved_bytes)
        size = _round_up(num_bytes, SMALLEST_BLOCK)
        pool = self._pool(stream, size <= LARGEST_SMALL)
        block = pool.take(size)
        if block is None:
            self._make_room(_segment_bytes(size))
            block = pool.grow(size)
        pool.use(block, size)
        self._allocated.change(block.size)
        self._num_handles += 1
        self._live[self._num_handles] = block
        return self._num_handles

    def free(self, handle: int) -> None:
        """Gives a block back to the cache, from which its stream may take it at once."""
        if handle == NOTHING:
            return
        block = self._live.pop(handle, None)
        if block is None:
            raise ValueError(f"handle {handle} is not in use: it was freed already, or never given")
        self._allocated.change(-block.size)
        block.pool.put_back(block)

    def empty_cache(self) -> None:
        """Returns to the device what no block in use needs: whole free segments, or whole free pages."""
        for pool in self._pools.values():
            pool.release()

    def blocks(self) -> list[BlockRange]:
        """All blocks, in use and free, by their addresses; together they are the reserved bytes."""
        blocks = [*self._live.values(), *(block for pool in self._pools.values() for block in pool.free_blocks())]
        ranges: list[BlockRange] = []
        segment = 0
        for block in sorted(blocks, key=lambda block: block.address):
            if block.before is None or not block.before.mapped:
                segment = block.address
            pool = block.pool
            ranges.append(BlockRange(block.address, block.size, segment, pool.stream, pool.small, block.in_use))
        return ranges

    def _pool(self, stream: int, small: bool) -> "_Pool":
        pool = self._pools.get((stream, small))
        if pool is None:
            kind = _ExpandablePool if self._expandable else _SegmentPool
            pool = self._pools[stream, small] = kind(self._device, stream, small)
        return pool

    def _make_room(self, wanted_bytes: int) -> None:
        # torch first releases single blocks above max_split_size; that is without limit by default, so there are none.
        if not self._fits(wanted_bytes):
            self.empty_cache()
        if not self._fits(wanted_bytes):
            assert self._limit_bytes is not None
            raise OutOfDeviceMemory(wanted_bytes, self._limit_bytes, self.reserved_bytes)

    def _fits(self, wanted_bytes: int) -> bool:
        return self._limit_bytes is None or self.reserved_bytes + wanted_bytes <= self._limit_bytes


def _round_up(num_bytes: int, step: int) -> int:
    return -(-num_bytes // step) * step


def _segment_bytes(size: int) -> int:
    """What is asked of the device for a block of ``size`` bytes."""
    if size <= LARGEST_SMALL:
        return SMALL_SEGMENT
    return SHARED_SEGMENT if size < OWN_SEGMENT else _round_up(size, OWN_SEGMENT_STEP)


class _Level:
    """A number of bytes, and the most it ever was."""

    __slots__ = ("current", "peak")

    def __init__(self) -> None:
        self.current = 0
        self.peak = 0

    def change(self, num_bytes: int) -> None:
        self.current += num_bytes
        self.peak = max(self.peak, self.current)

    def reset_peak(self) -> None:
        self.peak = self.current


class _Device:
    """What all pools share: the bytes they reserve, and addresses, none of which is given twice."""

    def __init__(self) -> None:
        self.reserved = _Level()
        self._end = 0

    def new_addresses(self, num_bytes: int, alignment: int) -> int:
        address = _round_up(self._end, alignment)
        self._end = address + num_bytes
        return address


@dataclass(slots=True, eq=False)
class _Block:
    """Some bytes of a segment; ``before`` and ``after`` are its neighbours there, and a segment is a chain of them."""

    address: int
    size: int
    pool: "_Pool"
    in_use: bool = False
    mapped: bool = True
    """False where an expandable segment has addresses but no memory."""
    before: "_Block | None" = None
    after: "_Block | None" = None

    @property
    def is_whole_segment(self) -> bool:
        return self.before is None and self.after is None

    def cut(self, size: int) -> "_Block":
        """Shortens the block to ``size``; the rest is a new block behind it, free, and mapped as this one is."""
        rest = _Block(self.address + size, self.size - size, self.pool, False, self.mapped, self, self.after)
        if self.after is not None:
            self.after.before = rest
        self.after = rest
        self.size = size
        return rest

    def absorb(self, neighbour: "_Block") -> None:
        """Takes over a neighbour's bytes and its place in the chain."""
        if neighbour is self.before:
            self.address, self.before = neighbour.address, neighbour.before
            if self.before is not None:
                self.before.after = self
        else:
            self.after = neighbour.after
            if self.after is not None:
                self.after.before = self
        self.size += neighbour.size


class _Pool(ABC):
    """Free blocks of one stream and one kind, small or large, by size and then address.

    torch has one set for all streams, with the stream first in the order, which comes to the same.
    """

    def __init__(self, device: _Device, stream: int, small: bool) -> None:
        self.stream = stream
        self.small = small
        self._device = device
        # No two have the same size and address, so that comparing never comes to the blocks.
        self._free: list[tuple[int, int, _Block]] = []

    @abstractmethod
    def take(self, size: int) -> _Block | None:
        """The free block that suits ``size`` best, removed from the free ones; None if there is none."""

    @abstractmethod
    def grow(self, size: int) -> _Block:
        """A block of at least ``size`` from memory that the device gives; it is not among the free ones."""

    @abstractmethod
    def release(self) -> None:
        """Returns to the device what can be returned."""

    @abstractmethod
    def _splits(self, rest: int) -> bool:
        """Whether ``rest`` bytes that a request does not need are split off its block."""

    def free_blocks(self) -> list[_Block]:
        return [block for _, _, block in self._free]

    def use(self, block: _Block, size: int) -> None:
        """Puts a block to use for a request of ``size`` bytes, without the rest if that is worth having."""
        if self._splits(block.size - size):
            self._keep(block.cut(size))
        block.in_use = True

    def put_back(self, block: _Block) -> None:
        block.in_use = False
        self._merge(block)
        self._keep(block)

    def _merge(self, block: _Block) -> None:
        """Joins a block with free neighbours that are, as it is, mapped or not."""
        for neighbour in (block.before, block.after):
            if neighbour is not None and not neighbour.in_use and neighbour.mapped == block.mapped:
                self._forget(neighbour)
                block.absorb(neighbour)

    def _keep(self, block: _Block) -> None:
        insort(self._free, (block.size, block.address, block))

    def _forget(self, block: _Block) -> None:
        place = bisect_left(self._free, (block.size, block.address))
        assert self._free[place][2] is block
        del self._free[place]


class _SegmentPool(_Pool):
    """Segments of fixed size, each of them returned to the device when all of it is free."""

    def take(self, size: int) -> _Block | None:
        place = bisect_left(self._free, (size,))
        return self._free.pop(place)[2] if place < len(self._free) else None

    def grow(self, size: int) -> _Block:
        num_bytes = _segment_bytes(size)
        self._device.reserved.change(num_bytes)
        return _Block(self._device.new_addresses(num_bytes, SMALLEST_BLOCK), num_bytes, self)

    def release(self) -> None:
        self._device.reserved.change(-sum(size for size, _, block in self._free if block.is_whole_segment))
        self._free = [entry for entry in self._free if not entry[2].is_whole_segment]

    def _splits(self, rest: int) -> bool:
        return rest >= SMALLEST_BLOCK if self.small else rest > LARGEST_SMALL


class _ExpandablePool(_Pool):
    """A segment of addresses without end, of which pages are mapped from the lowest where there is room.

    Its chain is blocks in use, free ones, and unmapped ones, which begin and end where pages do. The last of them is
    unmapped. torch gives up the addresses of a segment without memory and takes others at need, which comes to the
    same; it ends a segment at 9/8 of the device's memory and starts another behind it, which is not simulated.
    """

    _SEGMENT_PAGES = 1 << 40  # more than any request that is not refused

    def __init__(self, device: _Device, stream: int, small: bool) -> None:
        super().__init__(device, stream, small)
        self._page = SMALL_SEGMENT if small else SHARED_SEGMENT
        self._unmapped: list[tuple[int, _Block]] = []

    def take(self, size: int) -> _Block | None:
        place = bisect_left(self._free, (size,))
        if place == len(self._free):
            return None
        # A block that can grow counts with what it can grow to, so that a larger one that cannot is used up first.
        while place + 1 < len(self._free) and self._room(place + 1) < self._room(place):
            place += 1
        return self._free.pop(place)[2]

    def grow(self, size: int) -> _Block:
        block = self._lowest_room(size)
        if not block.mapped:
            self._map(block, min(size, block.size))
        while block.size < size:
            unmapped = block.after
            assert unmapped is not None and not unmapped.mapped
            self._map(unmapped, min(size - block.size, unmapped.size))
            block = unmapped  # which is now the free block and the new pages together
        self._forget(block)
        return block

    def release(self) -> None:
        for block in self.free_blocks():
            self._unmap(block)

    def _splits(self, rest: int) -> bool:
        return rest >= SMALLEST_BLOCK

    def _room(self, place: int) -> int:
        size, _, block = self._free[place]
        return size + (block.after.size if block.after is not None and not block.after.mapped else 0)

    def _lowest_room(self, size: int) -> _Block:
        """The first block of a run of free and unmapped ones with ``size`` bytes together, at the lowest address."""
        for _, unmapped in self._unmapped:
            before = unmapped.before
            first = unmapped if before is None or before.in_use else before
            if _has_room(first, size):
                return first
        return self._new_segment()

    def _new_segment(self) -> _Block:
        num_bytes = self._page * self._SEGMENT_PAGES
        block = _Block(self._device.new_addresses(num_bytes, self._page), num_bytes, self, mapped=False)
        self._keep(block)
        return block

    def _map(self, block: _Block, num_bytes: int) -> None:
        """Gives memory to the first pages of an unmapped block, which becomes one with the free blocks beside it."""
        num_bytes = _round_up(num_bytes, self._page)
        self._forget(block)
        if num_bytes < block.size:
            self._keep(block.cut(num_bytes))
        block.mapped = True
        self._merge(block)
        self._keep(block)
        self._device.reserved.change(num_bytes)

    def _unmap(self, block: _Block) -> None:
        """Takes the memory from all pages that lie wholly in a free block; what is beside them stays free."""
        start = _round_up(block.address, self._page)
        end = (block.address + block.size) // self._page * self._page
        if start >= end:
            return
        self._forget(block)
        if start > block.address:
            whole = block.cut(start - block.address)
            self._keep(block)
            block = whole
        if end < block.address + block.size:
            self._keep(block.cut(end - block.address))
        block.mapped = False
        self._merge(block)
        self._keep(block)
        self._device.reserved.change(start - end)

    def _keep(self, block: _Block) -> None:
        if block.mapped:
            super()._keep(block)
        else:
            insort(self._unmapped, (block.address, block))

    def _forget(self, block: _Block) -> None:
        if block.mapped:
            super()._forget(block)
        else:
            place = bisect_left(self._unmapped, (block.address,))
            assert self._unmapped[place][1] is block
            del self._unmapped[place]


def _has_room(block: _Block | None, size: int) -> bool:
    while size > 0 and block is not None and not block.in_use:
        size -= block.size
        block = block.after
    return size <= 0
