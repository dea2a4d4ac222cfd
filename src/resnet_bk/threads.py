"""Work that threads of this process take piece by piece: compiled loops hold no lock of Python's while they run."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from resnet_bk.atomics import Cells

T = TypeVar("T")

# To hand work to a thread takes as long as this many elements.
ELEMENTS_WORTH_A_THREAD = 1 << 16


def in_threads(work: Callable[..., T], pieces: Sequence[tuple[Any, ...]]) -> list[T]:
    """``work(*piece)`` of each piece: as many threads as torch has, this one among them, take them one by one."""
    if torch.get_num_threads() == 1 or len(pieces) <= 1:
        return [work(*piece) for piece in pieces]
    from resnet_bk.atomics import announce  # by way of numba, which is slow to load
    from resnet_bk.crew import together

    found: dict[int, T] = {}
    left = iter(enumerate(pieces))  # what threads take from it is taken once: Python's lock is held meanwhile

    def take(cells: "Cells") -> None:
        announce(cells)
        for index, piece in left:
            found[index] = work(*piece)

    together(take, len(pieces))
    return [found[index] for index in range(len(pieces))]


def even_pieces(count: int, pieces: int) -> list[tuple[int, int]]:
    """Where each of ``pieces`` of ``count`` things begins and ends, as even as whole numbers let them be."""
    return list(pairwise(count * piece // pieces for piece in range(pieces + 1)))
