"""One small run, trained once, and ways to call the command line on copies of it."""

import json
import shutil
from dataclasses import dataclass

import pytest
import torch
from small_run import TEXT, TRAINING

from resnet_bk.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """What a call of the command line came to."""

    code: int
    out: str
    err: str

    @property
    def document(self):
        """Standard output as the one JSON document that it must be; whatever else is there fails."""
        assert self.code == 0, self.err
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture(autouse=True)
def one_thread():
    """Such small tensors are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cli(capfd):
    """Calls ``main`` with the words given."""

    def call(*words):
        capfd.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("token-cache")


@pytest.fixture(autouse=True)
def own_token_cache(cache_folder, monkeypatch):
    monkeypatch.setenv("RESNET_BK_CACHE", str(cache_folder))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, cache_folder):
    """A folder with ``book.txt`` and ``run``, which was trained on it for 4 steps."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "book.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESNET_BK_CACHE", str(cache_folder))
        patch.chdir(folder)
        torch.set_num_threads(1)
        assert main(["train", "--data", "book.txt", "--out", "run", *TRAINING]) == 0
    return folder


@pytest.fixture
def workspace(finished_run, tmp_path, monkeypatch):
    """The current folder: a copy of the book and its run, and files that are no good."""
    folder = tmp_path / "workspace"
    shutil.copytree(finished_run, folder)
    monkeypatch.chdir(folder)
    return folder
