"""Training on several ranks: which of them this process is, what of a batch is its own, what they agree on.

``torchrun`` starts the same command once per rank. Each keeps its part of every weight, gradient and moment (FSDP2)
and learns from its rows of every batch; what is logged, saved and decided is that of all of them, so that a run does
not depend on how many there are. Without ``torchrun`` there is one rank, and nothing here does anything.

Whole weights are never on one GPU: a block is there while it computes, and one parameter at a time when a checkpoint
is written. Rank 0 does need them in host memory then, and once where a run starts.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Store  # type: ignore[attr-defined]  # torch leaves both out of its lists
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Shard

from resnet_bk.errors import UserError
from resnet_bk.layers import MixtureOfExperts
from resnet_bk.models import ResNetBKForCausalLM
from resnet_bk.ops.loss import IGNORE_INDEX

# Ranks wait for each other this long: for rank 0 while it cuts a text into tokens or writes a large checkpoint.
PATIENCE = timedelta(hours=2)
HEAD_START, SETTLING = 1.0, 0.3  # seconds
TELLER, LISTENERS = "rank that tells what went wrong", "ranks that know who tells"


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those that train together: ``rank`` of ``size``, ``local_rank`` on its machine.

    Methods with *Collective* in their first line return the same on every rank and must be called by all of them, in
    the same order. A world of one rank answers without asking anybody.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def current(cls) -> Self:
        """As ``torchrun``'s environment variables say; one rank without them.

        Raises:
            UserError: they make no sense.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return cls()
        values = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        if all(value.isdecimal() for value in values.values()):
            rank, size, local_rank = map(int, values.values())
            if rank < size and local_rank < size:
                return cls(rank=rank, size=size, local_rank=local_rank)
        words = " ".join(f"{name}={value}" for name, value in values.items())
        raise UserError(f"{words} is no rank among others; start with torchrun, or unset WORLD_SIZE")

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes files."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The GPU with this rank's local number, or the CPU where there is none."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def place(self, device: torch.device) -> torch.device:
        """What this rank computes on, where one process would on ``device``.

        Raises:
            UserError: there are more ranks than GPUs, or ``device`` names one GPU for all ranks.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        if device != torch.device(device.type):
            raise UserError(f"device {device} is one GPU for {self.size} ranks; use --device cuda, or one process")
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {self.rank} has no GPU: there are {torch.cuda.device_count()} here; start as many ranks on a "
                "machine (torchrun --nproc-per-node), or use --device cpu"
            )
        return self.device

    def rows(self, batch_size: int) -> slice:
        """The rows of a batch that are this rank's.

        Raises:
            UserError: ranks cannot have equally many.
        """
        if batch_size % self.size:
            raise UserError(
                f"batch_size {batch_size} is for all {self.size} ranks together, which cannot share it evenly; "
                f"take a multiple of {self.size}"
            )
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def share(self, input_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's rows of a batch, ``(B, N)``, that any number of ranks share: it has no targets if it has none."""
        if self.size == 1:
            return input_ids, targets
        rows = slice(self.rank, None, self.size)
        if self.rank < len(input_ids):
            return input_ids[rows], targets[rows]
        return input_ids[:1], torch.full_like(targets[:1], IGNORE_INDEX)

    def sum(self, values: Tensor) -> Tensor:
        """Collective: the values of all ranks added up, without a gradient."""
        if self.size == 1:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def mean(self, values: Tensor) -> Tensor:
        """Collective: the mean over ranks, without a gradient."""
        return values if self.size == 1 else self.sum(values) / self.size

    def totals(self, *numbers: float) -> list[float]:
        """Collective: each number added up over ranks in float64."""
        return self.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def any(self, asked: bool) -> bool:
        """Collective: whether one rank says so. Hosts ask each other, and wait for no GPU."""
        return self.totals(float(asked))[0] > 0

    def as_main(self, number: int) -> int:
        """Collective: rank 0's number, such as the step that it found."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        dist.broadcast(value, src=0)
        return int(value)

    def bytes_of_main(self, content: bytes) -> bytes:
        """Collective: rank 0's, whatever the others give."""
        if self.size == 1:
            return content
        values = torch.empty(self.as_main(len(content)), dtype=torch.uint8)
        if self.is_main:
            values.copy_(torch.tensor(list(content), dtype=torch.uint8))
        dist.broadcast(values, src=0)
        return bytes(values.tolist())

    def wait(self) -> None:
        """Collective: returns when every rank is here."""
        self.any(False)

    @contextmanager
    def one_here_first(self) -> Iterator[None]:
        """Collective: one rank of each machine runs the block before the others there, which find what it made."""
        if self.local_rank > 0:
            self.wait()
        yield
        if self.local_rank == 0:
            self.wait()


