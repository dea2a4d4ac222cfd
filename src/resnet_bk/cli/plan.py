"""``resnet-bk plan``."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import JustifyMethod
from rich.markup import escape
from rich.table import Table

from resnet_bk.cli.console import print_json, result_console
from resnet_bk.cli.flags import ModelFlags, given
from resnet_bk.errors import UserError

if TYPE_CHECKING:
    from resnet_bk.memory.activations import TrainingShape
    from resnet_bk.memory.plan import Budget, Plan, StrategyPlan
    from resnet_bk.models import ResNetBKConfig


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Say what training will need, on the GPU and in host memory, before anything runs.

    Nothing is allocated. GB is 10^9 bytes, GiB 2^30. On a machine without a GPU, what is listed under GPU is host
    memory too.

    Examples:
      resnet-bk plan --preset seed
      resnet-bk plan --preset 1b --batch-size 8 --sequence-length 1024 --gpu-memory 12GB --host-memory 15GB
      resnet-bk plan --preset 100m --mixer attention --json
    """

    preset: str = "seed"
    """Named size: seed, tiny, 100m, 1b, 7b or 70b."""
    batch_size: int = 20
    """Sequences in a micro-batch."""
    sequence_length: int = 128
    """Tokens in a sequence."""
    micro_batches: int = 1
    """Micro-batches in a step: where a step goes block by block, their inputs wait on the host."""
    gpu_memory: str | None = None
    """What the GPU has, like 12GB or 11.9GiB."""
    host_memory: str | None = None
    """What the host has, like 15GB."""
    model: ModelFlags = field(default_factory=ModelFlags)
    json: bool = False
    """Print the plan as one JSON document on standard output."""

    def run(self) -> None:
        """Plans and prints."""
        from resnet_bk.memory.activations import TrainingShape
        from resnet_bk.memory.plan import Budget, make_plan
        from resnet_bk.models import ResNetBKConfig

        budget = Budget.parse(self.gpu_memory, self.host_memory)
        shape = TrainingShape(
            batch_size=self.batch_size, sequence_length=self.sequence_length, micro_batches=self.micro_batches
        )
        try:
            config = ResNetBKConfig.from_preset(self.preset, **given(self.model))
        except ValueError as error:
            raise UserError(str(error)) from None
        limit = config.max_position_embeddings
        if limit is not None and self.sequence_length > limit:
            raise UserError(
                f"sequence_length {self.sequence_length} is more than preset {self.preset}'s position table of "
                f"{limit}; shorten it, or choose a preset without a table"
            )
        plan = make_plan(config, shape, budget)
        if self.json:
            print_json(self._document(config, shape, budget, plan))
        else:
            self._print(config, shape, plan)

    def _document(
        self, config: "ResNetBKConfig", shape: "TrainingShape", budget: "Budget", plan: "Plan"
    ) -> dict[str, Any]:
        best = plan.fastest_that_fits
        return {
            "preset": self.preset,
            "model": config.own_fields(),
            "shape": asdict(shape),
            "budget": asdict(budget),
            "parameters": asdict(plan.counts),
            "weight_bytes": plan.weight_bytes,
            "activations": [asdict(part) for part in plan.activations],
            "half_activations": [asdict(part) for part in plan.half_activations],
            "strategies": [{**asdict(strategy), "fits": strategy.fits} for strategy in plan.strategies],
            "fastest_that_fits": best.strategy.name if best else None,
        }

    def _print(self, config: "ResNetBKConfig", shape: "TrainingShape", plan: "Plan") -> None:
        from resnet_bk.memory.units import format_bytes

        result_console.print(
            f"preset {self.preset}, mixer {config.mixer}: {plan.counts.total:,} parameters, "
            f"{plan.counts.active:,} active per token; "
            f"micro-batch {shape.batch_size} x {shape.sequence_length} = {shape.tokens:,} tokens"
        )
        if not config.causal:
            result_console.print("causal=False: tokens read the future; a loss of this model is a leak, not skill")
        result_console.print(_parameter_table(plan))
        if self.preset == "seed" and not given(self.model):
            result_console.print(_seed_table(plan))
        weights = ", ".join(f"{name} {format_bytes(size)}" for name, size in plan.weight_bytes.items())
        result_console.print(f"Weights alone: {weights} (GB is 10^9 bytes)\n")
        result_console.print(_activation_table(plan))
        result_console.print(_strategy_table(plan))
        for strategy in plan.strategies:
            if strategy.fits is not None:
                result_console.print(f"{strategy.strategy.name}: {_verdict(strategy)}")
        result_console.print(_advice(plan), soft_wrap=True)


