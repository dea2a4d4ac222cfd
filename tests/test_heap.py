"""What a CPU frees: it is used again without asking the system for pages, and the peak is as before."""

import json
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from resnet_bk.environment import describe_environment
from resnet_bk.heap import freed_memory, keep_freed_memory

PROGRAM = """
import json, re, resource, sys
import psutil
import torch
from resnet_bk.heap import freed_memory, give_back_freed_memory, keep_freed_memory

if sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
if sys.argv[1] == "keep":
    assert keep_freed_memory(torch.device("cpu")) and keep_freed_memory(torch.device("cpu"))
faults = []
for _ in range(50):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB, which glibc would map by themselves
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
held = psutil.Process().memory_info().rss
in_large_pages = sum(map(int, re.findall("AnonHugePages: *([0-9]+) kB", open("/proc/self/smaps").read())))
give_back_freed_memory()
given_back = held - psutil.Process().memory_info().rss
found = {"faults": faults, "peak": peak, "said": freed_memory(), "given_back": given_back, "large": in_large_pages}
print(json.dumps(found))
"""
PAGES = 2**26 // 4096
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@cache
def ran(*mode):
    result = subprocess.run([sys.executable, "-c", PROGRAM, *mode], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told")
def test_freed_memory_is_used_again_without_the_system():
    kept, returned = ran("keep"), ran("return")
    # Of all pages, not in each round: a small block that moves into a freed one leaves no room there for its like.
    assert sum(kept["faults"][2:]) < len(kept["faults"][2:]) * PAGES / 20
    assert min(returned["faults"][1:]) > PAGES / 2, "otherwise there is nothing to keep"
    assert (kept["said"], returned["said"]) == ("kept", "returned")
    assert kept["peak"] < returned["peak"] + 1.5 * 2**16, "in kB, one block more at most"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told")
def test_what_is_kept_can_be_given_back():
    assert ran("keep")["given_back"] > 2**26 * 0.9
    assert ran("return")["given_back"] < 2**20, "nothing was kept"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told")
@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[madvise]" not in LARGE_PAGES.read_text(), reason="pages are not ours to choose"
)
def test_what_is_kept_is_in_large_pages():
    kept, returned = ran("keep"), ran("return")
    assert kept["large"] > 2**16 * 0.9, "in kB, the block of each round but for its ends"
    assert returned["large"] < 2**16 * 0.1
    assert sum(kept["faults"]) < PAGES / 2, "a page of 2 MiB is one fault"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told")
def test_where_addresses_are_limited_none_are_taken_in_advance():
    limited = ran("keep", str(2**34))
    assert (limited["said"], limited["large"]) == ("kept", 0)
    assert sum(limited["faults"][2:]) < len(limited["faults"][2:]) * PAGES / 20


def test_a_gpus_host_is_left_alone(monkeypatch):
    monkeypatch.setattr("resnet_bk.heap._kept", False)
    assert not keep_freed_memory(torch.device("cuda"))
    assert freed_memory() == "returned"
    assert describe_environment()["hardware"]["freed_memory"] == "returned"


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr("resnet_bk.heap._kept", False)
    monkeypatch.setattr("resnet_bk.heap.ctypes.CDLL", lambda _: object())
    assert not keep_freed_memory(torch.device("cpu"))
    assert freed_memory() == "returned"
