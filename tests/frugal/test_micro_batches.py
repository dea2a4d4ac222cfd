"""A batch in pieces: as few as there must be, and smaller ones where memory does not suffice."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_bk.frugal.micro_batches import MicroBatches, split_rows

COUNTS = st.integers(1, 300)


class Room:
    """A step that runs out of memory with more than ``most`` rows, and remembers what it was called with."""

    def __init__(self, most, error=torch.OutOfMemoryError):
        self.most, self.error, self.calls = most, error, []

    def __call__(self, rows):
        self.calls.append(rows)
        if rows > self.most:
            raise self.error(f"no room for {rows} rows")
        return f"{rows} rows"


@given(num_rows=COUNTS, rows=COUNTS)
def test_pieces_are_all_rows_in_their_order(num_rows, rows):
    rows_of_pieces = [row for start, stop in split_rows(num_rows, rows) for row in range(start, stop)]
    assert rows_of_pieces == list(range(num_rows))


@given(num_rows=COUNTS, rows=COUNTS)
def test_no_piece_is_larger_than_allowed_nor_empty(num_rows, rows):
    assert all(1 <= stop - start <= rows for start, stop in split_rows(num_rows, rows))


@given(num_rows=COUNTS, rows=COUNTS)
def test_pieces_are_as_few_as_there_must_be(num_rows, rows):
    count = len(list(split_rows(num_rows, rows)))
    assert (count - 1) * rows < num_rows <= count * rows


@given(num_rows=COUNTS, rows=COUNTS)
def test_sizes_of_pieces_differ_by_one_at_most(num_rows, rows):
    sizes = [stop - start for start, stop in split_rows(num_rows, rows)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("num_rows", "rows", "sizes"),
    [(8, 8, [8]), (8, 100, [8]), (8, 4, [4, 4]), (8, 3, [2, 3, 3]), (20, 8, [6, 7, 7]), (1, 1, [1])],
)
def test_pieces_of_known_batches(num_rows, rows, sizes):
    assert [stop - start for start, stop in split_rows(num_rows, rows)] == sizes


def test_pieces_of_no_rows_are_refused():
    with pytest.raises(ValueError, match="rows is 0; give at least 1"):
        list(split_rows(4, 0))


def test_what_fits_is_done_once_with_all_rows():
    told = []
    pieces, step = MicroBatches(8, on_smaller=told.append), Room(8)
    assert pieces.run(step) == "8 rows"
    assert (step.calls, told, pieces.rows) == ([8], [], 8)


@pytest.mark.parametrize(
    ("rows", "most", "calls"),
    [(8, 4, [8, 4]), (8, 1, [8, 4, 2, 1]), (20, 3, [20, 10, 5, 3]), (7, 3, [7, 4, 2]), (2, 1, [2, 1])],
)
def test_what_runs_out_of_memory_is_tried_with_half_the_rows(rows, most, calls):
    told = []
    pieces, step = MicroBatches(rows, on_smaller=told.append), Room(most)
    assert pieces.run(step) == f"{calls[-1]} rows"
    assert step.calls == calls
    assert told == calls[1:], "each smaller number once, the first of all never"


@settings(max_examples=8, deadline=None)  # garbage is collected at each halving, which takes its time
@given(rows=COUNTS, data=st.data())
def test_whatever_fits_is_found_and_halving_never_goes_below_half_of_it(rows, data):
    most = data.draw(st.integers(1, rows))
    pieces = MicroBatches(rows)
    pieces.run(Room(most))
    assert pieces.rows <= most
    assert pieces.rows == rows or 2 * pieces.rows > most


def test_later_steps_begin_with_what_went_through():
    told = []
    pieces, step = MicroBatches(8, on_smaller=told.append), Room(4)
    for _ in range(3):
        pieces.run(step)
    assert step.calls == [8, 4, 4, 4]
    step.most = 2
    pieces.run(step)
    assert step.calls[4:] == [4, 2]
    step.most = 8
    pieces.run(step)
    assert step.calls[6:] == [2], "a number that once did not fit is not tried again"
    assert told == [4, 2]


@pytest.mark.parametrize(("smallest", "calls"), [(1, [8, 4, 2, 1]), (3, [8, 4, 3]), (4, [8, 4]), (8, [8])])
def test_at_the_smallest_number_the_error_is_the_steps_own(smallest, calls):
    told = []
    pieces, step = MicroBatches(8, smallest=smallest, on_smaller=told.append), Room(0)
    with pytest.raises(torch.OutOfMemoryError, match=f"^no room for {calls[-1]} rows$"):
        pieces.run(step)
    assert step.calls == calls
    assert told == calls[1:]


@pytest.mark.parametrize("error", [RuntimeError, ValueError, MemoryError, KeyboardInterrupt, SystemExit])
def test_another_error_is_nobodys_business_here(error):
    told = []
    pieces, step = MicroBatches(8, on_smaller=told.append), Room(4, error)
    with pytest.raises(error, match=r"^no room for 8 rows$"):
        pieces.run(step)
    assert (step.calls, told, pieces.rows) == ([8], [], 8)


def test_what_counts_as_out_of_memory_can_be_said():
    pieces = MicroBatches(8, is_out_of_memory=lambda error: "no room" in str(error))
    step = Room(2, RuntimeError)
    assert pieces.run(step) == "2 rows"
    assert step.calls == [8, 4, 2]

    def others(_rows):
        raise torch.OutOfMemoryError("something else")

    with pytest.raises(torch.OutOfMemoryError, match="something else"):
        pieces.run(others)
    assert pieces.rows == 2


def test_a_number_is_proven_once_a_step_has_gone_through_with_it():
    pieces, step = MicroBatches(8), Room(8)
    seen = []

    def noting(rows):
        seen.append((rows, pieces.proven))
        return step(rows)

    pieces.run(noting)
    pieces.run(noting)
    step.most = 4
    pieces.run(noting)
    pieces.run(noting)
    assert seen == [(8, False), (8, True), (8, True), (4, False), (4, True)]
    assert pieces.proven


def test_a_number_that_failed_is_not_proven():
    pieces = MicroBatches(1)
    with pytest.raises(torch.OutOfMemoryError):
        pieces.run(Room(0))
    assert not pieces.proven


@pytest.mark.parametrize("in_a_cycle", [False, True], ids=["in the step's frame", "in a cycle of references"])
@pytest.mark.parametrize("chained", [False, True], ids=["raised", "raised while handling another"])
def test_what_a_failed_try_made_is_freed_before_the_next_begins(chained, in_a_cycle):
    made, alive_at_the_beginning = [], []

    def deeper(x):
        y = x.exp()
        made.append(weakref.ref(y))
        if in_a_cycle:
            holder = [y]
            holder.append(holder)
        try:
            raise torch.OutOfMemoryError("inner")
        except torch.OutOfMemoryError as error:
            if chained:
                raise torch.OutOfMemoryError("outer") from error
            raise

    def step(rows):
        alive_at_the_beginning.append([reference() is not None for reference in made])
        x = torch.ones(rows, requires_grad=True)
        made.append(weakref.ref(x))
        if rows > 2:
            deeper(x)
        return rows

    assert MicroBatches(8).run(step) == 2
    assert alive_at_the_beginning == [[], [False] * 2, [False] * 4]


def test_what_a_failed_try_made_is_freed_before_anybody_is_told():
    made, alive = [], []

    def step(rows):
        x = torch.ones(rows)
        made.append(weakref.ref(x))
        if rows > 1:
            raise torch.OutOfMemoryError
        return rows

    MicroBatches(2, on_smaller=lambda _: alive.append(made[0]() is not None)).run(step)
    assert alive == [False]


@pytest.mark.parametrize(("rows", "smallest"), [(0, 1), (4, 0), (4, 5), (-1, -1)])
def test_numbers_that_make_no_sense_are_refused(rows, smallest):
    with pytest.raises(ValueError, match="give 1 <= smallest <= rows"):
        MicroBatches(rows, smallest=smallest)
