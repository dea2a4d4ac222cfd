"""Threads that help: all is done once, whoever is late, asleep, busy or fails."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from numba import njit
from numba.core.errors import TypingError

from resnet_bk import atomics
from resnet_bk.atomics import CELLS, announce, nobody
from resnet_bk.crew import together
from resnet_bk.threads import in_threads

TIMES = 20_000


@pytest.fixture(params=[2, 4])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@njit(nogil=True)
def take_all(cells, pieces, begun):
    """Puts into each piece who took it. They meet once each has a piece, so that nobody finds all taken."""
    announce(cells)
    piece, me = atomics.add(begun, 16, 1), atomics.add(begun, 0, 1)
    atomics.wait_for(begun, 0, begun[8], 400_000_000)
    while piece < len(pieces):
        atomics.add(pieces, piece, 1 + me * 1000)
        piece = atomics.add(begun, 16, 1)


def test_threads_share_out_what_there_is_and_nobody_takes_what_another_has(threads):
    pieces, begun = np.zeros(TIMES, np.int64), nobody()
    begun[8] = threads
    together(lambda cells: take_all(cells, pieces, begun), threads)
    assert (pieces % 1000 == 1).all() and len(np.unique(pieces)) == threads == begun[0]


@pytest.mark.parametrize("pause", [0.0, 1e-4, 0.02])
def test_helpers_come_whether_they_look_out_or_sleep(threads, pause):
    for _ in range(20):
        pieces, begun = np.zeros(64, np.int64), nobody()
        begun[8] = threads
        together(lambda cells: take_all(cells, pieces, begun), threads)  # noqa: B023  (it has ended)
        assert begun[0] == threads and (pieces % 1000 == 1).all()
        time.sleep(pause)


def test_no_helper_begins_what_is_not_announced(threads):
    who = []
    together(lambda cells: who.append(threading.get_ident()), threads)
    assert in_threads(abs, [(-number,) for number in range(40)]) == list(range(40))
    assert who == [threading.get_ident()]


@pytest.mark.parametrize("announced", [True, False])
def test_helpers_that_have_nothing_to_do_sleep(threads, announced):
    together(announce if announced else lambda cells: None, threads)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_pieces_of_python_are_all_done_in_their_order(threads):
    who = set()

    def work(number):
        who.add(threading.get_ident())
        time.sleep(1e-3)
        return number * number

    assert in_threads(work, [(number,) for number in range(400)]) == [number * number for number in range(400)]
    assert len(who) == threads


def test_what_fails_in_a_helper_is_raised_here_and_the_helper_goes_on(threads):
    here = threading.get_ident()

    def work(number):
        if threading.get_ident() != here:
            raise ValueError(f"piece {number}")
        time.sleep(1e-3)

    for _ in range(3):
        with pytest.raises(ValueError, match="piece"):
            in_threads(work, [(number,) for number in range(400)])
    assert in_threads(abs, [(-number,) for number in range(40)]) == list(range(40))


def test_what_fails_here_is_raised_once_helpers_have_ended(threads):
    running, here = [], threading.get_ident()

    def work(number):
        if threading.get_ident() == here:
            time.sleep(0.01)
            raise ValueError(f"piece {number}")
        running.append(number)
        time.sleep(0.02)
        running.remove(number)

    with pytest.raises(ValueError, match="piece"):
        in_threads(work, [(number,) for number in range(threads)])
    assert not running


def test_callers_in_several_threads_and_within_each_other_all_get_theirs(threads):
    found = {}

    def call(number):
        inner = in_threads(lambda piece: in_threads(abs, [(-piece,)] * 3), [(piece,) for piece in range(20)])
        found[number] = inner == [[piece] * 3 for piece in range(20)]

    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert found == dict.fromkeys(range(4), True)


ENDS = """
import os, threading, time, torch
from resnet_bk.threads import in_threads

def who(number):
    time.sleep(1e-3)
    return number, threading.get_ident()

def is_shared():
    numbers, threads = zip(*in_threads(who, [(number,) for number in range(400)]))
    return numbers == tuple(range(400)) and len(set(threads)) == 3

torch.set_num_threads(3)
is_shared()
child = os.fork()
right = is_shared()
if child == 0:
    os._exit(0 if right else 7)
print(right, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_helpers_of_its_own_and_processes_end_while_helpers_look_out():
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.split() == ["True", "0"] and not ended.stderr
    assert time.monotonic() - began < 60


@njit
def use(cells):
    before = atomics.add(cells, 1, 5)
    atomics.write(cells, 2, 7)
    return before, atomics.read(cells, 1), atomics.read(cells, 2)


def test_cells_are_read_written_and_added_to():
    cells = nobody()
    assert use(cells) == (0, 5, 7) and use(cells) == (5, 10, 7) and cells.size == CELLS
    assert atomics.wait_for(cells, 1, 11, 3) == 10 == atomics.wait_for(cells, 1, 10, 0)


@pytest.mark.parametrize("cells", [np.zeros(4), np.zeros(4, np.int32), np.zeros((4, 4), np.int64)])
def test_cells_of_another_kind_are_refused(cells):
    with pytest.raises(TypingError, match="cells are int64"):
        use(cells)
