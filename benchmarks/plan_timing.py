"""How long `resnet-bk plan` takes and how much memory, each call in a fresh process, beside what was asked of it.

    python benchmarks/plan_timing.py --out benchmarks/results/cpu/plan_timing.json

Asked: `plan --preset 1b` in less than 10 s on 2 cores; the 70B model, and the ladder up to it, in less than 60 s and
4 GiB of resident memory. Other processes may run beside it: the least time is the machine's own, the median what a user
had at that moment.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_bk.environment import describe_environment
from resnet_bk.files import write_json

GIB = 2**30
PATIENCE = 600.0  # seconds, after which a call hangs


@dataclass(frozen=True, kw_only=True)
class Call:
    """Arguments of `resnet-bk plan`, and the most seconds and bytes that were asked of them, if any were."""

    name: str
    arguments: str
    most_seconds: float | None = None
    most_bytes: int | None = None


CALLS = (
    Call(name="1b", arguments="--preset 1b", most_seconds=10.0),
    Call(
        name="1b, searched for a budget",
        arguments="--preset 1b --batch-size 128 --sequence-length 1024 --device h100 --gpu-memory 4GB",
        most_seconds=60.0,
        most_bytes=4 * GIB,
    ),
    Call(
        name="1b on 8 GPUs",
        arguments="--preset 1b --batch-size 64 --sequence-length 1024 --device h100 --num-gpus 8",
        most_seconds=60.0,
        most_bytes=4 * GIB,
    ),
    Call(
        name="70b, searched for a budget",
        arguments="--preset 70b --batch-size 8 --sequence-length 1024 --device h100",
        most_seconds=60.0,
        most_bytes=4 * GIB,
    ),
    Call(name="ladder to 70b", arguments="--ladder", most_seconds=60.0, most_bytes=4 * GIB),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--calls", nargs="+", metavar="NAME", help="those whose names contain one of these")
    arguments = parser.parse_args()
    chosen = [call for call in CALLS if not arguments.calls or any(name in call.name for name in arguments.calls)]
    rows = [measure(call, arguments.repeats) for call in chosen]
    document = {
        "what": "seconds and peak resident bytes of `resnet-bk plan`, each call in a fresh process",
        "repeats": arguments.repeats,
        "load_average": os.getloadavg(),
        "calls": rows,
        "environment": describe_environment(),
    }
    write_json(arguments.out, document)
    if not all(row["kept"] for row in rows):
        raise SystemExit("something took more than was asked")


def measure(call: Call, repeats: int) -> dict[str, Any]:
    """All repetitions of a call; prints as it goes. What was asked is kept if the least time and every peak do."""
    runs = [run(call) for _ in range(repeats)]
    seconds, sizes = [run["seconds"] for run in runs], [run["peak_resident_bytes"] for run in runs]
    in_time = call.most_seconds is None or min(seconds) < call.most_seconds
    in_memory = call.most_bytes is None or max(sizes) < call.most_bytes
    row = {
        "name": call.name,
        "command": f"resnet-bk plan {call.arguments}",
        "asked_seconds": call.most_seconds,
        "asked_bytes": call.most_bytes,
        "least_seconds": min(seconds),
        "median_seconds": statistics.median(seconds),
        "most_resident_bytes": max(sizes),
        "kept": in_time and in_memory,
        "runs": runs,
    }
    print(
        f"{call.name}: least {min(seconds):.1f} s, median {statistics.median(seconds):.1f} s, "
        f"{max(sizes) / 1e6:.0f} MB resident",
        flush=True,
    )
    return row


def run(call: Call) -> dict[str, Any]:
    """One process, with what its parent is told of it when it has ended."""
    command = [sys.executable, "-m", "resnet_bk", "plan", *call.arguments.split(), "--json"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        status, usage = _ended(process.pid, start + PATIENCE)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.stderr is not None
        errors = process.stderr.read().decode()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {errors[-2000:]}")
    return {
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_resident_bytes": usage.ru_maxrss * 1024,  # Linux counts in KiB
    }


def _ended(process_id: int, deadline: float) -> tuple[int, Any]:
    while True:
        ended, status, usage = os.wait4(process_id, os.WNOHANG)
        if ended:
            return status, usage
        if time.perf_counter() > deadline:
            os.kill(process_id, 9)
        time.sleep(0.01)


if __name__ == "__main__":
    main()
