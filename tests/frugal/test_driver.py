"""Streams beside the computation."""

import subprocess
import sys

import pytest
import torch

from resnet_bk.frugal import driver as module
from resnet_bk.frugal.driver import MOST_STREAMS, side_stream

# In a process of its own: what the driver takes of the card for the first stream, and whether a copy on it is right.
ON_A_GPU = """
import torch
from resnet_bk.frugal.driver import side_stream
device = torch.device("cuda")
x = torch.arange(1_000_000, device=device)
x.sum().item()
before, _ = torch.cuda.mem_get_info()
stream = side_stream(device)
torch.cuda.synchronize()
taken = before - torch.cuda.mem_get_info()[0]
stream.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(stream):
    y = x.to("cpu", non_blocking=True)
    ended = stream.record_event()
ended.synchronize()
print(taken, int((y == torch.arange(1_000_000)).all()))
"""


def test_a_cpu_has_none():
    assert side_stream(torch.device("cpu")) is None


def test_each_is_another_until_there_are_enough(monkeypatch):
    monkeypatch.setattr(module, "_new_stream", lambda device: (device, object()))
    monkeypatch.setattr(module, "_made", type(module._made)(list))
    monkeypatch.setattr(module, "_given", type(module._given)(int))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    device = torch.device("cuda")
    given = [side_stream(device) for _ in range(2 * MOST_STREAMS)]
    assert len(set(given)) == MOST_STREAMS
    assert given[:MOST_STREAMS] == given[MOST_STREAMS:]
    assert {where for where, _ in given} == {torch.device("cuda", 1)}
    assert side_stream(torch.device("cuda", 1)) is given[0]
    assert side_stream(torch.device("cuda", 0)) not in given


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_one_takes_next_to_nothing_of_a_card():
    answer = subprocess.run([sys.executable, "-c", ON_A_GPU], capture_output=True, text=True, check=True).stdout
    taken, right = map(int, answer.split())
    assert right
    assert taken < 16_000_000
