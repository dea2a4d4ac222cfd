"""Writing files: whole or not at all, and errors that name the mend."""

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_bk.errors import UserError
from resnet_bk.files import (
    check_writable,
    from_home,
    make_directory,
    new_directory,
    read_json,
    sole_use,
    write_bytes,
    write_json,
    write_text,
)

no_space = pytest.raises(UserError, match="No space left on device; free some space or choose another place")


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(params=["fsync", "fdopen", "replace"])
def disk_that_fills(request, monkeypatch):
    """Writing fails: before the first byte, once all are there, or at the rename."""
    target = Path if request.param == "replace" else os
    monkeypatch.setattr(target, request.param, full_disk)


def test_what_is_written_is_what_is_read(tmp_path):
    write_bytes(tmp_path / "a", b"\x00\xff")
    write_text(tmp_path / "b", "naïve → 漢字\n")
    write_json(tmp_path / "c", {"x": [1, None, "→"]})
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b").read_text(encoding="utf-8") == "naïve → 漢字\n"
    assert read_json(tmp_path / "c") == {"x": [1, None, "→"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_writing_replaces_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("a longer text than the new one")
    write_text(path, "new")
    assert path.read_text() == "new"


def test_others_may_read_what_is_written(tmp_path):
    write_text(tmp_path / "file", "x")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
    with new_directory(tmp_path / "folder") as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, "nobody looks in before it is whole"
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_json_comes_back_as_it_was(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value


@pytest.mark.usefixtures("disk_that_fills")
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "file").write_text("old")
    with no_space:
        write_text(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_ctrl_c_in_the_middle_of_a_write_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("sync"), fsync(descriptor))[1])
    monkeypatch.setattr(Path, "replace", lambda old, new: (events.append("rename"), replace(old, new))[1])
    write_text(tmp_path / "file", "x")
    assert events == ["sync", "rename"]
    events.clear()
    with new_directory(tmp_path / "folder") as folder:
        (folder / "a").write_text("a")
        (folder / "b").write_text("b")
    assert events == ["sync", "sync", "rename", "sync"], "two files, the rename, and the folder that it changed"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_does_not_have_are_refused_before_anything_is_touched(tmp_path, number):
    path = tmp_path / "file.json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": [number]})
    assert json.loads(path.read_text()) == {"x": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize("write", [write_text, write_json])
def test_a_folder_that_is_not_there_is_the_users_to_mend(tmp_path, write):
    with pytest.raises(UserError, match=r"cannot write .*: No such file or directory; .*choose another place"):
        write(tmp_path / "absent" / "file", "x")


def test_a_path_below_a_file_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "below"
    for attempt in (
        lambda: write_text(below, "x"),
        lambda: make_directory(below),
        lambda: new_directory(below).__enter__(),
    ):
        with pytest.raises(UserError, match="choose another place"):
            attempt()
    assert (tmp_path / "file").read_bytes() == b""


def test_making_a_folder_makes_those_above_and_minds_none_that_is_there(tmp_path):
    make_directory(tmp_path / "a" / "b")
    make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize(
    ("content", "mend"),
    [(None, "does not exist; check the path"), (b"", "restore it"), (b"{", "restore it"), (b"\xff{}", "restore it")],
)
def test_json_that_cannot_be_read_says_what_to_do(tmp_path, content, mend):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=mend) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="restore it"):
        read_json(tmp_path)


