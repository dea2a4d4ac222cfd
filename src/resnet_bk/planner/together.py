"""One plan for all ranks of a run that have joined each other: rank 0 makes it, in a process that has joined nobody."""

from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import msgspec

from resnet_bk.errors import UserError
from resnet_bk.memory.plan import Budget
from resnet_bk.models import ResNetBKConfig
from resnet_bk.planner.devices import Device
from resnet_bk.planner.search import choose_training
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.distributed import World


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """A training, and the bytes that are predicted of it: of each GPU, if there are any, of the whole host, and of the
    tensors on one rank's device."""

    training: TrainingConfig
    gpu_bytes: int | None
    host_bytes: int
    tensor_bytes: int


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    chosen: Chosen | None = None
    refusal: str = ""


def choose_together(
    config: ResNetBKConfig,
    training: TrainingConfig,
    budget: Budget,
    device: Device,
    *,
    fixed: Collection[str],
    world: World,
) -> Chosen:
    """Collective: as :func:`choose_training` for the ranks of ``world``, the same on all of them.

    Raises:
        UserError: on all ranks, as there.
    """
    if world.size == 1:
        return _chosen(config, training, budget, device, fixed, 1)
    answer = _Answer()
    if world.is_main:
        # Several ranks are traced as if they had joined, which a process can do once.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            asked = pool.submit(_chosen, config, training, budget, device, fixed, world.size)
            try:
                answer = _Answer(chosen=asked.result())
            except UserError as error:
                answer = _Answer(refusal=str(error))
    answer = msgspec.json.decode(world.bytes_of_main(msgspec.json.encode(answer)), type=_Answer)
    if answer.chosen is None:
        raise UserError(answer.refusal)
    return answer.chosen


def _chosen(
    config: ResNetBKConfig, training: TrainingConfig, budget: Budget, device: Device, fixed: Collection[str], ranks: int
) -> Chosen:
    prediction = choose_training(config, training, budget, device, fixed=fixed, ranks=ranks)
    return Chosen(
        training=prediction.training,
        gpu_bytes=prediction.gpu_bytes,
        host_bytes=prediction.host_bytes,
        tensor_bytes=prediction.footprint.tensor_bytes,
    )
