"""What training would need on the GPU and in host memory, by part and strategy, before anything runs."""

from dataclasses import dataclass, replace
from typing import Self

from resnet_bk.frugal.activations import MIN_BYTES
from resnet_bk.frugal.gradients import DEPARTURES, LANDING_PLACES
from resnet_bk.frugal.waiting import UNDER_WAY
from resnet_bk.memory.activations import (
    ActivationPart,
    TrainingShape,
    block_activations,
    logits_and_loss,
    outer_activations,
    selected_activations,
    working_set,
)
from resnet_bk.memory.parameters import BYTES_PER_PARAMETER, ParameterCounts, PartCounts, count_parameters
from resnet_bk.memory.strategy import STRATEGIES, Strategy
from resnet_bk.memory.units import parse_bytes
from resnet_bk.models import ResNetBKConfig

# Host memory of a training process without its tensors: Python, torch, transformers and CUDA's libraries. The resident
# set was 2.80 GB on an H200 (benchmarks/results/gpu/report.json, results.memory.process). Without CUDA it is 0.38 GB
# (benchmarks/process_memory.py).
PROCESS_BYTES = 3_000_000_000

# cuBLAS takes 32 MiB for each thread that multiplies matrices, forward and backward, on a GPU of compute capability 9
# (H100, H200), and 8 MiB on older ones; the allocator counts it (benchmarks/gpu.py measures its sum with the rest).
CUBLAS_BYTES = 2 * 32 * 2**20

# State of torch's generator on a CPU, which a block that is computed again needs.
GENERATOR_BYTES = 5056

