"""benchmarks/sharded.py on a CPU: what is to run once on a machine with several GPUs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "sharded.py"
TINY = ("--device", "cpu", "--preset", "tiny", "--batch-size", "4", "--sequence-length", "16", "--vocab-size", "100")


def run(out, *more):
    command = [sys.executable, str(SCRIPT), "--out", str(out), *TINY, "--steps", "3", *more]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_ranks_agree_and_have_the_tensors_that_were_planned(tmp_path):
    document = run(tmp_path / "out.json")
    assert document["failures"] == []
    assert {(row["cell"], row["ranks"]) for row in document["agreement"]} == {
        (cell, ranks) for cell in ("tiny in fp32", "preset in bf16", "resumed") for ranks in (1, 2)
    }
    assert len(document["memory"]) == 6
    for row in document["memory"]:
        assert abs(row["error"]) < 2e-3


@pytest.mark.slow
def test_what_hangs_is_recorded(tmp_path):
    document = run(tmp_path / "out.json", "--launch-seconds", "0.5")
    assert len(document["failures"]) == 6
    assert all("ended after 0.5 s" in failure for failure in document["failures"])
