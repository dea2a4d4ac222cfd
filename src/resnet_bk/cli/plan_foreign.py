"""``resnet-bk plan --model hf:NAME_OR_PATH``: any causal language model of transformers."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_bk.cli.console import print_json, remark, result_console
from resnet_bk.cli.plan_tables import new_table
from resnet_bk.errors import UserError
from resnet_bk.memory.units import format_bytes
from resnet_bk.planner.module import ModulePlan, ModulePrediction, plan

if TYPE_CHECKING:
    from resnet_bk.cli.plan import PlanCommand

PREFIX = "hf:"


def plan_foreign(command: "PlanCommand") -> None:
    """Traces a step of it in each way, and prints what each needs."""
    assert command.foreign is not None
    if not command.foreign.startswith(PREFIX) or command.foreign == PREFIX:
        raise UserError(f"--model {command.foreign!r} is not known; write it like hf:gpt2, or hf: and a folder")
    config = _config_of(command.foreign.removeprefix(PREFIX))
    rows = command.micro_batch_size or command.batch_size
    if min(rows, command.sequence_length) < 1:
        raise UserError("batch_size, micro_batch_size and sequence_length must be at least 1")
    budget, device = command.budget(), command.planned_device()
    remark(f"tracing steps of {rows} x {command.sequence_length} tokens as {device.name} would run them ...")
    try:
        found = plan(_model_function(config), _batch(rows, command.sequence_length), budget=budget, device=device)
    except (NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{command.foreign} cannot be traced ({first}); its code needs numbers, or a shape is wrong"
        ) from error
    if command.json:
        print_json(_document(command, found))
    else:
        _print(command, found)


def _config_of(name: str) -> Any:
    from transformers import AutoConfig

    import resnet_bk.models  # noqa: F401  # its classes are registered with transformers

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        hint = "check the folder" if Path(name).exists() else "is the name right, and the network there?"
        first = str(error).strip().splitlines()[0]
        raise UserError(f"no configuration of {name} ({first}); {hint}") from None


def _model_function(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return lambda: AutoModelForCausalLM.from_config(config)


def _batch(rows: int, sequence_length: int) -> dict[str, Any]:
    import torch

    tokens = torch.empty(rows, sequence_length, dtype=torch.int64, device="meta")
    return {"input_ids": tokens, "labels": tokens, "use_cache": False}


def _document(command: "PlanCommand", found: ModulePlan) -> dict[str, Any]:
    best = found.fastest_that_fits
    return {
        "model": command.foreign,
        "device": found.device.name,
        "budget": asdict(command.budget()),
        "parameters": found.parameters,
        "strategies": [_row(prediction) for prediction in found.predictions],
        "fastest_that_fits": best.strategy.name if best else None,
    }


def _row(prediction: ModulePrediction) -> dict[str, Any]:
    return {
        "name": prediction.strategy.name,
        "footprint": asdict(prediction.footprint),
        "gpu_bytes": prediction.gpu_bytes,
        "host_bytes": prediction.host_bytes,
        "fits": prediction.fits,
    }


def _print(command: "PlanCommand", found: ModulePlan) -> None:
    result_console.print(
        f"{command.foreign}: {found.parameters:,} parameters; a micro-batch of "
        f"{command.micro_batch_size or command.batch_size} x {command.sequence_length} tokens on {found.device.name}"
    )
    columns = ("", "tensors", "allocated", "reserved", "GPU needs", "host needs", "fits")
    table = new_table("A training step with AdamW, traced", *columns)
    for row in found.predictions:
        sizes = (*asdict(row.footprint).values(), row.gpu_bytes, row.host_bytes)
        verdict = {None: "", True: "yes", False: "no"}[row.fits]
        table.add_row(row.strategy.name, *(format_bytes(size) for size in sizes), verdict)
    table.caption = "GPU needs: the driver's context, and reserved memory with 3% for the timing of copies."
    result_console.print(table)
