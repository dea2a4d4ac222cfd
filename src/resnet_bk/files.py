"""Writing files so that nothing is ever lost: to a temporary name first, then renamed into place."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from resnet_bk.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCK = ".lock"
# What a file system says that has no locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


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


def from_home(name: str) -> Path:
    """A path in which ``~`` is one's home; as it is written where that is nobody's."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def make_directory(path: Path) -> None:
    """Makes a folder and those above it, where they are missing.

    Raises:
        UserError: it cannot be made.
    """
    with _reporting_disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def check_writable(path: Path) -> None:
    """Raises a UserError if the folder ``path`` is not there and could not be made; leaves nothing behind."""
    try:
        str(path).encode()
    except UnicodeEncodeError:  # safetensors and typst take no such path
        raise UserError(f"the name {str(path)!r} is not UTF-8; choose another place") from None
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


@contextmanager
def sole_use(folder: Path, complaint: str) -> Iterator[None]:
    """Keeps others who ask for the sole use of ``folder`` out, until the block or this process ends, however it does.

    The folder is made where it is missing, and is gone again if the block leaves nothing in it. The lock is the
    system's own (``flock`` of a file in the folder): a process that was killed leaves none, and programs that it had
    started do not inherit it. Where there are no such locks (Windows, some network file systems) nobody is kept out.

    Raises:
        UserError: ``complaint`` if another has it, or the folder cannot be made or written to.
    """
    with _reporting_disk_errors(folder):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(folder / LOCK)
    if descriptor is None:
        raise UserError(complaint)
    try:
        yield
    finally:
        with suppress(OSError):  # the folder may have been removed meanwhile
            (folder / LOCK).unlink()
        os.close(descriptor)
        with suppress(OSError):  # the first that is not empty ends it
            for path in missing:
                path.rmdir()


def _locked(path: Path) -> int | None:
    """The file ``path``, open and locked; None if another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        free = kept = False
        try:
            free = _lock(descriptor)
            kept = free and _is_at(path, descriptor)
        finally:
            if not kept:
                os.close(descriptor)
        if kept:
            return descriptor
        if not free:
            return None


def _is_at(path: Path, descriptor: int) -> bool:
    """Not if who had the lock removed the file after it was opened here: then nobody else would find it locked."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


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