def _table(title: str, *columns: str, last: JustifyMethod = "right") -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        justify: JustifyMethod = "left" if index == 0 else last if index == len(columns) - 1 else "right"
        table.add_column(column, justify=justify)
    return table


def _parameter_table(plan: "Plan") -> Table:
    table = _table("Parameters", "component", "number", "share")
    for component, number in plan.counts.by_component.items():
        table.add_row(component, f"{number:,}", f"{number / plan.counts.total:.1%}")
    table.add_row("total", f"{plan.counts.total:,}", "100%", style="bold")
    return table


def _seed_table(plan: "Plan") -> Table:
    from resnet_bk.memory.parameters import compare_with_seed

    rows = compare_with_seed(plan.counts)
    table = _table(
        "Against the seed's table, its arithmetic put right", "component", "seed", "here", "why", last="left"
    )
    for row in rows:
        table.add_row(row.component, f"{row.seed:,}", f"{row.ours:,}", row.reason)
    table.add_row("total", f"{sum(row.seed for row in rows):,}", f"{sum(row.ours for row in rows):,}", "", style="bold")
    return table


def _activation_table(plan: "Plan") -> Table:
    from resnet_bk.memory.units import format_bytes

    columns = ("part", "fp32", "fp16 or bf16", "formula in fp32")
    table = _table("Kept for backward, logits and loss included", *columns, last="left")
    for part, half in zip(plan.activations, plan.half_activations, strict=True):
        # Brackets are rich's markup.
        table.add_row(part.name, format_bytes(part.num_bytes), format_bytes(half.num_bytes), escape(part.formula))
    return table


def _strategy_table(plan: "Plan") -> Table:
    from resnet_bk.memory.units import format_bytes

    rows = plan.strategies
    table = _table("A training step with AdamW", "", *(row.strategy.name for row in rows))
    for part in dict.fromkeys(part for row in rows for part in row.gpu_parts):
        table.add_row(f"GPU: {part}", *(format_bytes(row.gpu_parts.get(part, 0)) for row in rows))
    table.add_row("GPU needs", *(format_bytes(row.gpu_bytes) for row in rows), style="bold", end_section=True)
    for part in rows[0].host_parts:
        table.add_row(f"host: {part}", *(format_bytes(row.host_parts[part]) for row in rows))
    table.add_row("host needs", *(format_bytes(row.host_bytes) for row in rows), style="bold", end_section=True)
    table.caption = "Less than the sum of its parts: activations are gone when the last gradient arrives."
    return table


def _verdict(row: "StrategyPlan") -> str:
    from resnet_bk.memory.units import format_bytes

    sentences = []
    for where, room in (("GPU", row.gpu_headroom), ("host", row.host_headroom)):
        if room is not None:
            outcome = "fits with" if room >= 0 else "misses by"
            sentences.append(f"{where} {outcome} {format_bytes(abs(room))}{' to spare' if room >= 0 else ''}")
    return ", ".join(sentences)


def _advice(plan: "Plan") -> str:
    if plan.strategies[0].fits is None:
        return "Give --gpu-memory and --host-memory to see what fits."
    best = plan.fastest_that_fits
    if best is None:
        return "Nothing here fits: take a smaller batch, sequence, vocabulary or model."
    return f"Take: {best.strategy.name}. Leave a margin for the CUDA context and fragmentation."
