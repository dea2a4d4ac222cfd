"""The description of the machine: complete, JSON-able, and discreet."""

import importlib.metadata
import json
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resnet_bk import environment
from resnet_bk.environment import describe_environment, peak_resident_bytes, summary_line

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def description():
    return describe_environment()


def strings_of(value):
    if isinstance(value, dict):
        for inner in value.values():
            yield from strings_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_of(inner)
    elif isinstance(value, str):
        yield value


def test_it_is_json(description):
    assert json.loads(json.dumps(description, allow_nan=False)) == description


def test_it_is_the_same_each_time(description):
    assert describe_environment() == description


def test_it_names_neither_host_nor_person_nor_folder(description):
    words = {word for text in strings_of(description) for word in re.split(r"[\s,;:()]+", text)}
    assert not words & {socket.gethostname(), platform.node(), Path.home().name}
    for text in strings_of(description):
        assert str(Path.home()) not in text
        assert str(ROOT) not in text
        assert not re.search(r"(^|\s)[/~]", text), "no path at all"


def test_it_says_what_this_machine_is(description):
    assert description["python"] == platform.python_version()
    assert description["packages"]["torch"] == importlib.metadata.version("torch")
    assert description["packages"]["resnet-bk"] == importlib.metadata.version("resnet-bk")
    hardware = description["hardware"]
    assert hardware["cpu"] and hardware["cores"] >= 1 and hardware["memory_bytes"] > 10**8
    assert hardware["threads"] == torch.get_num_threads()
    assert (hardware["gpu"] is None) == (not torch.cuda.is_available())


def test_packages_that_are_not_there_are_left_out(description, monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    assert list(describe_environment()["packages"]) == ["torch"]


def test_a_machine_that_tells_no_cpu_name_is_no_error(monkeypatch):
    monkeypatch.setattr(environment, "Path", lambda name: Path("/nowhere") / name.lstrip("/"))
    assert environment._cpu_name() == (platform.processor() or platform.machine())


@pytest.fixture
def commit_is_not_said(monkeypatch):
    monkeypatch.delenv("RESNET_BK_COMMIT", raising=False)


def git(folder, *arguments):
    identity = ["-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.usefixtures("commit_is_not_said")
def test_the_commit_is_the_checkouts_and_says_whether_it_was_edited(tmp_path, monkeypatch):
    module = tmp_path / "src" / "resnet_bk" / "environment.py"
    module.parent.mkdir(parents=True)
    module.write_text("first")
    monkeypatch.setattr(environment, "__file__", str(module))
    assert environment._commit() is None, "not a checkout"
    git(tmp_path, "init", "-q")
    assert environment._commit() is None, "nothing committed"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert environment._commit() == commit
    (tmp_path / "notes.txt").write_text("untracked")
    assert environment._commit() == commit
    module.write_text("second")
    assert environment._commit() == f"{commit}+changes"


@pytest.mark.usefixtures("commit_is_not_said")
def test_without_git_there_is_no_commit(monkeypatch):
    def absent(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", absent)
    assert environment._commit() is None


def test_the_summary_is_one_line(description):
    line = summary_line(description)
    assert "\n" not in line
    assert description["python"] in line and description["packages"]["torch"] in line
    gpu = {"name": "Some GPU", "memory_bytes": 1, "count": 1, "compute_capability": "9.0", "cuda": "13.0"}
    with_gpu = {**description, "hardware": {**description["hardware"], "gpu": gpu}}
    assert summary_line(with_gpu).startswith("Some GPU")


def test_the_most_memory_that_a_process_had_is_its_own():
    held = bytearray(b"1") * 2_000_000_000
    assert peak_resident_bytes() > 2_000_000_000
    # By the command's name: the package then loads no model.
    program = (
        "import sys; sys.argv[0] = 'resnet-bk';"
        "from resnet_bk.environment import peak_resident_bytes; print(peak_resident_bytes())"
    )
    child = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(child.stdout) < 1_000_000_000
    del held
    assert peak_resident_bytes() > 2_000_000_000


def test_a_commit_is_told_by_its_first_digits(monkeypatch):
    monkeypatch.setenv("RESNET_BK_COMMIT", "0123456789abcdef0123456789abcdef01234567+changes")
    assert describe_environment()["commit"] == "0123456789ab+changes"
