"""What ``resnet-bk plan`` prints of a plan, a prediction and its proof."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import JustifyMethod
from rich.markup import escape
from rich.table import Table

from resnet_bk.cli.console import result_console
from resnet_bk.memory.parameters import compare_with_seed
from resnet_bk.memory.plan import STATES, Budget, Plan, StrategyPlan, plan_strategy
from resnet_bk.memory.units import format_bytes
from resnet_bk.planner.devices import Device
from resnet_bk.planner.predict import Prediction
from resnet_bk.planner.ranks import of_one_rank
from resnet_bk.planner.sharded import tensors_of_a_rank
from resnet_bk.planner.verify import Measured, rows
from resnet_bk.training.strategy import describe_strategy, strategy_of, training_shape

if TYPE_CHECKING:
    from resnet_bk.models import ResNetBKConfig

ABOUT = (
    "By formula, at most 2% above the traced tensors, without what the allocator's segments waste; what is chosen "
    "under a budget is traced."
)


def new_table(title: str, *columns: str, last: JustifyMethod = "right") -> Table:
    """A table whose first column is text, the others numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        justify: JustifyMethod = "left" if index == 0 else last if index == len(columns) - 1 else "right"
        table.add_column(column, justify=justify)
    return table


def parameter_table(plan: Plan) -> Table:
    """Parameters by component."""
    table = new_table("Parameters", "component", "number", "share")
    for component, number in plan.counts.by_component.items():
        table.add_row(component, f"{number:,}", f"{number / plan.counts.total:.1%}")
    table.add_row("total", f"{plan.counts.total:,}", "100%", style="bold")
    return table


def seed_table(plan: Plan) -> Table:
    """The seed's table, its arithmetic put right, beside what the model has."""
    found = compare_with_seed(plan.counts)
    title = "Against the seed's table, its arithmetic put right"
    table = new_table(title, "component", "seed", "here", "why", last="left")
    for row in found:
        table.add_row(row.component, f"{row.seed:,}", f"{row.ours:,}", row.reason)
    table.add_row(
        "total", f"{sum(row.seed for row in found):,}", f"{sum(row.ours for row in found):,}", "", style="bold"
    )
    return table


def print_weights(plan: Plan) -> None:
    """The weights alone, by type."""
    weights = ", ".join(f"{name} {format_bytes(size)}" for name, size in plan.weight_bytes.items())
    result_console.print(f"Weights alone: {weights} (GB is 10^9 bytes)\n")


def activation_table(plan: Plan) -> Table:
    """Activations by part, in fp32 and in half types."""
    columns = ("part", "fp32", "fp16 or bf16", "formula in fp32")
    table = new_table("Kept for backward, logits and loss included", *columns, last="left")
    for part, half in zip(plan.activations, plan.half_activations, strict=True):
        # Brackets are rich's markup.
        table.add_row(part.name, format_bytes(part.num_bytes), format_bytes(half.num_bytes), escape(part.formula))
    return table


def strategy_table(plan: Plan, device: Device, budget: Budget) -> Table:
    """Every strategy at its worst moment, on the GPU and on the host; with a budget, what is left of it."""
    if budget.gpu_bytes is not None or budget.host_bytes is not None:
        return _table_with_room(plan, device)
    table = new_table("A training step with AdamW", "", *STATES, "the rest", "GPU needs", "host needs")
    for row in plan.strategies:
        states = [sum(part.num_bytes for part in row.gpu_parts if part.name == name) for name in STATES]
        sizes = (*states, row.gpu_bytes - sum(states), row.gpu_bytes, row.host_bytes)
        table.add_row(row.strategy.name, *(format_bytes(size) for size in sizes))
    table.caption = ABOUT
    return table


def _table_with_room(plan: Plan, device: Device) -> Table:
    columns = ("", "GPU needs", "room there", "host needs", "room there")
    table = new_table(f"A training step with AdamW on {device.name}, in one piece", *columns)
    for row in plan.strategies:
        needs = format_bytes(device.context_bytes + row.gpu_bytes), format_bytes(row.host_bytes)
        table.add_row(row.strategy.name, needs[0], _room(row.gpu_headroom), needs[1], _room(row.host_headroom))
    table.caption = f"With the driver's context. {ABOUT}"
    return table


