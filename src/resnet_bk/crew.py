"""Threads that help: they look out for a moment for more to do before they sleep.

To wake a thread takes a tenth of a millisecond, as long as a sweep over some hundred thousand numbers. So a helper that
has nothing left to do looks at a cell for three times as long, and so does the caller until the last helper has ended,
both without Python's lock. Whoever wants that lock while another holds it sleeps as well; so work says by itself, once
it has given the lock up, that helpers are to begin.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import cache
from queue import SimpleQueue

import torch

from resnet_bk.atomics import ANNOUNCED, CALLED, ENDED, Cells, look_out, nobody, wait_for

PATIENCE, GLANCE = 12_000, 100  # looks at a cell, some 25 ns each
NAP = 5e-5  # seconds
_give_way: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(NAP))


def together(work: Callable[[Cells], None], most: int) -> None:
    """``work(cells)`` in as many threads as torch has, but so many at ``most``; this one is the first.

    They share out what there is to do. The others begin when it is announced to the cells; who is late is not waited
    for. What is raised in any of them is raised here.
    """
    threads = torch.get_num_threads()
    if min(threads, most) <= 1:
        work(nobody())
    else:
        _crew(os.getpid(), threads - 1).call(work, min(threads, most) - 1)


@cache
def _crew(_process: int, helpers: int) -> "Crew":
    """Those of this process: a forked child has none of its parent's threads, so it asks with another number."""
    return Crew(helpers)


class Crew:
    """So many helpers, in threads that end with the process."""

    def __init__(self, helpers: int) -> None:
        self._cells = nobody()
        self._offers: deque[Callable[[Cells], None]] = deque()
        self._errors: deque[BaseException] = deque()
        self._bells: list[SimpleQueue[None]] = [SimpleQueue() for _ in range(helpers)]
        self._is_asleep = [False] * helpers
        self._is_busy = threading.Lock()
        self._ended = 0
        for number in range(helpers):
            threading.Thread(target=self._help, args=(number,), name=f"resnet-bk-{number}", daemon=True).start()

    def call(self, work: Callable[[Cells], None], helpers: int) -> None:
        """``work(cells)`` here and, once it announces it to the cells, in so many helpers.

        Where another thread has called them, this one does all by itself.
        """
        if not self._is_busy.acquire(blocking=False):
            work(nobody())
            return
        try:
            self._cells[CALLED] += 1
            self._offers.extend([work] * helpers)
            sleepers = [number for number, is_asleep in enumerate(self._is_asleep) if is_asleep]
            for number in sleepers[:helpers]:
                self._bells[number].put(None)
            try:
                work(self._cells)
            finally:
                self._wait(helpers)
            if self._errors:
                raise self._errors.popleft()
        finally:
            self._errors.clear()
            self._is_busy.release()

    def _wait(self, helpers: int) -> None:
        """Takes back what no helper has begun, and waits for the end of what one has."""
        while self._offers:
            try:
                self._offers.pop()
            except IndexError:  # a helper was quicker
                break
            helpers -= 1
        self._cells[ANNOUNCED] = self._cells[CALLED]  # nobody waits any longer for what never was
        self._ended += helpers
        if wait_for(self._cells, ENDED, self._ended, PATIENCE) < self._ended:
            while self._cells[ENDED] < self._ended:
                time.sleep(NAP)

    def _help(self, number: int) -> None:
        seen = ended = 0
        while True:
            announced = look_out(self._cells, ended, seen + 1, PATIENCE if ended else GLANCE)
            ended = 0
            if announced > seen:
                seen = announced
                ended = self._work()
            elif self._cells[CALLED] > seen:
                _give_way()  # perhaps to the caller: it may be on the same processor
            else:
                self._sleep(number, seen)

    def _work(self) -> int:
        """Does what is offered; how many times."""
        try:
            work = self._offers.pop()
        except IndexError:  # enough others were quicker
            return 0
        try:
            work(self._cells)
        except BaseException as error:  # the caller raises it
            self._errors.append(error)
        return 1

    def _sleep(self, number: int, seen: int) -> None:
        self._is_asleep[number] = True
        if self._cells[CALLED] <= seen:  # else the call came just before
            self._bells[number].get()
        self._is_asleep[number] = False