def test_a_new_folder_appears_whole(tmp_path):
    path = tmp_path / "above" / "folder"
    with new_directory(path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
        assert not path.exists()
        assert folder.parent == path.parent, "a rename must not leave the file system"
    assert (path / "inner" / "file").read_text() == "x"
    assert [found.name for found in path.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_folder_whose_making_fails_never_appears(tmp_path, error):
    with pytest.raises(error), new_directory(tmp_path / "folder") as folder:
        (folder / "file").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_inside_a_new_folder_is_the_users_to_mend(tmp_path):
    with no_space, new_directory(tmp_path / "folder") as folder:
        (folder / "file").write_text("x")
        full_disk()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_disk_that_fills_as_a_new_folder_is_named_leaves_nothing(tmp_path, monkeypatch, place):
    monkeypatch.setattr(os if place == "fsync" else Path, place, full_disk)
    with no_space, new_directory(tmp_path / "folder") as folder:
        (folder / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    with pytest.raises(UserError, match="choose another place"), new_directory(tmp_path / "folder") as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["old"]


# Loads the two modules alone: the whole package would take seconds, and nothing here needs it.
TOO_LARGE = """
import importlib.util, resource, signal, sys, types
from pathlib import Path
source = Path(sys.argv[1])
sys.modules["resnet_bk"] = types.ModuleType("resnet_bk")
for name in ("errors", "files"):
    spec = importlib.util.spec_from_file_location(f"resnet_bk.{name}", source / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    module.write_bytes(Path(sys.argv[2]), b"x" * 5000)
except sys.modules["resnet_bk.errors"].UserError as error:
    print(error)
"""


def test_a_real_write_that_fails_halfway_leaves_the_old_file(tmp_path):
    source = Path(sys.modules[write_bytes.__module__].__file__).parent
    target = tmp_path / "file"
    target.write_text("old")
    command = [sys.executable, "-c", TOO_LARGE, str(source), str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"cannot write {target}: File too large; free some space or choose another place\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "old"


@pytest.mark.parametrize("name", ["new", "new/below/it", "."])
def test_asking_whether_a_folder_could_be_made_leaves_nothing_behind(tmp_path, name):
    check_writable(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/below", 300 * "x", f"new/{300 * 'x'}/below", f"new/{250 * 'x'}"])
def test_a_folder_that_cannot_be_made_is_found_out_before_it_is_needed(tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="choose another place"):
        check_writable(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


in_use = pytest.raises(UserError, match=r"^somebody has it$")


def sole_use_of(folder):
    return sole_use(folder, "somebody has it")


def test_a_folder_in_sole_use_is_nobody_elses_until_the_block_ends(tmp_path):
    (tmp_path / "file").touch()
    for error in (None, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt) if error else nullcontext(), sole_use_of(tmp_path):
            for _ in range(2):
                with in_use, sole_use_of(tmp_path):
                    pytest.fail("both had it")
            if error:
                raise error
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("left", [[], ["a"], ["a", "a/b"]], ids=str)
def test_a_folder_that_was_made_for_sole_use_stays_if_something_is_in_it(tmp_path, left):
    with sole_use_of(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
        if left:
            (tmp_path / left[-1] / "file").touch()
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_dir()}
    assert found == set(left)


def test_a_folder_that_was_there_stays_though_it_is_empty(tmp_path):
    with sole_use_of(tmp_path):
        pass
    assert tmp_path.is_dir()


HOLDER = """
import subprocess, sys, time
from pathlib import Path
from resnet_bk.files import sole_use
with sole_use(Path(sys.argv[1]), "it is in use"):
    child = subprocess.Popen(["sleep", "120"], stdout=subprocess.DEVNULL, close_fds=False)
    print(child.pid, flush=True)
    time.sleep(120)
"""


def test_a_process_that_was_killed_holds_nothing_though_one_that_it_started_lives(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        child = int(holder.stdout.readline())
        try:
            with in_use, sole_use_of(tmp_path):
                pytest.fail("both had it")
            holder.kill()
            holder.wait()
            with sole_use_of(tmp_path):
                os.kill(child, 0)
        finally:
            holder.kill()
            os.kill(child, signal.SIGKILL)


def test_a_lock_whose_file_was_removed_meanwhile_counts_for_nothing(tmp_path, monkeypatch):
    """Who had it removes the file between another's opening and locking it; a third would make a file anew."""
    flock, removed = fcntl.flock, []

    def late(descriptor, operation):
        if not removed:
            removed.append(next(tmp_path.iterdir()))
            removed[0].unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with sole_use_of(tmp_path), in_use, sole_use_of(tmp_path):
        pytest.fail("both had it")
    assert removed


def test_without_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refused)
        with sole_use_of(tmp_path), sole_use_of(tmp_path):
            pass
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with sole_use_of(tmp_path), sole_use_of(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_fails_otherwise_is_told_of(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(UserError, match="Input/output error; choose another place"), sole_use_of(tmp_path):
        pytest.fail("it was had")


def test_an_error_of_the_block_is_not_taken_for_the_locks(tmp_path):
    with pytest.raises(OSError, match="No space left"), sole_use_of(tmp_path):
        full_disk()


@pytest.mark.parametrize("name", ["file", "file/below", 300 * "x"])
def test_sole_use_of_what_can_be_no_folder_is_the_users_to_mend(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another place"), sole_use_of(tmp_path / name):
        pytest.fail("it was had")


def test_a_home_is_found_and_nobodys_is_a_name_like_others(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert from_home("~/text") == Path("/home/somebody/text")
    assert from_home("~nobody-of-this-name/text") == Path("~nobody-of-this-name/text")