def _room(room: int | None) -> str:
    if room is None:
        return ""
    return format_bytes(room) if room >= 0 else f"misses {format_bytes(-room)}"


def print_choice(prediction: Prediction, budget: Budget, command: str) -> None:
    """The chosen way, what it needs, and what to type."""
    device, found, cost, ranks = prediction.device, prediction.footprint, prediction.cost, prediction.ranks
    words = describe_strategy(prediction.training) or "everything on the device"
    result_console.print(
        f"\n[bold]Fastest that fits, on {'' if ranks == 1 else f'{ranks} x '}{device.name}:[/bold] "
        f"{prediction.training.precision}, {words}",
        soft_wrap=True,
    )
    if ranks > 1:
        result_console.print(_shared_in_words(prediction), soft_wrap=True)
    if device.machine.kind == "cuda":
        room = "" if budget.gpu_bytes is None else f" of {format_bytes(budget.gpu_bytes)}"
        most = ""
        if found.most_reserved_bytes > found.reserved_bytes:
            most = f" to {format_bytes(found.most_reserved_bytes)} as copies end"
        nccl = f", NCCL {format_bytes(prediction.nccl_bytes)} (as of two H100s)" if prediction.nccl_bytes else ""
        result_console.print(
            f"{'GPU' if ranks == 1 else 'each GPU'} {format_bytes(prediction.gpu_bytes)}{room}: "
            f"tensors {format_bytes(found.tensor_bytes)}, allocated {format_bytes(found.allocated_bytes)}, "
            f"reserved {format_bytes(found.reserved_bytes)}{most}, context {format_bytes(device.context_bytes)}{nccl}",
            soft_wrap=True,
        )
    room = "" if budget.host_bytes is None else f" of {format_bytes(budget.host_bytes)}"
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in prediction.host_parts.items())
    result_console.print(f"host {format_bytes(prediction.host_bytes)}{room}: {parts}", soft_wrap=True)
    result_console.print(
        f"about {cost.tokens_per_second:,.0f} tokens/s, {cost.seconds:.2g} s a step, waiting for {prediction.bound_by} "
        "(a model of costs, good to tell one way from another)",
        soft_wrap=True,
    )
    result_console.print(f"\n  {command}\n", markup=False, soft_wrap=True)


def _shared_in_words(prediction: Prediction) -> str:
    """How the batch is split over ranks, and how it is known what one of them needs."""
    training, ranks = prediction.training, prediction.ranks
    own = of_one_rank(training, ranks)
    shape = training_shape(own)
    pieces = shape.micro_batches // training.gradient_accumulation_steps
    in_pieces = "at once" if pieces == 1 else f"in {pieces} pieces of {shape.batch_size}"
    link = format_bytes(int(prediction.device.link))
    return (
        f"FSDP2: of {training.batch_size} sequences each GPU has {own.batch_size}, {in_pieces}; memory is that of one "
        f"rank's step, traced; between GPUs {link}/s each way, from a data sheet"
    )


def print_refusal(refusal: str, would_fit: dict[str, int]) -> None:
    """That nothing fits, by how much, and what would."""
    result_console.print(refusal[0].upper() + refusal[1:] + ".", soft_wrap=True)
    if would_fit:
        flags = " or ".join(f"--{name.replace('_', '-')} {value}" for name, value in would_fit.items())
        result_console.print(f"By formula this would fit, the rest as it is: {flags}", soft_wrap=True)


def print_explanation(config: "ResNetBKConfig", prediction: Prediction) -> None:
    """Formulas and traced tensors at the worst moment of the step."""
    if prediction.ranks > 1:
        table, by_formula = _traced_table(prediction), _formula_of_rank(config, prediction)
        table.caption = (
            f"The formula of a rank is {by_formula / prediction.footprint.tensor_bytes - 1:+.2%} of the trace."
        )
        result_console.print(table)
        return
    formulas = _formulas(config, prediction)
    words = describe_strategy(prediction.training) or prediction.training.precision
    table = new_table(f"By formula, {words}: {formulas.moment}", "part", "bytes", "formula", last="left")
    for part in formulas.gpu_parts:
        table.add_row(part.name, format_bytes(part.num_bytes), escape(part.formula))
    table.add_row("tensors", format_bytes(formulas.tensor_bytes), "", style="bold")
    result_console.print(table)
    table = _traced_table(prediction)
    table.caption = (
        f"The formulas are {formulas.tensor_bytes / prediction.footprint.tensor_bytes - 1:+.2%} of the trace."
    )
    if prediction.device.machine.kind == "cpu":
        table.caption += " They are a GPU's: on a CPU the trace counts."
    result_console.print(table)


