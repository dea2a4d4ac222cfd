"""The simulated caching allocator against cases worked out by hand, and against a plain account of the same rules."""

import doctest
import random
import time
from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from resnet_bk.memory import allocator as allocator_module
from resnet_bk.memory.allocator import CachingAllocator, OutOfDeviceMemory

KIB, MIB = 1 << 10, 1 << 20
BOTH = pytest.mark.parametrize("expandable", [False, True], ids=["segments", "expandable"])


def layout(allocator):
    """Blocks as (offset from the first, bytes, in use), in MiB."""
    blocks = allocator.blocks()
    return [((b.address - blocks[0].address) / MIB, b.num_bytes / MIB, b.in_use) for b in blocks]


def levels(allocator):
    """Allocated and reserved, in MiB."""
    return allocator.allocated_bytes / MIB, allocator.reserved_bytes / MIB


# What a request takes


@BOTH
@pytest.mark.parametrize(("num_bytes", "taken"), [(1, 512), (511, 512), (512, 512), (513, 1024), (1025, 1536)])
def test_requests_are_rounded_up_to_512_bytes(expandable, num_bytes, taken):
    allocator = CachingAllocator(expandable=expandable)
    handle = allocator.allocate(num_bytes)
    assert allocator.allocated_bytes == taken
    allocator.free(handle)
    assert allocator.allocated_bytes == 0


@BOTH
def test_no_bytes_take_nothing(expandable):
    allocator = CachingAllocator(expandable=expandable, limit_bytes=0)
    handles = [allocator.allocate(0), allocator.allocate(0)]
    for handle in handles * 2:
        allocator.free(handle)
    assert levels(allocator) == (0, 0)
    assert allocator.peak_reserved_bytes == 0


@pytest.mark.parametrize(
    ("num_bytes", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB, 10 * MIB),  # it is the rounded request that counts
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # a rest of 1 MiB is not split off, and counts as allocated
        (12 * MIB, 12 * MIB, 12 * MIB),
        (33 * MIB + 1, 34 * MIB, 34 * MIB),
    ],
)
def test_a_first_request_takes_a_segment_of_its_kind(num_bytes, allocated, reserved):
    allocator = CachingAllocator()
    allocator.allocate(num_bytes)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, reserved)


@pytest.mark.parametrize(
    ("num_bytes", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (11 * MIB, 11 * MIB, 20 * MIB),
        (20 * MIB - 1, 20 * MIB, 20 * MIB),
        (20 * MIB + 1, 20 * MIB + 512, 40 * MIB),
    ],
)
def test_a_first_request_takes_pages_of_an_expandable_segment(num_bytes, allocated, reserved):
    allocator = CachingAllocator(expandable=True)
    allocator.allocate(num_bytes)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, reserved)


# Free blocks


@BOTH
def test_small_requests_fill_a_segment_to_its_last_512_bytes(expandable):
    allocator = CachingAllocator(expandable=expandable)
    for num_bytes in (MIB, MIB - 512, 512):
        allocator.allocate(num_bytes)
        assert allocator.reserved_bytes == 2 * MIB
    allocator.allocate(1)
    assert allocator.reserved_bytes == 4 * MIB


def test_large_requests_below_10_mib_share_a_segment_of_20():
    allocator = CachingAllocator()
    for reserved in (20, 20, 40):
        allocator.allocate(9 * MIB)
        assert allocator.reserved_bytes == reserved * MIB
    assert layout(allocator) == [(0, 9, True), (9, 9, True), (18, 2, False), (20, 9, True), (29, 11, False)]


@pytest.mark.parametrize(("num_bytes", "allocated"), [(15 * MIB, 16 * MIB), (15 * MIB - 512, 15 * MIB - 512)])
def test_a_cached_large_block_is_split_where_more_than_1_mib_is_left(num_bytes, allocated):
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(16 * MIB))
    handle = allocator.allocate(num_bytes)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, 16 * MIB)
    allocator.free(handle)
    assert layout(allocator) == [(0, 16, False)]