RECOMPUTED, ON_THEIR_WAY, BLOCK_INPUTS = "one block, computed again", "copies on their way", "block inputs"
ALL_ALONG = "all micro-batches' ids and random states"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes there are; None where nothing was said."""

    gpu_bytes: int | None = None
    host_bytes: int | None = None

    @classmethod
    def parse(cls, gpu: str | None, host: str | None) -> Self:
        """From amounts as people write them, like 12GB.

        Raises:
            UserError: one cannot be read.
        """
        sizes = (None if words is None else parse_bytes(words) for words in (gpu, host))
        gpu_bytes, host_bytes = sizes
        return cls(gpu_bytes=gpu_bytes, host_bytes=host_bytes)


@dataclass(frozen=True, kw_only=True)
class StrategyPlan:
    """What a strategy needs, by part, in bytes.

    The GPU's parts are not there all at once: activations and logits are gone when the last gradient arrives.
    ``gpu_bytes`` is the larger of the two moments.
    """

    strategy: Strategy
    gpu_parts: dict[str, int]
    host_parts: dict[str, int]
    gpu_bytes: int
    host_bytes: int
    gpu_headroom: int | None
    host_headroom: int | None

    @property
    def tensor_bytes(self) -> int:
        """What tensors need, on any device: all but the workspaces of CUDA's libraries, and what copies hold there."""
        return self.gpu_bytes - self.gpu_parts["cuBLAS"] - self.gpu_parts.get(ON_THEIR_WAY, 0)

    @property
    def fits(self) -> bool | None:
        """Whether it fits what budget there is; None without a budget."""
        rooms = [room for room in (self.gpu_headroom, self.host_headroom) if room is not None]
        return all(room >= 0 for room in rooms) if rooms else None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Parameters, weights by type, activations by part in fp32 and under autocast, and every strategy."""

    counts: ParameterCounts
    weight_bytes: dict[str, int]
    activations: list[ActivationPart]
    half_activations: list[ActivationPart]
    strategies: list[StrategyPlan]

    @property
    def fastest_that_fits(self) -> StrategyPlan | None:
        """The first strategy in order (each next one trades time for memory) that fits, if any does."""
        return next((plan for plan in self.strategies if plan.fits), None)


def make_plan(config: ResNetBKConfig, shape: TrainingShape, budget: Budget) -> Plan:
    """Plans AdamW training of ``config`` in micro-batches of ``shape``."""
    counts = count_parameters(config)
    return Plan(
        counts=counts,
        weight_bytes={name: counts.total * size for name, size in BYTES_PER_PARAMETER.items()},
        activations=activation_parts(config, shape, STRATEGIES[0]),
        half_activations=activation_parts(config, shape, STRATEGIES[1]),
        strategies=[plan_strategy(strategy, config, shape, counts, budget) for strategy in STRATEGIES],
    )


def activation_parts(config: ResNetBKConfig, shape: TrainingShape, strategy: Strategy) -> list[ActivationPart]:
    """Everything that a step has on the device for backward, logits and loss last."""
    half, half_weights = strategy.half, strategy.half_weights
    block = block_activations(config, shape, half=half, half_weights=half_weights)
    return [
        *_blocks(config, shape, strategy, block),
        *outer_activations(config, shape, half=half),
        working_set(config, shape, half_weights=half_weights),
        logits_and_loss(config, shape, half=half, half_weights=half_weights),
    ]


def _blocks(
    config: ResNetBKConfig, shape: TrainingShape, strategy: Strategy, block: list[ActivationPart]
) -> list[ActivationPart]:
    layers, inputs = config.num_layers, 4 * shape.tokens * config.hidden_size
    whole = sum(part.num_bytes for part in block)
    again = ActivationPart(name=RECOMPUTED, num_bytes=whole, formula="one block's parts")
    if strategy.checkpointing == "none":
        return [
            ActivationPart(name=part.name, num_bytes=layers * part.num_bytes, formula=f"L x [{part.formula}]")
            for part in block
        ]
    if strategy.checkpointing == "selective":
        selected = selected_activations(config, shape, half=strategy.half)
        return [
            *(
                ActivationPart(name=part.name, num_bytes=layers * part.num_bytes, formula=f"L x [{part.formula}]")
                for part in selected
            ),
            replace(again, num_bytes=max(0, whole - sum(part.num_bytes for part in selected[1:]))),
        ]
    if strategy.goes_by_block:
        # A block's input, its output and that one's gradient, before and after they are brought or sent away.
        kept, formula = (9, "36 T D") if shape.micro_batches > 1 else (6, "24 T D")
        states, others = (layers + 2) * shape.micro_batches, shape.micro_batches - 1
        parts = [
            ActivationPart(name=BLOCK_INPUTS, num_bytes=kept * inputs, formula=formula),
            ActivationPart(
                name=ALL_ALONG,
                num_bytes=states * GENERATOR_BYTES + others * 16 * shape.tokens,
                formula=f"{GENERATOR_BYTES} x {states} + 16 T x {others}",
            ),
        ]
        return [*parts, again]
    # Of offloaded inputs the one that is used is here, and the next; those on their way are counted apart. Small ones
    # stay.
    kept, formula = (min(2, layers), "8 T D") if _moves_inputs(strategy, inputs) else (layers, "4 L T D")
    num_bytes = kept * inputs + layers * GENERATOR_BYTES
    return [ActivationPart(name=BLOCK_INPUTS, num_bytes=num_bytes, formula=f"{formula} + {GENERATOR_BYTES} L"), again]


def _moves_inputs(strategy: Strategy, num_bytes: int) -> bool:
    return strategy.checkpointing == "offload" and num_bytes >= MIN_BYTES


def plan_strategy(
    strategy: Strategy, config: ResNetBKConfig, shape: TrainingShape, counts: ParameterCounts, budget: Budget
) -> StrategyPlan:
    """What one strategy needs for micro-batches of ``shape``."""
    *kept, logits = activation_parts(config, shape, strategy)
    gradients, passing = _gradients(strategy, config, counts)
    inputs = 4 * shape.tokens * config.hidden_size
    on_their_way = _on_their_way(strategy, counts, inputs)
    optimizer = 0 if strategy.offload_optimizer else 8 * counts.total
    gpu_parts = {
        "weights": _weights(strategy, config, counts),
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": sum(part.num_bytes for part in kept),
        "logits and loss": logits.num_bytes,
        "cuBLAS": CUBLAS_BYTES,
        **({ON_THEIR_WAY: on_their_way} if on_their_way else {}),
        **({"tied head, in passing": passing} if passing else {}),
    }
    host_parts = _host_parts(strategy, config, shape, counts)
    moments = (_moments_by_block if strategy.goes_by_block else _moments)(strategy, config, shape, counts, kept, logits)
    gpu_bytes = gpu_parts["weights"] + gpu_parts["optimizer"] + gpu_parts["cuBLAS"] + on_their_way + max(moments)
    host_bytes = sum(host_parts.values())
    return StrategyPlan(
        strategy=strategy,
        gpu_parts=gpu_parts,
        host_parts=host_parts,
        gpu_bytes=gpu_bytes,
        host_bytes=host_bytes,
        gpu_headroom=None if budget.gpu_bytes is None else budget.gpu_bytes - gpu_bytes,
        host_headroom=None if budget.host_bytes is None else budget.host_bytes - host_bytes,
    )


def _moments(
    strategy: Strategy,
    config: ResNetBKConfig,
    shape: TrainingShape,
    counts: ParameterCounts,
    kept: list[ActivationPart],
    logits: ActivationPart,
) -> list[int]:
    """What there is beside weights and optimizer: after forward, at the last gradient, where backward begins."""
    gradients, passing = _gradients(strategy, config, counts)
    inputs, activations = 4 * shape.tokens * config.hidden_size, sum(part.num_bytes for part in kept)
    working = working_set(config, shape, half_weights=strategy.half_weights).num_bytes
    again = sum(part.num_bytes for part in kept if part.name == RECOMPUTED)
    moments = [
        # No block is computed again yet. The normed output is there, in two types at times.
        activations + logits.num_bytes + ((3 * inputs) // 2 - again - working if again else 0),
        # The rest of the activations is gone by then.
        gradients + passing + again + working + (2 * inputs if again else 0),
    ]
    if strategy.checkpointing != "none":
        new = 0 if strategy.offload_optimizer else min(gradients, max(_stored(counts.block, strategy), passing))
        moments.append(activations + new)
    return moments


def _moments_by_block(
    strategy: Strategy,
    config: ResNetBKConfig,
    shape: TrainingShape,
    counts: ParameterCounts,
    kept: list[ActivationPart],
    logits: ActivationPart,
) -> list[int]:
    """What there is beside weights, where a step goes block by block: at the loss, in a block, at the embedding."""
    inputs, table = 4 * shape.tokens * config.hidden_size, config.vocab_size * config.hidden_size
    block = sum(part.num_bytes for part in kept if part.name in (RECOMPUTED, BLOCK_INPUTS))
    all_along = sum(part.num_bytes for part in kept if part.name == ALL_ALONG)
    working = working_set(config, shape, half_weights=strategy.half_weights).num_bytes
    outer = sum(part.num_bytes for part in kept) - block - working - all_along
    block_gradients = 4 * counts.block.total
    head = 4 * table  # summed in float32, until the embedding has added its part
    more = head if shape.micro_batches > 1 else 0  # that of the micro-batches before
    waiting = (5 if shape.micro_batches > 1 else 3) * inputs + all_along  # here already, or here yet
    return [
        outer + logits.num_bytes + more + waiting,
        head + block_gradients + block + working + all_along,
        # A half table's gradient is summed in float32 and rounded, and then float32 again.
        head + more + (6 if strategy.half_weights else 4) * table + waiting,
    ]


def _weights(strategy: Strategy, config: ResNetBKConfig, counts: ParameterCounts) -> int:
    """On the device: all weights, or two blocks and what is outside of blocks."""
    blocks = min(2, config.num_layers) if strategy.stream_weights else config.num_layers
    return blocks * _stored(counts.block, strategy) + _stored(counts.outside, strategy)


def _stored(counts: PartCounts, strategy: Strategy) -> int:
    return strategy.weight_bytes * (counts.total - counts.float32) + 4 * counts.float32


def _gradients(strategy: Strategy, config: ResNetBKConfig, counts: ParameterCounts) -> tuple[int, int]:
    """Gradients that are there at once, and what a tied head adds for a moment."""
    if strategy.goes_by_block:
        return 4 * (counts.block.total + counts.outside.total), 0
    head = config.vocab_size * config.hidden_size * strategy.weight_bytes
    # A tied matrix has, for a moment, the head's gradient, the embedding's and their sum.
    passing = 2 * head if config.tie_word_embeddings else 0
    if not strategy.offload_optimizer:
        return 4 * counts.total, passing
    # Each leaves as it is made; the working set has an expert's. A half table's is summed in float32 first.
    return head * (3 if strategy.half_weights else 1), passing


def _on_their_way(strategy: Strategy, counts: ParameterCounts, inputs: int) -> int:
    """What copies to and from a GPU hold there while it goes on: two of the largest gradients, or inputs."""
    if strategy.goes_by_block:
        # Gradients leave while the next block's forward goes on, which needs less than its backward.
        return UNDER_WAY * inputs
    return 2 * strategy.weight_bytes * counts.largest if strategy.offload_optimizer else 0


def _host_parts(
    strategy: Strategy, config: ResNetBKConfig, shape: TrainingShape, counts: ParameterCounts
) -> dict[str, int]:
    offloaded = strategy.offload_optimizer
    largest = max(counts.largest, config.vocab_size * config.hidden_size)
    moments = 4 if strategy.half_moments else 8
    return {
        "process with CUDA": PROCESS_BYTES,
        "fp32 weights": 4 * counts.total if offloaded else 0,
        "optimizer": moments * counts.total if offloaded else 0,
        "gradients": 4 * counts.total if offloaded else 0,
        "gradients and weights on their way": (
            (LANDING_PLACES + DEPARTURES) * (4 if strategy.goes_by_block else strategy.weight_bytes) * largest
            if offloaded
            else 0
        ),
        "streamed weights": config.num_layers * _stored(counts.block, strategy) if strategy.stream_weights else 0,
        "offloaded activations": _waiting(strategy, config, shape),
    }


def _waiting(strategy: Strategy, config: ResNetBKConfig, shape: TrainingShape) -> int:
    """Inputs on the host: by block also the loss's, and a gradient, of every micro-batch."""
    inputs = 4 * shape.tokens * config.hidden_size
    if strategy.goes_by_block:
        return (config.num_layers + 2) * shape.micro_batches * inputs
    return config.num_layers * inputs if _moves_inputs(strategy, inputs) else 0
