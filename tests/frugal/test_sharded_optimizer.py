"""The optimizer on the host with parameters that two processes share."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sharded_steps.py")


@pytest.mark.slow
def test_sharded_parameters_are_updated_as_torch_does_clipped_and_in_backward():
    # One after the other in the same processes, which take seconds to begin.
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(SCRIPT),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["clipped", "in-backward"]
