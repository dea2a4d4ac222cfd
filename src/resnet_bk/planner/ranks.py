"""Ranks that are imagined, so that one process traces what each of many would do: all that it hears is made up."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from resnet_bk.errors import UserError
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.distributed import World

# More than this share nothing that a group of GPUs would not share better in another way.
MOST_RANKS = 4096


@contextmanager
def imagined_ranks(ranks: int) -> Iterator[tuple[World, DeviceMesh]]:
    """This process as rank 0 of so many on one machine, connected by torch's fake process group, which says nothing.

    Raises:
        ValueError: this process has joined others already.
    """
    if dist.is_initialized():
        raise ValueError("this process is a rank already; trace several ranks in a process of its own")
    # It registers the backend, and is not there in every build of torch.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        # Before tensors are fake: a mesh is asked for numbers.
        yield World(rank=0, size=ranks, local_rank=0), init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()


def of_one_rank(training: TrainingConfig, ranks: int) -> TrainingConfig:
    """What each of ``ranks`` does of a step: its rows of the batch. ``micro_batch_size`` is a rank's already.

    Raises:
        UserError: the ranks cannot have equally many.
    """
    if not 1 <= ranks <= MOST_RANKS:
        raise UserError(f"num_gpus is {ranks}; give a number from 1 to {MOST_RANKS}")
    World(size=ranks).rows(training.batch_size)
    return replace(training, batch_size=training.batch_size // ranks)
