"""The notebook: nothing is stored in it, and every cell does on this machine what its text says."""

import json
import math
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "colab.ipynb"
# A cell takes seconds; the rest is for a machine that is busy with other things.
SECONDS_OF_A_CELL = 120


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


def test_the_committed_notebook_is_valid_small_and_without_outputs(committed):
    nbformat.validate(committed)
    assert (committed.nbformat, committed.nbformat_minor) == (4, 5)
    identifiers = [cell.id for cell in committed.cells]
    assert len(set(identifiers)) == len(identifiers)
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.id for cell in code if cell.outputs or cell.execution_count is not None] == []
    assert NOTEBOOK.stat().st_size < 50_000


@pytest.fixture(scope="module")
def executed(committed, tmp_path_factory):
    """The notebook after a fresh kernel ran it, by cell, and the folder where it ran."""
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SOURCE", "FOLDER", "GPU_MEMORY", "STEPS"):
            patch.delenv(f"RESNET_BK_{name}", raising=False)
        patch.setenv("RESNET_BK_NOTEBOOK", "small")
        # Some of what it reads otherwise, the standard library: tokenizing that takes as long as training.
        patch.setenv("RESNET_BK_DATA", str(Path(json.__file__).parents[1] / "[a-d]*.py"))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # the small settings are a CPU's, whatever else is here
        patch.setenv("RESNET_BK_CACHE", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other gain nothing at this size
        # This environment's kernel, whatever kernels, settings and history the user has.
        patch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(folder / "jupyter"))
        notebook = nbformat.from_dict(committed)
        place = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=SECONDS_OF_A_CELL, kernel_name="python3", resources=place).execute()
    return folder, {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


@pytest.fixture
def said(executed):
    """What a cell printed."""
    _, cells = executed
    return lambda name: "".join(output.text for output in cells[name].outputs if output.output_type == "stream")


@pytest.mark.slow
def test_every_cell_runs_and_none_fails(executed):
    _, cells = executed
    assert [name for name, cell in cells.items() if cell.execution_count is None] == []
    outputs = [(name, output) for name, cell in cells.items() for output in cell.outputs]
    assert [(name, output.ename) for name, output in outputs if output.output_type == "error"] == []
    assert [(name, output.text) for name, output in outputs if output.get("name") == "stderr"] == []


@pytest.mark.slow
def test_what_is_installed_already_is_not_installed_again(said):
    assert said("install") == "ResNet-BK is installed\n"


@pytest.mark.slow
def test_the_plan_says_what_fits(said):
    _, asked, answer = said("plan").partition("$ resnet-bk plan --preset 100m ")
    assert asked
    assert "99.0 million parameters  bf16, everything on the device: " in answer, "a host of some GB has room for it"
    assert "a step of 16 x 64 = 1,024 tokens" in said("plan-whole")
    assert "Fastest that fits, on h100: bf16, everything on the device" in said("plan-whole")


@pytest.mark.slow
def test_training_chose_its_strategy_within_the_budget(said):
    assert "--gpu-memory" in said("train").partition("\n")[0]
    assert "on cpu, fp32" in said("train"), "the fastest that fits"
    assert "\x1b[" not in said("train"), "plain lines and no live display"


@pytest.mark.slow
def test_the_model_learned_more_than_how_frequent_tokens_are(executed, said):
    run = executed[0] / "runs" / "notebook-small" / "run"
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["training"]["steps"] == 60
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < losses[0] - 1
    words = said("eval").split()
    loss, entropy = float(words[words.index("loss") + 1]), float(words[words.index("entropy") + 1])
    assert 0 < loss < entropy < math.log(257)


@pytest.mark.slow
def test_the_loss_is_plotted(executed):
    _, cells = executed
    assert any("image/png" in output.get("data", {}) for output in cells["plot"].outputs)


@pytest.mark.slow
def test_the_model_writes_by_the_command_and_from_python(said):
    _, command, text = said("generate").partition("def main('")
    assert command
    assert len(text) > 40
    first, _, written = said("python").partition("\n\n")
    assert "44,456 parameters" in first
    assert written.startswith("class Node:\n")
    assert len(written) > len("class Node:\n") + 20


@pytest.mark.slow
def test_the_report_is_written_and_shown(executed):
    folder, cells = executed
    pdf = folder / "runs" / "notebook-small" / "bench" / "report.pdf"
    assert pdf.read_bytes().startswith(b"%PDF-")
    (output,) = cells["pdf"].outputs
    assert 'download="report.pdf"' in output.data["text/html"]
    assert "data:application/pdf;base64,JVBER" in output.data["text/html"]