def _traced_table(prediction: Prediction) -> Table:
    table = new_table("Traced, tensor by tensor, at the same step's worst moment", "kind", "where", "bytes")
    for kind, where, size in _grouped(prediction):
        table.add_row(kind, where, format_bytes(size))
    table.add_row("all", "", format_bytes(prediction.footprint.tensor_bytes), style="bold")
    return table


def print_verification(prediction: Prediction, measured: Measured) -> None:
    """Predicted beside measured."""
    table = new_table("A real step on this machine", "", "predicted", "measured", "error")
    for name, predicted, found in rows(prediction, measured):
        error = "" if not found else f"{predicted / found - 1:+.2%}"
        table.add_row(name, format_bytes(predicted), format_bytes(found), error)
    result_console.print(table)


def prediction_document(prediction: Prediction) -> dict[str, Any]:
    """A prediction as JSON."""
    return {
        "device": prediction.device.name,
        "num_gpus": prediction.ranks,
        "rows_of_a_gpu": prediction.training.batch_size // prediction.ranks,
        "training": asdict(prediction.training),
        "strategy": describe_strategy(prediction.training),
        "footprint": asdict(prediction.footprint),
        "gpu_bytes": prediction.gpu_bytes,
        "context_bytes": prediction.device.context_bytes,
        "nccl_bytes": prediction.nccl_bytes,
        "memory_is": "traced",
        "host_bytes": prediction.host_bytes,
        "host_parts": prediction.host_parts,
        "cost": {**asdict(prediction.cost), "bound_by": prediction.bound_by},
    }


def explanation_document(config: "ResNetBKConfig", prediction: Prediction) -> dict[str, Any]:
    """Formulas and traced tensors as JSON; of several ranks there is one formula, of all tensors together."""
    traced = {
        "traced": [{"kind": kind, "where": where, "num_bytes": size} for kind, where, size in _grouped(prediction)],
        "traced_bytes": prediction.footprint.tensor_bytes,
    }
    if prediction.ranks > 1:
        return {"formula_bytes": _formula_of_rank(config, prediction), **traced}
    formulas = _formulas(config, prediction)
    return {
        "moment": formulas.moment,
        "formulas": [asdict(part) for part in formulas.gpu_parts],
        "formula_bytes": formulas.tensor_bytes,
        **traced,
    }


def verification_document(prediction: Prediction, measured: Measured) -> list[dict[str, Any]]:
    """Predicted beside measured as JSON."""
    return [
        {"name": name, "predicted": predicted, "measured": found}
        for name, predicted, found in rows(prediction, measured)
    ]


def _formulas(config: "ResNetBKConfig", prediction: Prediction) -> StrategyPlan:
    from resnet_bk.memory.parameters import count_parameters

    training = prediction.training
    return plan_strategy(strategy_of(training), config, training_shape(training), count_parameters(config), Budget())


def _formula_of_rank(config: "ResNetBKConfig", prediction: Prediction) -> int:
    from resnet_bk.memory.parameters import count_parameters

    training, ranks = prediction.training, prediction.ranks
    shape = training_shape(of_one_rank(training, ranks))
    return tensors_of_a_rank(strategy_of(training), config, shape, count_parameters(config), ranks)


def _grouped(prediction: Prediction) -> list[tuple[str, str, int]]:
    """Traced parts with all blocks as one, largest first."""
    sums: dict[tuple[str, str], int] = {}
    for part in prediction.parts:
        words = ["*" if word.isdigit() else word for word in part.where.split(".")] if part.where else ["(outside)"]
        key = part.kind, ".".join(words)
        sums[key] = sums.get(key, 0) + part.num_bytes
    return sorted(((*key, size) for key, size in sums.items()), key=lambda row: -row[2])
