"""``resnet-bk plan --model hf:NAME_OR_PATH``: any dense causal language model of transformers."""

import logging
from dataclasses import asdict
from functools import partial
from typing import Any

from resnet_bk.cli.console import print_json, remark, result_console
from resnet_bk.cli.plan_tables import new_table
from resnet_bk.errors import UserError
from resnet_bk.memory.plan import Budget
from resnet_bk.memory.units import format_bytes
from resnet_bk.models import ResNetBKConfig
from resnet_bk.models.foreign import PREFIX, build_foreign, foreign_config
from resnet_bk.planner.devices import Device
from resnet_bk.planner.module import ModulePlan, ModulePrediction, plan

COLUMNS = ("tensors", "reserved", "GPU needs", "host needs", "fits")
# By which configurations of transformers tell how many experts there are.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def plan_foreign(name: str, rows: int, sequence_length: int, budget: Budget, device: Device, *, as_json: bool) -> None:
    """Traces a step of ``rows`` sequences in each way, and prints what each needs."""
    if not name.startswith(PREFIX) or name == PREFIX:
        raise UserError(f"--model {name!r} is not known; write it like hf:gpt2, or hf: and a folder")
    config = foreign_config(name)
    _check_dense(config, name)
    if min(rows, sequence_length) < 1:
        raise UserError("batch_size, micro_batch_size and sequence_length must be at least 1")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise UserError(f"{name} is for at most {longest:,} tokens; give a --sequence-length up to that")
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # errors are told below, in a line
    remark(f"tracing steps of {rows} x {sequence_length} tokens as {device.name} would run them ...")
    try:
        found = plan(partial(build_foreign, config, name), _batch(rows, sequence_length), budget=budget, device=device)
    except (UserError, MemoryError):  # which are told of in words of their own
        raise
    except Exception as error:  # the model's own code may raise anything
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name} cannot be traced ({first}); its code needs numbers, or a shape is wrong") from error
    if as_json:
        print_json(_document(name, budget, found))
    else:
        _print(f"{name}: {found.parameters:,} parameters; a micro-batch of {rows} x {sequence_length} tokens", found)


def _check_dense(config: Any, name: str) -> None:
    if isinstance(config, ResNetBKConfig):
        return
    for key in EXPERTS:
        if isinstance(number := getattr(config, key, None), int) and number > 1:
            raise UserError(
                f"{name} is a mixture of {number} experts, and what they multiply depends on numbers that a plan has "
                "not; plan one without experts"
            )


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
        "refusal": _refusal(found),
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
    table = new_table("A training step with AdamW, traced", "", *COLUMNS)
    table.columns[0].no_wrap = True
    for row in found.predictions:
        on_card = row.footprint
        sizes = (on_card.tensor_bytes, on_card.reserved_bytes, row.gpu_bytes, row.host_bytes)
        verdict = {None: "", True: "yes", False: "no"}[row.fits]
        table.add_row(row.strategy.name, *(format_bytes(size) for size in sizes), verdict)
    table.caption = "GPU needs: the driver's context, and reserved memory with 3% for the timing of copies."
    result_console.print(table)
    result_console.print(_verdict(found), soft_wrap=True)


def _verdict(found: ModulePlan) -> str:
    if best := found.fastest_that_fits:
        return f"[bold]Fastest that fits:[/bold] {best.strategy.name}"
    return _refusal(found) or "Give --gpu-memory, --host-memory or --device to have the fastest way that fits."


def _refusal(found: ModulePlan) -> str | None:
    """That nothing fits, and by how much; None where something does, or no budget was given."""
    missing = [(row.missing_bytes, row.strategy.name) for row in found.predictions if row.missing_bytes is not None]
    if not missing or found.fastest_that_fits:
        return None
    least, name = min(missing)
    return (
        f"Nothing fits: {name} comes closest and misses by {format_bytes(least)}; take a larger budget, a smaller "
        "--micro-batch-size, a shorter --sequence-length or a smaller model"
    )