ALONE = World()


@contextmanager
def joined() -> Iterator[World]:
    """The ranks of a command, connected while the block runs: through gloo, and between GPUs through NCCL.

    One rank tells what went wrong, rank 0 if it knows: there the exception passes. The others leave quietly, by a
    SystemExit with the exit code that the exception would have led to.

    Raises:
        UserError: ``torchrun``'s environment variables make no sense.
    """
    world = World.current()
    if world.size == 1:
        yield world
        return
    store = _connect(world)
    try:
        yield world
        world.wait()
    except BaseException as error:
        if _is_told_here(error, world, store):
            raise
        raise SystemExit(_exit_code(error)) from None
    # After an error this would wait for those that are gone; the process ends anyway.
    dist.destroy_process_group()
    # gloo's threads still let go of what they have sent, for which they need the interpreter: one that is ending
    # already ends them by an abort.
    gc.collect()
    time.sleep(SETTLING)


def _connect(world: World) -> Store:
    if torch.cuda.is_available() and world.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(world.local_rank)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store: Store = next(iter(rendezvous("env://", timeout=PATIENCE)))[0]
    store.set_timeout(PATIENCE)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=PATIENCE)
    return store


def _is_told_here(error: BaseException, world: World, store: Store) -> bool:
    """Whether this rank is the first with something to tell.

    What goes wrong on all ranks is told by rank 0, to whom the others leave a head start. ``torchrun`` ends all ranks
    once one has ended, so that who leaves quietly stays as long; and the store may be rank 0's, which therefore lets
    the others ask before it leaves. A rank that fails because another has left comes too late, as it should.
    """
    if isinstance(error, SystemExit):
        return True
    deadline = time.monotonic() + HEAD_START
    try:
        if not world.is_main and _within(deadline, lambda: store.check([TELLER])):
            store.add(LISTENERS, 1)
            time.sleep(HEAD_START)
            return False
        mine = bool(store.compare_set(TELLER, "", str(world.rank)) == str(world.rank).encode())
        if world.is_main:
            _within(deadline, lambda: store.add(LISTENERS, 0) == world.size - 1)
        return mine
    except RuntimeError:  # the store has ended with rank 0
        return False


def _within(deadline: float, come: Callable[[], bool]) -> bool:
    while not come():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _exit_code(error: BaseException) -> int:
    """As the command line has it."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, UserError) else 1


def shard_model(
    model: ResNetBKForCausalLM, world: World, device: torch.device, mesh: DeviceMesh | None = None
) -> ResNetBKForCausalLM:
    """Leaves each rank with its part of every parameter, on ``device``, and returns the same model.

    Blocks are one group each, gathered while they compute; embeddings, last norm and head are one that stays gathered
    from the forward pass to the backward pass, so that the loss may use the head's matrix as it is. Parameters keep
    their dtype, and gradients are averaged in it: autocast is all the mixed precision there is. Parameters on the meta
    device become empty ones, a group at a time, so that there are never more than a block whole. Experts' loads are
    those of all ranks from here on. ``mesh`` is all ranks', if there is one already.
    """
    mesh = mesh or init_device_mesh(device.type, (world.size,))
    for block in model.model.layers:
        _materialise(block, device)
        _shard(block, mesh)
    if _materialise(model, device):
        model.tie_weights()
    _shard(model, mesh)
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.reduce_load = world.sum
    return model


def reshard(model: nn.Module) -> None:
    """Puts the sharded parameters back in place, which a forward pass without a backward pass has left whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(value: Tensor) -> Tensor:
    """Collective: a tensor that ranks share, such as a norm of sharded gradients, as a plain one."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _shard(module: nn.Module, mesh: DeviceMesh) -> None:
    fully_shard(module, mesh=mesh, shard_placement_fn=lambda parameter: _placement(parameter, mesh.size()))


def _placement(parameter: nn.Parameter, ranks: int) -> Shard:
    """Rows, unless others are shared more evenly: of 8 experts on 64 ranks, 56 would have none."""
    if parameter.dim() < 3:
        return Shard(0)
    return next((Shard(dim) for dim, length in enumerate(parameter.shape) if length % ranks == 0), Shard(0))


def _materialise(root: nn.Module, device: torch.device) -> bool:
    """Makes parameters and buffers on the meta device empty ones on ``device``; whether there were any."""
    found = [
        module
        for module in root.modules()
        if any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    ]
    for module in found:
        module.to_empty(device=device, recurse=False)
    return bool(found)