def cached(allocator, *sizes):
    for handle in [allocator.allocate(size * MIB) for size in sizes]:
        allocator.free(handle)


def test_the_smallest_block_that_fits_is_taken():
    allocator = CachingAllocator()
    cached(allocator, 40, 16, 12, 24)
    allocator.allocate(14 * MIB)
    assert levels(allocator) == (14, 92)
    assert layout(allocator) == [(0, 40, False), (40, 14, True), (54, 2, False), (56, 12, False), (68, 24, False)]


def test_a_block_of_just_the_size_is_taken_whole():
    allocator = CachingAllocator()
    cached(allocator, 40, 14, 16)
    allocator.allocate(14 * MIB)
    assert layout(allocator) == [(0, 40, False), (40, 14, True), (54, 16, False)]


def test_of_blocks_of_one_size_that_at_the_lowest_address_is_taken():
    allocator = CachingAllocator()
    handles = [allocator.allocate(12 * MIB) for _ in range(3)]
    for handle in (handles[2], handles[0], handles[1]):
        allocator.free(handle)
    allocator.allocate(12 * MIB)
    assert layout(allocator) == [(0, 12, True), (12, 12, False), (24, 12, False)]


@BOTH
def test_small_requests_never_take_from_large_blocks_nor_large_ones_from_small(expandable):
    allocator = CachingAllocator(expandable=expandable)
    cached(allocator, 20)
    allocator.free(allocator.allocate(MIB))
    assert [(block.small, block.num_bytes) for block in allocator.blocks()] == [(False, 20 * MIB), (True, 2 * MIB)]
    allocator.allocate(20 * MIB)
    allocator.allocate(MIB + 512)  # 2 MiB are free, but they are the small pool's
    assert allocator.reserved_bytes == 42 * MIB


@BOTH
def test_a_stream_takes_only_what_it_freed_itself(expandable):
    allocator = CachingAllocator(expandable=expandable)
    allocator.free(allocator.allocate(20 * MIB, stream=7))
    allocator.allocate(20 * MIB)
    assert allocator.reserved_bytes == 40 * MIB
    allocator.allocate(20 * MIB, stream=7)
    assert allocator.reserved_bytes == 40 * MIB


# Merging


@BOTH
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_freed_blocks_join_free_neighbours_on_both_sides(expandable, order):
    allocator = CachingAllocator(expandable=expandable)
    handles = [allocator.allocate(512 * KIB) for _ in range(4)]
    for i in order:
        allocator.free(handles[i])
    assert layout(allocator) == [(0, 1.5, False), (1.5, 0.5, True)]
    allocator.free(handles[3])
    assert layout(allocator) == [(0, 2, False)]


def test_a_block_in_use_keeps_its_free_neighbours_apart():
    allocator = CachingAllocator()
    handles = [allocator.allocate(512 * KIB) for _ in range(4)]
    allocator.free(handles[0])
    allocator.free(handles[2])
    assert layout(allocator) == [(0, 0.5, False), (0.5, 0.5, True), (1, 0.5, False), (1.5, 0.5, True)]
    allocator.allocate(512 * KIB + 1)
    assert allocator.reserved_bytes == 4 * MIB


def test_blocks_of_different_segments_are_never_joined():
    allocator = CachingAllocator()
    cached(allocator, 10, 10)
    assert layout(allocator) == [(0, 10, False), (10, 10, False)]
    allocator.allocate(20 * MIB)
    assert allocator.reserved_bytes == 40 * MIB


# Giving back


