"""How training shows itself: a live line on a terminal, plain lines elsewhere."""

from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from resnet_bk.cli.console import progress_console, remark


class TrainingProgress:
    """Shows step, loss, perplexity, tokens/s, memory, the busiest expert's share and the time left."""

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._live = progress_console.is_terminal and not silent
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=progress_console,
            disable=not self._live,
        )
        self._task: TaskID | None = None
        self._total = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, *, total: int, completed: int) -> None:
        """Starts the display."""
        self._total = total
        self._progress.start()
        self._task = self._progress.add_task("", total=total, completed=completed)

    def observe(self, entry: dict[str, Any]) -> None:
        """Hears of every step; speaks at logged ones, and where a step did not fit."""
        if self._silent:
            return
        if "micro_batch_size" in entry:
            self._progress.console.print(
                f"out of memory: going on with micro-batches of {entry['micro_batch_size']} rows, the same batch and "
                "the same gradients",
                soft_wrap=True,
            )
            return
        if "no_cuda_graphs" in entry:
            words = f"{entry['no_cuda_graphs']}: going on without CUDA graphs, the same but slower"
            self._progress.console.print(words, soft_wrap=True)
            return
        if self._task is not None:
            self._progress.update(self._task, completed=entry["step"])
        if "validation_loss" in entry:
            self._progress.console.print(
                f"step {entry['step']:>6,}  held-out loss {entry['validation_loss']:.4f} nats a token "
                f"({entry['validation_tokens']:,} tokens)",
                soft_wrap=True,
            )
        elif "loss" in entry:
            line = _line(entry)
            if self._live and self._task is not None:
                self._progress.update(self._task, description=line)
            else:
                remark(f"step {entry['step']:>6,}/{self._total:,}  {line}{_time_left(entry, self._total)}")


def _line(entry: dict[str, Any]) -> str:
    return (
        f"loss {entry['loss']:.4f}  ppl {entry['perplexity']:.1f}  {entry['tokens_per_second']:,.0f} tok/s  "
        f"{_memory()}  busiest expert {entry['expert_load_max']:.0%}"
    )


def _time_left(entry: dict[str, Any], total: int) -> str:
    tokens_per_step = entry["tokens"] / entry["step"]
    seconds = (total - entry["step"]) * tokens_per_step / entry["tokens_per_second"]
    return f"  {seconds / 60:.1f} min left"


def _memory() -> str:
    import psutil
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB on the GPU"
    return f"{psutil.Process().memory_info().rss / 1e9:.2f} GB"
