"""``resnet-bk plan --ladder``: models from 4M to 70B."""

from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from resnet_bk.cli.console import print_json, remark, result_console
from resnet_bk.cli.plan_tables import new_table
from resnet_bk.errors import UserError
from resnet_bk.files import write_text
from resnet_bk.memory.plan import STATES
from resnet_bk.memory.units import format_bytes
from resnet_bk.planner.devices import Device
from resnet_bk.planner.ladder import Rung, ladder


def plan_ladder(device: Device, batch_size: int, sequence_length: int, *, figure: Path | None, as_json: bool) -> None:
    """Prints the ladder; writes the picture if asked to."""
    if figure is not None and figure.suffix != ".svg":
        raise UserError(f"--figure {figure} is to be an SVG; give a name that ends in .svg")
    rungs = ladder(batch_size, sequence_length, device)
    if figure is not None:
        write_text(figure, picture(rungs, device.name))
        remark(f"wrote {figure}")
    if as_json:
        print_json({"device": device.name, "memory_bytes": device.memory_bytes, "rungs": [asdict(r) for r in rungs]})
        return
    result_console.print(_table(rungs, device, batch_size, sequence_length))


def _table(rungs: list[Rung], device: Device, batch_size: int, sequence_length: int) -> Table:
    """A column for each preset."""
    title = f"GPU memory by formula, context included, a micro-batch of {batch_size} x {sequence_length}"
    table = new_table(title, "", *(rung.preset for rung in rungs))
    table.add_row("parameters", *(f"{rung.parameters / 1e6:,.0f}M" for rung in rungs), end_section=True)
    for name in rungs[0].gpu_bytes:
        table.add_row(name, *(_marked(rung.gpu_bytes[name], device.memory_bytes) for rung in rungs))
    table.add_section()
    for name in rungs[0].host_bytes:
        table.add_row(f"{name}: host", *(format_bytes(rung.host_bytes[name]) for rung in rungs))
    table.add_section()
    gpus = ("none" if rung.gpus_with_fsdp is None else str(rung.gpus_with_fsdp) for rung in rungs)
    table.add_row(f"{device.name}s with FSDP2", *gpus)
    table.caption = (
        f"What exceeds {device.name}'s {format_bytes(device.memory_bytes)} is in brackets. With FSDP2: the least power "
        "of two, full checkpointing, one sequence each."
    )
    return table


def _marked(need: int, room: int) -> str:
    return format_bytes(need) if need <= room else f"({format_bytes(need)})"


def picture(rungs: list[Rung], device: str) -> str:
    """Stacked bars, a panel for each rung, as SVG."""
    from resnet_bk.report.figures import BASELINE, FIFTH, GREY, OURS, THIRD, drawing

    colours = {
        "weights": OURS,
        "gradients": FIFTH,
        "optimizer": BASELINE,
        "activations and temporaries": THIRD,
        "context and libraries": GREY,
    }
    with drawing(columns=len(rungs), height=3.4) as result:
        for axes, rung in zip(result.axes, rungs, strict=True):
            names, bottoms = list(rung.gpu_parts), [0.0] * len(rung.gpu_parts)
            for part, colour in colours.items():
                heights = [_share(rung.gpu_parts[name], part) / 1e9 for name in names]
                axes.bar(range(len(names)), heights, bottom=bottoms, color=colour, label=part)
                bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
            axes.set_title(rung.preset, fontsize=9)
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
            axes.grid(axis="x", visible=False)
        result.axes[0].set_ylabel(f"GPU memory, GB ({device})")
        result.legend_above()
    return result.svg


def _share(parts: dict[str, int], name: str) -> int:
    """Bytes of a named colour."""
    if name in STATES:
        return parts.get(name, 0)
    outside = ("context", "cuBLAS")
    if name == "context and libraries":
        return sum(parts.get(part, 0) for part in outside)
    return sum(size for part, size in parts.items() if part not in (*STATES, *outside))
