"""Host memory: exact in size, marked, and counted apart."""

import pytest
import torch

from resnet_bk.frugal.host import ALIGNMENT, host_arena, host_empty, is_host_memory
from resnet_bk.memory.tracking import TensorTracker


@pytest.mark.parametrize("numel", [1, 1000, 2**20 + 1])
def test_pinned_memory_doubled_by_rounding(numel):
    # A pool of powers of two would take 2**21 elements for 2**20 + 1.
    tensor = host_empty(numel, dtype=torch.float32)
    assert tensor.untyped_storage().nbytes() == 4 * numel
    if torch.cuda.is_available():
        assert tensor.is_pinned()


def test_host_memory_is_known_as_such_until_it_is_freed():
    tensor = host_empty(3, 5, dtype=torch.bfloat16)
    assert tensor.shape == (3, 5)
    assert is_host_memory(tensor)
    assert is_host_memory(tensor[1:])
    assert not is_host_memory(tensor.clone())
    del tensor
    assert not any(is_host_memory(torch.empty(3, 5, dtype=torch.bfloat16)) for _ in range(100))


def test_the_tracker_counts_it_apart():
    with TensorTracker() as tracker:
        host = host_empty(1000, dtype=torch.float32).zero_()
        device = torch.zeros(10)
        assert (tracker.current_bytes, tracker.host_bytes) == (40, 4000)
        del host
        assert (tracker.current_bytes, tracker.host_bytes) == (40, 0)
        del device
    assert (tracker.peak_bytes, tracker.peak_host_bytes) == (40, 4000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_arena_is_one_piece_with_aligned_parts(dtype):
    shapes = [(3,), (5, 7), (), (0, 4), (64,)]
    parts = host_arena(shapes, dtype)
    assert [tuple(part.shape) for part in parts] == shapes
    assert len({part.untyped_storage()._cdata for part in parts}) == 1
    first = parts[0].data_ptr()
    assert all((part.data_ptr() - first) % ALIGNMENT == 0 for part in parts)
    used = sum(part.numel() for part in parts) * dtype.itemsize
    assert parts[0].untyped_storage().nbytes() <= used + len(shapes) * ALIGNMENT
    for number, part in enumerate(parts):
        part.fill_(number)
    assert all((part == number).all() for number, part in enumerate(parts))


def test_an_arena_of_nothing():
    assert host_arena([], torch.float32) == []
