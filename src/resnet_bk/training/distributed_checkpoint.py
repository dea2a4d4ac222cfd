"""Weights and moments between many ranks and the files of a checkpoint, which are the same for any number of them.

Writing: one parameter after the other is gathered and moved to rank 0's host memory, which has to hold weights and
moments, 12 bytes a parameter. Reading: each rank reads its own part of the files, whose folder every machine must
see; nobody holds the whole.
"""

from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from resnet_bk.frugal.local import local_tensor
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.training.distributed import World, reshard, shard_model


def gathered_weights(model: ResNetBKForCausalLM, world: World) -> dict[str, Tensor]:
    """Collective: the model's state dict, whole and on the host, tied weights being one tensor; empty but on rank 0."""
    reshard(model)
    wholes: dict[int, Tensor] = {}
    weights = {}
    for name, tensor in _named_tensors(model):
        if id(tensor) not in wholes:
            wholes[id(tensor)] = _gathered(tensor, world)
        weights[name] = wholes[id(tensor)]
    return weights if world.is_main else {}


def gathered_moments(model: ResNetBKForCausalLM, optimizer: torch.optim.Optimizer, world: World) -> dict[str, Tensor]:
    """Collective: what the optimizer remembers of each parameter as ``exp_avg.NAME`` and so on; empty but on rank 0."""
    reshard(model)
    moments = {
        f"{key}.{name}": _gathered(value, world)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return moments if world.is_main else {}


def load_sharded_model(
    config: ResNetBKConfig, weights_file: Path, world: World, device: torch.device
) -> ResNetBKForCausalLM:
    """Collective: the model of a checkpoint with each rank's part of it on ``device``, in evaluation mode."""
    with torch.device("meta"):
        model = ResNetBKForCausalLM(config)
    shard_model(model, world, device)
    with safe_open(weights_file, framework="pt") as file:
        stored = set(file.keys())
        missing = {id(tensor) for _, tensor in _named_tensors(model)}
        for name, tensor in _named_tensors(model):
            if name in stored:
                _local(tensor).copy_(_read_part(file, name, tensor))
                missing.discard(id(tensor))
    assert not missing, f"{weights_file} lacks weights of its model"
    model.eval()
    return model


def restore_sharded_moments(moments_file: Path, model: ResNetBKForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    """Gives the optimizer each rank's part of a checkpoint's moments."""
    reshard(model)
    with safe_open(moments_file, framework="pt") as file:
        stored = set(file.keys())
        for name, parameter in model.named_parameters():
            entries = {}
            for key in ("exp_avg", "exp_avg_sq"):
                if f"{key}.{name}" in stored:
                    entries[key] = _as_part_like(parameter, _read_part(file, f"{key}.{name}", parameter))
            if entries:
                entries["step"] = file.get_tensor(f"step.{name}").to(parameter.device)
                optimizer.state[parameter] = entries


def _named_tensors(model: ResNetBKForCausalLM) -> list[tuple[str, Tensor]]:
    """Parameters under all their names, and buffers."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]


def _gathered(tensor: Tensor, world: World) -> Tensor:
    whole = tensor.detach()
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    return whole.cpu().contiguous() if world.is_main else torch.empty(0)


def _local(tensor: Tensor) -> Tensor:
    return local_tensor(tensor.detach())


def _read_part(file: Any, name: str, like: Tensor) -> Tensor:
    """The part of a stored tensor that is this rank's, of ``like``: torch deals rows as ``torch.chunk`` does."""
    if not isinstance(like, DTensor):
        stored: Tensor = file.get_tensor(name)
        return stored
    (placement,) = like.placements
    assert isinstance(placement, Shard)
    share = ceil(like.shape[placement.dim] / like.device_mesh.size())
    local = _local(like)
    if not local.numel():
        return torch.empty_like(local)
    first = like.device_mesh.get_local_rank() * share
    rows = slice(first, first + local.shape[placement.dim])
    part: Tensor = file.get_slice(name)[(*[slice(None)] * placement.dim, rows)]
    return part


def _as_part_like(parameter: Tensor, part: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return part.to(parameter.device)
    return DTensor.from_local(
        part.to(parameter.device).contiguous(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
