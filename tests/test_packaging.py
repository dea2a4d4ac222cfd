"""The wheel: what is in it, and that it works where nothing of this checkout is."""

import email
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "resnet_bk"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    # With the build backend at hand nothing needs to be downloaded.
    isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    command = [sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert archive.testzip() is None
    wanted = {
        path.relative_to(SOURCE.parent).as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == wanted
    assert "resnet_bk/py.typed" in held
    assert any(name.startswith("resnet_bk/report/") and not name.endswith(".py") for name in held), "the template"


def test_the_wheel_runs_on_any_platform_and_names_its_license(wheel, metadata):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert (metadata["Name"], metadata["License-Expression"]) == ("resnet-bk", "Apache-2.0")
    assert metadata.get_all("License-File") == ["LICENSE"]
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(name) == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_describes_itself_by_the_readme(metadata):
    assert metadata["Description-Content-Type"] == "text/markdown"
    described = metadata.get_payload(decode=True).decode("utf-8")  # as text it would be read as ASCII
    assert described.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_the_wheel_brings_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        assert "resnet-bk = resnet_bk.cli.main:main" in archive.read(name).decode().splitlines()


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory):
    """A virtual environment with the wheel in it, and an empty folder: ``call(*words)`` runs a program of it there.

    What the wheel depends on is borrowed from the environment of the tests, through a .pth file: it comes after the
    environment's own folder, and .pth files inside a folder that a .pth file names are not read, so that an editable
    install of this checkout is out of reach.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    environment, home, empty = folder / "venv", folder / "home", folder / "empty"
    home.mkdir()
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    install = ["install", "--quiet", "--no-index", "--no-deps", "--no-compile", str(wheel)]
    subprocess.run([*pip, *install], check=True, capture_output=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "borrowed.pth").write_text("".join(f"{path}\n" for path in sorted(borrowed)))
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "RESNET_BK", "VIRTUAL"))}
    variables = {**clean, "HOME": str(home), "XDG_CACHE_HOME": str(home), "HF_HUB_OFFLINE": "1"}

    def call(program, *words):
        result = subprocess.run(
            [environment / "bin" / program, *words],
            cwd=empty,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    call.folder, call.environment = empty, environment
    return call


def test_the_installed_package_is_the_wheels(elsewhere):
    program = "import importlib.util, sys; print(importlib.util.find_spec('resnet_bk').origin); print(sys.path)"
    file, path = elsewhere("python", "-c", program).splitlines()
    assert Path(file).is_relative_to(elsewhere.environment)
    assert str(ROOT / "src") not in path
    assert str(ROOT) not in {part.strip(" '") for part in path.strip("[]").split(",")}


# One command after another, as the script of their name calls it, in one process: it takes seconds to begin.
COMMANDS = """
import json, sys
from resnet_bk.cli.main import main

for words in json.loads(sys.argv[1]):
    assert main(words) == 0, words
"""


def documents(text):
    """JSON, one behind the other."""
    while text := text.lstrip():
        document, end = json.JSONDecoder().raw_decode(text)
        yield document
        text = text[end:]


def test_the_installed_command_plans_trains_evaluates_and_generates(elsewhere):
    document = json.loads(elsewhere("python", "-m", "resnet_bk", "env", "--json"))
    assert document["commit"] is None, "there is no checkout around it"
    assert document["packages"]["resnet-bk"]

    plan = json.loads(elsewhere("resnet-bk", "plan", "--preset", "tiny", "--json"))
    assert plan["parameters"]["total"] > 0
    assert list(elsewhere.folder.iterdir()) == []

    (elsewhere.folder / "book.txt").write_text("It was the best of times, it was the worst of times.\n" * 40)
    # Long enough that the text does not end at once.
    sizes = ("--preset", "tiny", "--steps", "40", "--batch-size", "2", "--sequence-length", "16")
    text = ("--data", "book.txt", "--tokenizer", "char")
    trained = json.loads(elsewhere("resnet-bk", "train", *sizes, *text, "--out", "run", "--json"))
    words = ("generate", "run", "--prompt", "It was", "--greedy", "--max-new-tokens", "5", "--json")
    said = elsewhere("python", "-c", COMMANDS, json.dumps([("eval", "run", "--json"), words]))
    evaluated, generated = documents(said)
    assert evaluated["loss"] == pytest.approx(trained["validation_loss"], rel=1e-6)
    assert generated["new_tokens"] == 5
    assert sorted(path.name for path in elsewhere.folder.iterdir()) == ["book.txt", "run"]