def test_emptying_the_cache_returns_whole_free_segments_only():
    allocator = CachingAllocator()
    cached(allocator, 12)
    first, second = allocator.allocate(9 * MIB), allocator.allocate(MIB // 2)
    cached(allocator, 30)
    assert levels(allocator) == (9.5, 12 + 2 + 30)  # 9 MiB of the 12
    allocator.empty_cache()
    assert levels(allocator) == (9.5, 14)
    allocator.free(first)
    allocator.free(second)
    assert levels(allocator) == (0, 14)
    allocator.empty_cache()
    assert levels(allocator) == (0, 0)
    assert allocator.blocks() == []


def test_emptying_the_cache_returns_every_streams_segments():
    allocator = CachingAllocator()
    for stream in range(3):
        allocator.free(allocator.allocate(1, stream=stream))
    assert allocator.reserved_bytes == 6 * MIB
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


@BOTH
def test_a_handle_is_good_for_one_free(expandable):
    allocator = CachingAllocator(expandable=expandable)
    handle = allocator.allocate(1)
    allocator.free(handle)
    assert allocator.allocate(1) != handle  # the same bytes, but not the same allocation
    for wrong in (handle, 99, -1):
        with pytest.raises(ValueError, match=f"handle {wrong} is not in use"):
            allocator.free(wrong)
    assert allocator.allocated_bytes == 512


def test_negative_numbers_are_refused():
    with pytest.raises(ValueError, match="limit_bytes is -1"):
        CachingAllocator(limit_bytes=-1)
    with pytest.raises(ValueError, match="cannot allocate -1 bytes"):
        CachingAllocator().allocate(-1)


# The limit


@BOTH
def test_the_limit_may_be_reached_but_not_exceeded(expandable):
    allocator = CachingAllocator(expandable=expandable, limit_bytes=22 * MIB)
    allocator.allocate(20 * MIB)
    allocator.allocate(512)
    assert allocator.reserved_bytes == 22 * MIB
    with pytest.raises(
        OutOfDeviceMemory, match="12582912 bytes more do not fit: 23068672 bytes are reserved"
    ) as caught:
        allocator.allocate(11 * MIB)
    assert (caught.value.wanted_bytes, caught.value.limit_bytes) == (12 * MIB, 22 * MIB)  # the segment's bytes
    assert isinstance(caught.value, MemoryError)
    assert levels(allocator) == (20 + 512 / MIB, 22)
    allocator.allocate(512)  # what is cached needs no segment


@BOTH
def test_the_cache_is_released_before_a_request_is_refused(expandable):
    allocator = CachingAllocator(expandable=expandable, limit_bytes=42 * MIB)
    allocator.free(allocator.allocate(20 * MIB, stream=1))
    allocator.free(allocator.allocate(512, stream=1))
    allocator.allocate(20 * MIB)
    assert allocator.reserved_bytes == 42 * MIB
    allocator.allocate(20 * MIB)
    assert levels(allocator) == (40, 40)  # both free segments went, though one would have been enough
    assert allocator.peak_reserved_bytes == 42 * MIB


def test_a_refused_request_leaves_the_cache_empty_and_all_else_as_it_was():
    allocator = CachingAllocator(limit_bytes=50 * MIB)
    handle = allocator.allocate(16 * MIB)
    cached(allocator, 30)
    with pytest.raises(OutOfDeviceMemory):
        allocator.allocate(36 * MIB)
    assert levels(allocator) == (16, 16)
    allocator.free(handle)
    allocator.allocate(50 * MIB)
    assert levels(allocator) == (50, 50)


def test_a_split_segment_is_not_released_and_so_a_request_is_refused():
    allocator = CachingAllocator(limit_bytes=40 * MIB)
    handles = [allocator.allocate(9 * MIB) for _ in range(4)]
    allocator.free(handles[0])
    allocator.free(handles[2])
    with pytest.raises(OutOfDeviceMemory):
        allocator.allocate(12 * MIB)
    assert levels(allocator) == (18, 40)


def test_without_a_limit_an_exbibyte_is_refused_and_less_is_not():
    allocator = CachingAllocator(expandable=True)
    with pytest.raises(OutOfDeviceMemory):
        allocator.allocate(1 << 60)
    handles = [allocator.allocate((1 << 60) - 1) for _ in range(3)]
    for handle in handles:
        allocator.free(handle)
    allocator.empty_cache()
    assert levels(allocator) == (0, 0)


def test_an_expandable_segment_is_checked_by_the_segment_it_does_not_ask_for():
    # 20 MiB of which 8 are free: 12 MiB more need one page, but the check is for 20 MiB.
    allocator = CachingAllocator(expandable=True, limit_bytes=40 * MIB - 1)
    allocator.allocate(12 * MIB)
    with pytest.raises(OutOfDeviceMemory):
        allocator.allocate(20 * MIB)
    allocator = CachingAllocator(expandable=True, limit_bytes=40 * MIB)
    allocator.allocate(12 * MIB)
    allocator.allocate(20 * MIB)
    assert levels(allocator) == (32, 40)


def test_an_expandable_segment_may_end_above_the_limit():
    allocator = CachingAllocator(expandable=True, limit_bytes=22 * MIB)
    allocator.allocate(22 * MIB)
    assert levels(allocator) == (22, 40)


# Peaks


@BOTH
def test_peaks_are_the_most_there_was_since_they_were_reset(expandable):
    allocator = CachingAllocator(expandable=expandable)
    first, second = allocator.allocate(20 * MIB), allocator.allocate(40 * MIB)
    allocator.free(second)
    allocator.empty_cache()
    assert levels(allocator) == (20, 20)
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (60 * MIB, 60 * MIB)
    allocator.reset_peaks()
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (20 * MIB, 20 * MIB)
    allocator.free(first)
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (20 * MIB, 20 * MIB)


# Expandable segments


def test_a_segment_grows_from_its_free_end():
    allocator = CachingAllocator(expandable=True)
    for reserved in (20, 40, 40, 60):
        allocator.allocate(12 * MIB)
        assert allocator.reserved_bytes == reserved * MIB
    assert layout(allocator) == [(0, 12, True), (12, 12, True), (24, 12, True), (36, 12, True), (48, 12, False)]


def test_a_free_end_that_is_large_enough_needs_no_page():
    allocator = CachingAllocator(expandable=True)
    allocator.allocate(12 * MIB)
    allocator.allocate(8 * MIB)
    assert levels(allocator) == (20, 20)


def test_the_small_pool_grows_by_pages_of_2_mib():
    allocator = CachingAllocator(expandable=True)
    for reserved in (2, 4, 4, 6):
        allocator.allocate(768 * KIB)
        allocator.allocate(512 * KIB)
        assert allocator.reserved_bytes == reserved * MIB


def with_a_hole():
    """Pages 0 and 1 without memory, then 4 MiB free, 12 in use and 4 free."""
    allocator = CachingAllocator(expandable=True)
    handle = allocator.allocate(44 * MIB)
    allocator.allocate(12 * MIB)
    allocator.free(handle)
    assert levels(allocator) == (12, 60)
    allocator.empty_cache()
    return allocator


def test_emptying_the_cache_unmaps_the_pages_that_are_free_as_a_whole():
    allocator = with_a_hole()
    assert levels(allocator) == (12, 20)
    assert layout(allocator) == [(0, 4, False), (4, 12, True), (16, 4, False)]
    allocator.empty_cache()
    assert levels(allocator) == (12, 20)


def test_unmapping_keeps_what_is_free_before_a_page_and_behind_it():
    allocator = CachingAllocator(expandable=True)
    handles = [allocator.allocate(num * MIB) for num in (8, 40, 12)]
    allocator.free(handles[1])
    allocator.empty_cache()
    assert layout(allocator) == [(0, 8, True), (8, 12, False), (40, 8, False), (48, 12, True)]
    assert [block.segment for block in allocator.blocks()] == [0, 0, 40 * MIB, 40 * MIB]


def test_a_page_in_use_in_part_stays():
    allocator = CachingAllocator(expandable=True)
    handles = [allocator.allocate(num * MIB) for num in (12, 12, 16)]
    allocator.free(handles[0])
    allocator.free(handles[2])
    allocator.empty_cache()
    assert levels(allocator) == (12, 40)


@pytest.mark.parametrize(
    ("num", "reserved", "blocks"),
    [
        (30, 60, [(0, 30, True), (30, 14, False), (44, 12, True), (56, 4, False)]),
        (10, 40, [(0, 10, True), (10, 10, False), (40, 4, False), (44, 12, True), (56, 4, False)]),
        (44, 60, [(0, 44, True), (44, 12, True), (56, 4, False)]),
        (45, 80, [(0, 4, False), (4, 12, True), (16, 45, True), (61, 19, False)]),
    ],
    ids=["two pages", "one page", "pages and what is free behind them", "too much for the hole"],
)
def test_holes_are_filled_first_where_there_is_room(num, reserved, blocks):
    allocator = with_a_hole()
    allocator.allocate(num * MIB)
    assert levels(allocator) == (12 + num, reserved)
    assert layout(allocator) == blocks


def test_growth_goes_through_several_holes():
    allocator = CachingAllocator(expandable=True)
    handles = [allocator.allocate(num * MIB) for num in (4, 36, 10, 30, 20)]
    allocator.free(handles[1])
    allocator.free(handles[3])
    allocator.empty_cache()  # of 100 MiB pages 1 and 3 are returned; in use are 0-4, 40-50 and 80-100
    assert levels(allocator) == (34, 60)
    allocator.free(handles[2])
    assert layout(allocator) == [(0, 4, True), (4, 16, False), (40, 20, False), (80, 20, True)]
    allocator.allocate(65 * MIB)  # from 4 on: 16 free, a page, 20 free, and the next page
    assert levels(allocator) == (89, 100)
    assert layout(allocator) == [(0, 4, True), (4, 65, True), (69, 11, False), (80, 20, True)]


def test_a_block_that_can_grow_is_spared_for_one_that_cannot():
    allocator = CachingAllocator(expandable=True)
    handles = [allocator.allocate(num * MIB) for num in (6, 9)]
    allocator.free(handles[0])
    assert layout(allocator) == [(0, 6, False), (6, 9, True), (15, 5, False)]
    allocator.allocate(4 * MIB)  # the end of 5 MiB fits better, but can become any size
    assert layout(allocator) == [(0, 4, True), (4, 2, False), (6, 9, True), (15, 5, False)]


def test_of_blocks_that_can_become_as_large_that_at_the_lowest_address_is_taken():
    allocator = CachingAllocator(expandable=True)
    handles = [allocator.allocate(num * MIB) for num in (4, 2, 4, 30)]
    allocator.free(handles[2])
    allocator.free(handles[0])
    allocator.allocate(4 * MIB)
    assert layout(allocator) == [(0, 4, True), (4, 2, True), (6, 4, False), (10, 30, True)]


def test_a_segment_without_memory_starts_anew():
    allocator = CachingAllocator(expandable=True)
    cached(allocator, 12, 50)
    allocator.empty_cache()
    assert levels(allocator) == (0, 0)
    before = allocator.peak_reserved_bytes
    allocator.allocate(12 * MIB)
    assert levels(allocator) == (12, 20)
    assert allocator.peak_reserved_bytes == before == 80 * MIB


# A plain account of the rules, in which nothing is kept but intervals: free runs are found anew for each request


class RefusedError(Exception):
    pass


class PlainAllocator:
    def __init__(self, expandable, limit):
        self.expandable, self.limit, self.end = expandable, limit, 0
        self.live = {}  # name: (pool, start, size)
        self.segments = defaultdict(list)  # pool: (start, size); of an expandable one, its pages

    @staticmethod
    def page(pool):
        return 2 * MIB if pool[1] else 20 * MIB

    def used(self, pool):
        return sorted((start, size) for owner, start, size in self.live.values() if owner == pool)

    def stretches(self, pool):
        """Memory without gaps: segments one by one, or pages side by side."""
        runs = []
        for start, size in sorted(self.segments[pool]):
            if self.expandable and runs and sum(runs[-1]) == start:
                runs[-1] = (runs[-1][0], runs[-1][1] + size)
            else:
                runs.append((start, size))
        return runs

    def free_runs(self, pool):
        runs = []
        for start, size in self.stretches(pool):
            place = start
            for used_start, used_size in self.used(pool):
                if start <= used_start < start + size:
                    runs.append((place, used_start - place))
                    place = used_start + used_size
            runs.append((place, start + size - place))
        return [run for run in runs if run[1] > 0]

    @property
    def reserved(self):
        return sum(size for segments in self.segments.values() for _, size in segments)

    @property
    def allocated(self):
        return sum(size for _, _, size in self.live.values())

    def room(self, pool, run):
        """Bytes that a free run has with the unmapped pages right behind it."""
        end = sum(run)
        behind = [start for start, _ in self.segments[pool] if start >= end]
        if end % self.page(pool) or end in behind:
            return run[1]
        return min(behind, default=float("inf")) - run[0]

    def fitting(self, pool, size):
        runs = sorted((run for run in self.free_runs(pool) if run[1] >= size), key=lambda run: (run[1], run[0]))
        if self.expandable:
            while len(runs) > 1 and self.room(pool, runs[1]) < self.room(pool, runs[0]):
                runs.pop(0)
        return runs[0] if runs else None

    def grown(self, pool, size, segment):
        if not self.expandable:
            self.segments[pool].append((self.end, segment))
            self.end += segment
            return self.segments[pool][-1]
        page, mapped = self.page(pool), {start for start, _ in self.segments[pool]}
        free_from = {sum(run): run[0] for run in self.free_runs(pool)}
        used = [start for start, _ in self.used(pool)]
        hole = 0
        while True:
            if hole not in mapped and (hole == 0 or hole - page in mapped):
                start = free_from.get(hole, hole)
                if min((other for other in used if other >= start), default=float("inf")) - start >= size:
                    break
            hole += page
        wanted = range(start // page * page, start + size, page)
        self.segments[pool] += [(place, page) for place in wanted if place not in mapped]
        return next(run for run in self.free_runs(pool) if run[0] == start)

    def allocate(self, name, num_bytes, stream):
        size = (num_bytes + 511) // 512 * 512
        pool = (stream, size <= MIB)
        run = self.fitting(pool, size)
        if run is None:
            segment = (
                2 * MIB if pool[1] else 20 * MIB if size < 10 * MIB else (size + 2 * MIB - 1) // MIB // 2 * 2 * MIB
            )
            if self.reserved + segment > self.limit:
                self.empty()
            if self.reserved + segment > self.limit:
                raise RefusedError
            run = self.grown(pool, size, segment)
        keeps_all = not (self.expandable or pool[1]) and run[1] - size <= MIB
        self.live[name] = (pool, run[0], run[1] if keeps_all else size)

    def blocks(self):
        pools = {}
        for pool in self.segments:
            used, free = self.used(pool), self.free_runs(pool)
            blocks = sorted([(*run, True) for run in used] + [(*run, False) for run in free])
            if blocks:
                pools[pool] = [(start - blocks[0][0], size, in_use) for start, size, in_use in blocks]
        return pools

    def empty(self):
        for pool, segments in self.segments.items():
            used = self.used(pool)
            self.segments[pool] = [
                (start, size)
                for start, size in segments
                if any(other < start + size and start < other + length for other, length in used)
            ]


SIZES = st.one_of(
    st.sampled_from([1, 512, MIB, MIB + 1, 2 * MIB, 9 * MIB, 10 * MIB, 11 * MIB, 20 * MIB, 31 * MIB]),
    st.integers(1, 4 * KIB),
    st.integers(200 * KIB, 3 * MIB),
    st.integers(1, 100).map(lambda number: number * MIB // 2),
    st.integers(MIB, 60 * MIB),
)
ALLOCATE = st.tuples(st.just("allocate"), SIZES, st.integers(0, 1))
FREE = st.tuples(st.just("free"), st.integers(0, 100))
PROGRAMS = st.lists(
    st.one_of(ALLOCATE, ALLOCATE, ALLOCATE, FREE, FREE, st.tuples(st.sampled_from(["empty", "reset"]))), max_size=50
)
LIMITS = st.one_of(st.none(), st.integers(0, 150 * MIB))


def run(program, allocator, after_each):
    """Plays a program, with what was live after each step: handles and the bytes asked for."""
    live = []
    for action, *arguments in program:
        refused = False
        if action == "allocate":
            try:
                live.append((allocator.allocate(arguments[0], stream=arguments[1]), *arguments))
            except OutOfDeviceMemory:
                refused = True
        elif action == "free" and live:
            allocator.free(live.pop(arguments[0] % len(live))[0])
        elif action == "empty":
            allocator.empty_cache()
        elif action == "reset":
            allocator.reset_peaks()
        after_each(action, arguments, live, refused)
    return live


def blocks_of_pools(allocator):
    """Blocks of each pool as (offset from the pool's first, bytes, in use)."""
    pools = defaultdict(list)
    for block in allocator.blocks():
        pools[block.stream, block.small].append(block)
    return {
        pool: [(block.address - blocks[0].address, block.num_bytes, block.in_use) for block in blocks]
        for pool, blocks in pools.items()
    }


def agree_with_the_plain_account(program, expandable, limit):
    allocator = CachingAllocator(expandable=expandable, limit_bytes=limit)
    plain = PlainAllocator(expandable, float("inf") if limit is None else limit)

    def compare(action, arguments, live, refused):
        if action == "allocate":
            name = live[-1][0] if not refused else None
            try:
                plain.allocate(name, *arguments)
            except RefusedError:
                assert refused
            else:
                assert not refused
        elif action == "empty":
            plain.empty()
        plain.live = {handle: plain.live[handle] for handle, *_ in live}
        assert (allocator.allocated_bytes, allocator.reserved_bytes) == (plain.allocated, plain.reserved)
        assert blocks_of_pools(allocator) == plain.blocks()

    run(program, allocator, compare)


@BOTH
@settings(deadline=None, max_examples=150)
@given(program=PROGRAMS, limit=LIMITS)
@example(program=[("allocate", 11 * MIB, 0)], limit=0)
def test_it_agrees_with_the_plain_account(expandable, program, limit):
    agree_with_the_plain_account(program, expandable, limit)


@BOTH
@pytest.mark.parametrize("limit", [None, 400 * MIB])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_agrees_with_the_plain_account_over_long_programs(expandable, limit, seed):
    source = random.Random(seed)
    program = []
    for _ in range(400):
        kind = source.random()
        size = source.choice([source.randrange(1, MIB), source.randrange(MIB, 12 * MIB), source.randrange(1, 80) * MIB])
        if kind < 0.53:
            program.append(("allocate", size, source.randrange(2)))
        else:
            program.append(("free", source.randrange(1000)) if kind < 0.97 else ("empty",))
    agree_with_the_plain_account(program, expandable, limit)


# What holds for every program


@BOTH
@settings(deadline=None, max_examples=100)
@given(program=PROGRAMS, limit=LIMITS)
def test_blocks_tile_what_is_reserved_and_free_neighbours_are_one(expandable, program, limit):
    allocator = CachingAllocator(expandable=expandable, limit_bytes=limit)

    def check(action, arguments, live, refused):
        blocks = allocator.blocks()
        assert all(first.address + first.num_bytes <= second.address for first, second in pairwise(blocks))
        assert sum(block.num_bytes for block in blocks) == allocator.reserved_bytes
        assert sum(block.num_bytes for block in blocks if block.in_use) == allocator.allocated_bytes
        assert sum(block.in_use for block in blocks) == len(live)
        segments = defaultdict(list)
        for block in blocks:
            segments[block.segment].append(block)
        for start, inside in segments.items():
            assert inside[0].address == start
            assert len({(block.stream, block.small) for block in inside}) == 1
            assert sum(block.num_bytes for block in inside) % (2 * MIB) == 0
            for first, second in pairwise(inside):
                assert first.address + first.num_bytes == second.address
                assert first.in_use or second.in_use

    run(program, allocator, check)


@BOTH
@settings(deadline=None, max_examples=100)
@given(program=PROGRAMS, limit=LIMITS)
def test_allocated_bytes_are_those_asked_for_rounded_and_reserved_ones_no_fewer(expandable, program, limit):
    allocator = CachingAllocator(expandable=expandable, limit_bytes=limit)

    def check(action, arguments, live, refused):
        rounded = [(size + 511) // 512 * 512 for _, size, _ in live]
        unsplit = 0 if expandable else MIB * sum(size > MIB for size in rounded)  # at most, of segments alone
        assert sum(rounded) <= allocator.allocated_bytes <= sum(rounded) + unsplit
        assert allocator.allocated_bytes <= allocator.reserved_bytes
        assert allocator.reserved_bytes % (2 * MIB) == 0
        if limit is not None:
            assert allocator.reserved_bytes < limit + (20 * MIB if expandable else 1)

    run(program, allocator, check)


@BOTH
@settings(deadline=None, max_examples=60)
@given(program=PROGRAMS, limit=LIMITS)
def test_what_is_freed_and_not_cached_is_the_devices_again(expandable, program, limit):
    allocator = CachingAllocator(expandable=expandable, limit_bytes=limit)
    for handle, *_ in run(program, allocator, lambda *_: None):
        allocator.free(handle)
    assert allocator.allocated_bytes == 0
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0
    assert allocator.blocks() == []


@BOTH
@settings(deadline=None, max_examples=60)
@given(program=PROGRAMS, limit=LIMITS)
def test_peaks_are_maxima(expandable, program, limit):
    allocator = CachingAllocator(expandable=expandable, limit_bytes=limit)
    most = [0, 0]

    def check(action, arguments, live, refused):
        now = [allocator.allocated_bytes, allocator.reserved_bytes]
        most[:] = now if action == "reset" else map(max, most, now)
        assert [allocator.peak_allocated_bytes, allocator.peak_reserved_bytes] == most

    run(program, allocator, check)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(SIZES, st.integers(0, 1)), max_size=40))
def test_without_frees_an_expandable_segment_is_its_requests_rounded_to_pages(requests):
    expandable, segments = CachingAllocator(expandable=True), CachingAllocator()
    totals = defaultdict(int)
    for num_bytes, stream in requests:
        expandable.allocate(num_bytes, stream=stream)
        segments.allocate(num_bytes, stream=stream)
        size = (num_bytes + 511) // 512 * 512
        totals[stream, size <= MIB] += size
    pages = sum(-(-total // page) * page for (_, small), total in totals.items() for page in [(20 - 18 * small) * MIB])
    assert expandable.reserved_bytes == pages
    assert expandable.allocated_bytes <= segments.allocated_bytes
    # Segments hold the same bytes and come in steps of 2 MiB, as small pages do; only a large page may be the more.
    large_pools = sum(not small for _, small in totals)
    assert expandable.reserved_bytes <= segments.reserved_bytes + 20 * MIB * large_pools


@BOTH
def test_fifty_thousand_steps_take_moments(expandable):
    source = random.Random(0)
    sizes = [source.choice([source.randrange(1, MIB), source.randrange(MIB, 64 * MIB)]) for _ in range(25_000)]
    allocator = CachingAllocator(expandable=expandable)
    live = []
    began = time.process_time()
    for size in sizes:
        live.append(allocator.allocate(size))
        if len(live) > 2_000:
            allocator.free(live.pop(size % len(live)))
    for handle in live:
        allocator.free(handle)
    assert time.process_time() - began < 5  # some tenths of a second, on a machine with nothing else to do
    assert allocator.allocated_bytes == 0


def test_the_example_in_the_docstring_is_right():
    assert doctest.testmod(allocator_module).failed == 0
