"""A run that is killed at any moment, as often as one likes, ends as if it had been left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_training import assert_same_state, metrics_without_times

from resnet_bk.training.checkpoint import checkpoints, step_of

PROGRAM = Path(__file__).with_name("killed_again_and_again.py")
KILLS = 20


@pytest.mark.slow
def test_a_run_killed_20_times_is_bitwise_the_run_left_alone(tmp_path, text_file):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(text_file), str(tmp_path), str(KILLS), "0"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "RESNET_BK_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    whole = Path(outcome["whole"])
    assert outcome["killed"] == KILLS
    assert outcome["without_a_run"] >= 1, "no kill came before the run's folder"
    assert outcome["in_a_save"] >= 1, "no kill came in the middle of a save"
    expected = checkpoints(whole / "checkpoints")
    assert [step_of(path) for path in expected] == [78, 80]
    for out in map(Path, outcome["runs"]):
        found = checkpoints(out / "checkpoints")
        assert sorted((out / "checkpoints").iterdir()) == found, "what the kills left half written is cleared away"
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same_state(ours, theirs)
        assert metrics_without_times(out) == metrics_without_times(whole)
