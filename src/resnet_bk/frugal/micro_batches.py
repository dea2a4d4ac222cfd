"""A batch in pieces, smaller ones where memory does not suffice."""

import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


class MicroBatches:
    """How many rows of a batch go through the model at once: fewer from then on when a step runs out of memory.

    >>> pieces = MicroBatches(rows=8)
    >>> pieces.run(lambda rows: [stop - start for start, stop in split_rows(20, rows)])
    [6, 7, 7]
    """

    def __init__(
        self,
        rows: int,
        *,
        smallest: int = 1,
        is_out_of_memory: Callable[[BaseException], bool] | None = None,
        on_smaller: Callable[[int], None] | None = None,
    ) -> None:
        """``on_smaller`` hears of a smaller number of rows, once for each."""
        if not 1 <= smallest <= rows:
            raise ValueError(f"rows is {rows} and smallest {smallest}; give 1 <= smallest <= rows")
        self.rows, self.smallest, self.on_smaller = rows, smallest, on_smaller
        self.proven = False  # whether a step with this number of rows has gone through
        self._is_out_of_memory = is_out_of_memory or (lambda error: isinstance(error, torch.OutOfMemoryError))

    def run(self, step: Callable[[int], T]) -> T:
        """``step(rows)``, again from its start with half the rows while it runs out of memory.

        ``step`` must begin by forgetting what a failed try left, gradients above all.

        Raises:
            torch.OutOfMemoryError: or what else the step raised, at the smallest number of rows.
        """
        while True:
            try:
                result = step(self.rows)
                self.proven = True
                return result
            except Exception as error:
                if not self._is_out_of_memory(error) or self.rows <= self.smallest:
                    raise
            # Outside of the handler: inside, the traceback still holds what the failed try had allocated.
            self.proven = False
            self.rows = max(self.smallest, -(-self.rows // 2))
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.on_smaller is not None:
                self.on_smaller(self.rows)


def split_rows(num_rows: int, rows: int) -> Iterator[tuple[int, int]]:
    """First row and the one behind the last of each piece, as even as they get: so many pieces are needed, no more.

    Raises:
        ValueError: pieces of no rows.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}; give at least 1")
    pieces = -(-num_rows // rows)
    for piece in range(pieces):
        yield piece * num_rows // pieces, (piece + 1) * num_rows // pieces
