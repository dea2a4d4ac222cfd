"""What machine and which versions: a JSON-able description without names of people, hosts or folders."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from resnet_bk.heap import freed_memory

PACKAGES = ("resnet-bk", "torch", "transformers", "tokenizers", "triton", "numba", "numpy", "typst", "matplotlib")


def describe_environment() -> dict[str, Any]:
    """Hardware, operating system, versions and the commit of this package's own checkout (None outside of one)."""
    return {
        "hardware": _hardware(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
    }


def summary_line(environment: dict[str, Any]) -> str:
    """The machine and the versions that matter, in one line."""
    hardware, packages = environment["hardware"], environment["packages"]
    machine = hardware["gpu"]["name"] if hardware["gpu"] else f"{hardware['cpu']}, {hardware['threads']} threads"
    return f"{machine}; Python {environment['python']}, torch {packages.get('torch', 'not installed')}"


def peak_resident_bytes() -> int:
    """The most memory that this process has had in RAM at once.

    On Linux it is the address space's own mark: what getrusage calls the most resident begins, in a new process, with
    what the parent had that started it.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        import resource

        # macOS counts bytes, other systems kB.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _hardware() -> dict[str, Any]:
    import psutil
    import torch

    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "count": torch.cuda.device_count(),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "freed_memory": freed_memory(),
        "gpu": gpu,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def short_commit(commit: str) -> str:
    """With 12 digits of its name, and whatever follows them."""
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]{28}", r"\1", commit)


def _commit() -> str | None:
    """Commit of the checkout this file lives in, with ``+changes`` if it has been edited since.

    A copy without its history (a container, a cluster's scratch disk) can say it by $RESNET_BK_COMMIT.
    """
    if said := os.environ.get("RESNET_BK_COMMIT"):
        return short_commit(said)
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    return f"{commit}+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit


def _git(root: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
