"""What training saw, one JSON object a line, and in TensorBoard where it is installed."""

import contextlib
import importlib.util
import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from resnet_bk.errors import UserError
from resnet_bk.files import write_text


class MetricsLog:
    """Appends entries to metrics.jsonl, and their numbers to ``tensorboard/`` beside it if TensorBoard is there."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        _keep_until(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        self._board: Any = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=first_step)

    def append(self, entry: dict[str, Any]) -> None:
        """Writes one entry, which has its ``step``. Numbers that JSON does not have become null.

        Raises:
            UserError: it could not be written (a full disk, say).
        """
        line = json.dumps({key: _finite(value) for key, value in entry.items()}, allow_nan=False) + "\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write {self._file.name}: {error.strerror}; free some space and go on with --resume"
            ) from error
        if self._board:
            for key, value in entry.items():
                if isinstance(value, float):
                    self._board.add_scalar(key, value, entry["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Every entry was flushed: what closing could still fail to write is one that append has reported.
        with contextlib.suppress(OSError):
            self._file.close()
        if self._board:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl, up to the first line that a kill cut short or that is otherwise damaged."""
    entries = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            entry = json.loads(line, parse_constant=_refuse)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict) or type(entry.get("step")) is not int:
            break
        entries.append(entry)
    return entries


def _keep_until(path: Path, step: int) -> None:
    """Drops what was logged after the checkpoint that training goes on from: it is about to be logged again."""
    kept = [entry for entry in read_metrics(path) if entry["step"] <= step]
    lines = [json.dumps({key: _finite(value) for key, value in entry.items()}) + "\n" for entry in kept]
    write_text(path, "".join(lines))


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
