"""Writing files so that nothing is ever lost: to a temporary name first, then renamed into place."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resnet_bk.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes ``content`` to ``path`` atomically: a reader sees the old file or the new one, never a part."""
    with _reporting_disk_errors(path):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically. NaN and infinity are refused: JSON has no such numbers."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); restore it from a copy or make it again") from None


def make_directory(path: Path) -> None:
    """Makes a folder and those above it, where they are missing.

    Raises:
        UserError: it cannot be made.
    """
    with _reporting_disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def check_writable(path: Path) -> None:
    """Raises a UserError if the folder ``path`` is not there and could not be made; leaves nothing behind."""
    with _reporting_disk_errors(path):
        if path.is_file():
            raise UserError(f"{path} is a file; choose another place")
        present = path
        missing: list[str] = []
        while not present.exists() and present.parent != present:
            present, missing = present.parent, [*missing, present.name]
        if missing:
            Path(tempfile.mkdtemp(dir=present, prefix=f".{max(missing, key=len)}.")).rmdir()


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder beside ``path``; when the block ends well it becomes ``path``.

    If the block fails (a full disk, Ctrl-C) the temporary folder is removed and ``path`` is untouched.
    """
    with _reporting_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    _sync(file)
            temporary.chmod(0o755)
            temporary.replace(path)
            _sync(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _reporting_disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        mend = "free some space or choose another place" if error.errno in FULL else "choose another place"
        raise UserError(f"cannot write {path}: {reason}; {mend}") from error
