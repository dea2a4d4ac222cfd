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
    """``work(*piece)`` of each piece, the first one in the calling thread."""
    if not pieces:
        return []
    first, *others = pieces
    tasks = [_pool(os.getpid(), torch.get_num_threads()).submit(work, *piece) for piece in others]
    return [work(*first), *(task.result() for task in tasks)]


def even_pieces(count: int, pieces: int) -> list[tuple[int, int]]:
    """Where each of ``pieces`` of ``count`` things begins and ends, as even as whole numbers let them be."""
    return list(pairwise(count * piece // pieces for piece in range(pieces + 1)))


@lru_cache(maxsize=4)
def _pool(_process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked child has none of its parent's, so it asks with another number."""
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="resnet-bk")
