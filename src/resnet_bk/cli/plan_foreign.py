"""``resnet-bk plan --model hf:NAME_OR_PATH``: any causal language model of transformers."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from resnet_bk.cli.console import print_json, remark, result_console
from resnet_bk.cli.plan_tables import new_table
from resnet_bk.errors import UserError
from resnet_bk.memory.plan import Budget
from resnet_bk.memory.units import format_bytes
from resnet_bk.planner.devices import Device
from resnet_bk.planner.module import ModulePlan, ModulePrediction, plan

PREFIX = "hf:"


def plan_foreign(name: str, rows: int, sequence_length: int, budget: Budget, device: Device, *, as_json: bool) -> None:
    """Traces a step of ``rows`` sequences in each way, and prints what each needs."""
    if not name.startswith(PREFIX) or name == PREFIX:
        raise UserError(f"--model {name!r} is not known; write it like hf:gpt2, or hf: and a folder")
    config = _config_of(name.removeprefix(PREFIX))
    if min(rows, sequence_length) < 1:
        raise UserError("batch_size, micro_batch_size and sequence_length must be at least 1")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise UserError(f"{name} is for at most {longest:,} tokens; give a --sequence-length up to that")
    remark(f"tracing steps of {rows} x {sequence_length} tokens as {device.name} would run them ...")
    try:
        found = plan(_model_function(config), _batch(rows, sequence_length), budget=budget, device=device)
    except (NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name} cannot be traced ({first}); its code needs numbers, or a shape is wrong") from error
    if as_json:
        print_json(_document(name, budget, found))
    else:
        _print(f"{name}: {found.parameters:,} parameters; a micro-batch of {rows} x {sequence_length} tokens", found)


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


def _document(name: str, budget: Budget, found: ModulePlan) -> dict[str, Any]:
    best = found.fastest_that_fits
    return {
        "model": name,
        "device": found.device.name,
        "budget": asdict(budget),
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


def _print(what: str, found: ModulePlan) -> None:
    result_console.print(f"{what} on {found.device.name}", soft_wrap=True)
    columns = ("", "tensors", "allocated", "reserved", "GPU needs", "host needs", "fits")
    table = new_table("A training step with AdamW, traced", *columns)
    for row in found.predictions:
        on_card = row.footprint
        traced = (on_card.tensor_bytes, on_card.allocated_bytes, on_card.reserved_bytes)
        sizes = (*traced, row.gpu_bytes, row.host_bytes)
        verdict = {None: "", True: "yes", False: "no"}[row.fits]
        table.add_row(row.strategy.name, *(format_bytes(size) for size in sizes), verdict)
    table.caption = "GPU needs: the driver's context, and reserved memory with 3% for the timing of copies."
    result_console.print(table)
