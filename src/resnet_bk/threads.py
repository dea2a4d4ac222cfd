"""Compiled loops in threads of this process: they hold no lock of Python's while they run."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# To hand work to a thread takes as long as this many elements.
ELEMENTS_WORTH_A_THREAD = 1 << 16


def in_threads(work: Callable[..., T], pieces: Sequence[tuple[Any, ...]]) -> list[T]:
    """``work(*piece)`` of each piece: as many threads as torch has, this one among them, take them one by one."""
    found: dict[int, T] = {}
    left = iter(enumerate(pieces))  # what threads take from it is taken once: Python's lock is held meanwhile

    def take() -> None:
        for index, piece in left:
            found[index] = work(*piece)

    threads = torch.get_num_threads()
    helpers = [_pool(os.getpid(), threads).submit(take) for _ in range(min(threads, len(pieces)) - 1)]
    try:
        take()
    finally:
        for helper in helpers:
            helper.result()
    return [found[index] for index in range(len(pieces))]


def even_pieces(count: int, pieces: int) -> list[tuple[int, int]]:
    """Where each of ``pieces`` of ``count`` things begins and ends, as even as whole numbers let them be."""
    return list(pairwise(count * piece // pieces for piece in range(pieces + 1)))


@lru_cache(maxsize=4)
def _pool(_process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked child has none of its parent's, so it asks with another number."""
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="resnet-bk")
