"""Work in a process of its own: one that hangs, dies or takes all memory is a result and not the end of everything.

Processes are forked from a server that has loaded libraries and nothing else, where the system can do that.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

from resnet_bk.schema import Failure, FailureKind

# What nearly every cell loads, in seconds; none of it starts threads or a GPU.
PRELOADED = ["resnet_bk.bench.suite", "torch._dynamo", "numba"]
LONGEST_MESSAGE = 300
_STAT = Path("/proc/stat")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What came of it: JSON, or a failure; ``waited`` as in ``CellStatus``."""

    seconds: float
    result: bytes | None = None
    failure: Failure | None = None
    waited: float | None = None


class _Message(msgspec.Struct):
    result: msgspec.Raw = msgspec.Raw(b"null")
    kind: FailureKind = "error"
    failure: str | None = None
    waited: float | None = None


def run_apart(
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    timeout: float,
    kind_of: Callable[[BaseException], FailureKind],
) -> Ended:
    """Calls ``work(*arguments)`` in another process; its result goes through JSON. ``kind_of`` names its exceptions."""
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, work, arguments, kind_of), daemon=False)
    began = time.perf_counter()
    process.start()
    sender.close()
    try:
        message = _receive(receiver, timeout)
    finally:
        seconds = time.perf_counter() - began
        _stop(process)
        receiver.close()
    if message == "timeout":
        return Ended(seconds=seconds, failure=Failure(kind="timeout", message=f"no end after {timeout:.0f} s"))
    if message is None:
        return Ended(seconds=seconds, failure=_death(process.exitcode))
    found = msgspec.json.decode(message, type=_Message)
    if found.failure is not None:
        return Ended(seconds=seconds, failure=Failure(kind=found.kind, message=found.failure), waited=found.waited)
    return Ended(seconds=seconds, result=bytes(found.result), waited=found.waited)


def side_by_side(calls: Sequence[Callable[[], Ended]]) -> list[Ended]:
    """What these calls of ``run_apart`` give, all at once; if this process is stopped meanwhile, so are theirs."""
    if len(calls) == 1:
        return [calls[0]()]
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            if error := next((future.exception() for future in done if future.exception()), None):
                raise error
            return [future.result() for future in futures]
        except BaseException:
            while wait(futures, timeout=0.2).not_done:  # one that is only starting comes to light a little later
                for process in multiprocessing.active_children():
                    _stop(process)
            raise


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _receive(receiver: Connection, timeout: float) -> bytes | str | None:
    """None if the other side has gone without a word."""
    try:
        return receiver.recv_bytes() if receiver.poll(timeout) else "timeout"
    except EOFError:
        return None


def _stop(process: Any) -> None:
    """With all that it has started, which is in its group."""
    process.join(0.5)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    if process.is_alive():
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()


def _death(exitcode: int | None) -> Failure:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        if name == "SIGKILL":
            return Failure(kind="out of memory", message="killed by the system (SIGKILL), as it does without memory")
        return Failure(kind="crash", message=f"died of {name}")
    return Failure(kind="crash", message=f"ended with exit code {exitcode} and without a result")


def _child(
    sender: Connection, work: Callable[..., Any], arguments: tuple[Any, ...], kind_of: Callable[[BaseException], Any]
) -> None:
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    # What libraries have made is not to be looked at whenever a measurement collects its garbage: 0.3 s each time.
    gc.freeze()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Ctrl-C is the parent's business, which stops this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watch = Waiting()
    try:
        message = _Message(result=msgspec.Raw(msgspec.json.encode(work(*arguments))))
    except BaseException as error:  # whatever it is, it is what this cell came to
        text = " ".join(str(error).split())[:LONGEST_MESSAGE]
        message = _Message(kind=kind_of(error), failure=f"{type(error).__name__}: {text}")
        if os.environ.get("RESNET_BK_TRACEBACKS"):
            traceback.print_exc(file=sys.stderr)
    message.waited = watch.share()
    with contextlib.suppress(BrokenPipeError):  # nobody is there to hear of it any more
        sender.send_bytes(msgspec.json.encode(message))
    sender.close()


def _end_with_parent() -> None:
    """A benchmark that was killed leaves nothing running."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class Waiting:
    """How much of its time this process waits for a processor that others have, from here on."""

    def __init__(self) -> None:
        self._before = _processor_seconds()

    def share(self) -> float | None:
        """Of the time in which its threads were ready; None where the system does not tell.

        Threads of one process wait for each other too, and the system does not say for whom one waits. But nobody can
        have waited longer for others than those had a processor.
        """
        before, now = self._before, _processor_seconds()
        if before is None or now is None:
            return None
        running, waiting, others = (after - earlier for after, earlier in zip(now, before, strict=True))
        waited = min(waiting, max(0.0, others))
        return waited / (waited + running) if running > 0 and waited >= 0 else None


def _processor_seconds() -> tuple[float, float, float] | None:
    """In which threads of this process had a processor, and waited for one, and in which others had one, the host of a
    virtual machine among them. Linux tells; others do not."""
    try:
        user, nice, system, _, _, irq, soft, stolen = map(float, _STAT.read_text(encoding="ascii").split()[1:9])
    except (OSError, ValueError):
        return None
    own, ticks = os.times(), user + nice + system + irq + soft + stolen
    return *_running_and_waiting(), ticks / os.sysconf("SC_CLK_TCK") - own.user - own.system


def _running_and_waiting() -> tuple[float, float]:
    """Seconds of all threads of this process."""
    running = waiting = 0.0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError):
            ran, waited, _ = task.read_text(encoding="ascii").split()
            running, waiting = running + float(ran) / 1e9, waiting + float(waited) / 1e9
    return running, waiting
