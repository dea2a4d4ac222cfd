"""How a benchmark shows itself: a live line with the time left on a terminal, a line a cell elsewhere."""

from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from resnet_bk.cli.console import progress_console, remark

if TYPE_CHECKING:
    from resnet_bk.bench.suite import Progress


class BenchmarkProgress:
    """Hears of every cell that begins and ends."""

    def __init__(self) -> None:
        self._live = progress_console.is_terminal
        self._bar = Bar(
            TextColumn("cells"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False),
            console=progress_console,
            disable=not self._live,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def observe(self, event: "Progress") -> None:
        """Shows it; what went wrong stays on the screen."""
        left = "" if event.seconds_left is None else f", {_in_words(event.seconds_left)} left"
        if self._task is None:
            self._task = self._bar.add_task("", total=event.total)
        self._bar.update(self._task, completed=event.done, total=event.total, description=f"{event.cell}{left}")
        if event.status is None:
            return
        failure = event.status.failure
        told = f"{event.status.seconds:.1f} s" if failure is None else f"{failure.kind}: {failure.message}"
        if failure is not None or not self._live:
            remark(f"[{event.done}/{event.total}] {event.cell}: {told}{left}")


def _in_words(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {max(1, round(seconds)):.0f} s"
