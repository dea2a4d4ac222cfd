"""Checkpoints: everything that the next step depends on, checksummed, written whole or not at all.

A checkpoint folder is also what ``from_pretrained`` reads. Batches, routing noise and the learning rate are functions
of the step, so that its number, the weights, the optimizer's moments and the loss scale are the whole state.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from resnet_bk.errors import UserError
from resnet_bk.files import new_directory, read_json, write_json
from resnet_bk.frugal.optimizer import OffloadedAdamW
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.training.distributed import ALONE, World
from resnet_bk.training.distributed_checkpoint import (
    gathered_moments,
    gathered_weights,
    load_sharded_model,
    restore_sharded_moments,
)

MANIFEST, WEIGHTS, MOMENTS, STATE = "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"
CPU = torch.device("cpu")
NAME_PATTERN = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Where training stands: optimizer steps done, and the wall-clock seconds they took."""

    step: int = 0
    seconds: float = 0.0


def save_checkpoint(
    parent: Path,
    model: ResNetBKForCausalLM,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    state: TrainingState,
    world: World = ALONE,
) -> Path:
    """Writes ``parent/step-00000100`` and returns it. Of several ranks, which all call it, rank 0 writes.

    Raises:
        UserError: it could not be written (a full disk, say); nothing that was there has changed.
    """
    path = path_of_step(parent, state.step)
    if world.as_main(path.exists()):
        return path
    if world.size == 1:
        weights, moments = _weights(model, optimizer), _moments(model, optimizer)
    else:
        weights, moments = gathered_weights(model, world), gathered_moments(model, optimizer, world)
    if world.is_main:
        _write(path, model, weights, moments, {**asdict(state), "scaler": scaler.state_dict()})
    world.wait()
    return path


def _write(
    path: Path,
    model: ResNetBKForCausalLM,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    state: dict[str, Any],
) -> None:
    with new_directory(path) as folder:
        try:
            with _no_progress_bar():
                model.save_pretrained(folder, state_dict=weights)
            _say_float32(folder / "config.json")
            save_file(moments, folder / MOMENTS)
        except SafetensorError as error:
            raise UserError(f"cannot write {path}: {error}; free some space or choose another place") from error
        write_json(folder / STATE, state)
        write_json(folder / MANIFEST, {file.name: _identity(file) for file in sorted(folder.iterdir())})


def _say_float32(config_file: Path) -> None:
    """Readers load what the configuration says: that of the weights in the file, not of those on the device."""
    text = config_file.read_text(encoding="utf-8")
    config_file.write_text(re.sub(r'("dtype": )"b?float16"', r'\1"float32"', text), encoding="utf-8")


def load_model_checkpoint(path: Path, world: World = ALONE, device: torch.device = CPU) -> ResNetBKForCausalLM:
    """The model of a checkpoint in evaluation mode, on the CPU; of several ranks, each has its part on ``device``.

    Raises:
        UserError: the folder is not a checkpoint, or a file of it is damaged.
    """
    if world.is_main:
        verify_checkpoint(path)
    world.wait()
    config = ResNetBKConfig.from_pretrained(path)
    if world.size > 1:
        return load_sharded_model(config, path / WEIGHTS, world, device)
    model = ResNetBKForCausalLM(config)
    load_model(model, path / WEIGHTS)
    model.eval()
    return model


def restore_optimizer(
    path: Path,
    model: ResNetBKForCausalLM,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    world: World = ALONE,
) -> TrainingState:
    """Puts a checkpoint's moments and loss scale back; the model's weights must be its own already."""
    state = read_json(path / STATE)
    try:
        scale, training = state.pop("scaler"), TrainingState(**state)
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{path / STATE} is not the state of a training; {_mend(path)}") from None
    if world.size > 1:
        restore_sharded_moments(path / MOMENTS, model, optimizer)
    else:
        _restore_moments(path / MOMENTS, model, optimizer)
    if scale:
        scaler.load_state_dict(scale)
    return training


def _restore_moments(file: Path, model: ResNetBKForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    moments = load_file(file)
    saved = optimizer.state_dict()
    names = _names_by_index(model, optimizer, saved)
    saved["state"] = {}
    for index, name in names.items():
        entries = {key: moments.get(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
        if entries["step"] is not None:
            saved["state"][index] = entries
    optimizer.load_state_dict(saved)


def verify_checkpoint(path: Path) -> None:
    """Compares every file with the checksums written beside it.

    Raises:
        UserError: this is no checkpoint, or a file is missing, cut short or changed.
    """
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path} is not a checkpoint (it has no {MANIFEST}); give a run folder or a step-... folder")
    for name, identity in _manifest(path).items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{file} is missing; {_mend(path)}")
        if file.stat().st_size != identity["bytes"]:
            raise UserError(f"{file} has {file.stat().st_size:,} bytes instead of {identity['bytes']:,}; {_mend(path)}")
        if _identity(file) != identity:
            raise UserError(f"{file} does not have its checksum: a byte has changed; {_mend(path)}")


def checkpoints(parent: Path) -> list[Path]:
    """The checkpoint folders in ``parent``, oldest first."""
    return sorted(path for path in parent.glob("step-*") if NAME_PATTERN.fullmatch(path.name) and path.is_dir())


def path_of_step(parent: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps is."""
    return parent / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name tells."""
    match = NAME_PATTERN.fullmatch(checkpoint.name)
    assert match
    return int(match[1])


def prune_checkpoints(parent: Path, keep: int) -> None:
    """Deletes all but the newest ``keep`` checkpoints, and what killed processes left half written."""
    for path in checkpoints(parent)[:-keep]:
        # Renamed first: a kill in the middle must not leave half a checkpoint under a checkpoint's name.
        doomed = path.with_name(f".{path.name}.deleted")
        path.replace(doomed)
    for path in parent.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers shows one for every file it saves, in the middle of training's own."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def _weights(model: ResNetBKForCausalLM, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The model's state with float32 weights: the masters, where the model has them rounded."""
    state: dict[str, torch.Tensor] = model.state_dict()
    if isinstance(optimizer, OffloadedAdamW):
        masters = {
            name: optimizer.master(parameter)
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if parameter.dtype != torch.float32
        }
        state.update(masters)
    return state


def _names_by_index(
    model: ResNetBKForCausalLM, optimizer: torch.optim.Optimizer, saved: dict[str, Any]
) -> dict[int, str]:
    """The parameters' names by the numbers that the optimizer's state dict ``saved`` gives them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    return {index: names[parameter] for index, parameter in zip(indices, parameters, strict=True)}


def _moments(model: ResNetBKForCausalLM, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """By the parameters' names; masters are the weights, and saved there."""
    saved = optimizer.state_dict()
    return {
        f"{key}.{name}": value.detach().contiguous()
        for index, name in _names_by_index(model, optimizer, saved).items()
        for key, value in saved["state"].get(index, {}).items()
        if key != "master"
    }


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    manifest = read_json(path / MANIFEST)
    try:
        listed = {
            name: {"sha256": str(entry["sha256"]), "bytes": int(entry["bytes"])} for name, entry in manifest.items()
        }
        if {WEIGHTS, MOMENTS, STATE} <= listed.keys():
            return listed
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        pass
    raise UserError(f"{path / MANIFEST} does not list files and checksums; {_mend(path)}")


def _identity(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "bytes": file.stat().st_size}


def _mend(path: Path) -> str:
    older = [checkpoint.name for checkpoint in checkpoints(path.parent) if checkpoint.name < path.name]
    if older:
        return f"restore it from a copy, or delete {path.name} to continue from {older[-1]}"
    return "restore it from a copy, or train again"
