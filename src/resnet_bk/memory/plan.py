"""What training would need on the GPU and in host memory, by part and strategy, before anything runs."""

from dataclasses import dataclass

from resnet_bk.memory.activations import (
    ActivationPart,
    TrainingShape,
    block_activations,
    logits_and_loss,
    outer_activations,
    working_set,
)
from resnet_bk.memory.parameters import BYTES_PER_PARAMETER, ParameterCounts, count_parameters
from resnet_bk.models import ResNetBKConfig

# Host memory of a training process without its tensors: Python, torch, transformers and CUDA's libraries. The resident
# set was 2.80 GB on an H200 (benchmarks/results/gpu/report.json, results.memory.process). Without CUDA it is 0.38 GB
# (benchmarks/process_memory.py).
PROCESS_BYTES = 3_000_000_000

# cuBLAS takes 32 MiB for each thread that multiplies matrices, forward and backward, on a GPU of compute capability 9
# (H100, H200), and 8 MiB on older ones; the allocator counts it (benchmarks/gpu.py measures its sum with the rest).
CUBLAS_BYTES = 2 * 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes there are; None where nothing was said."""

    gpu_bytes: int | None = None
    host_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A way to train; a name with + adds to the strategy before it.

    ``half`` is autocast; ``available`` says whether ``resnet-bk train`` can do it today.
    """

    name: str
    half: bool = False
    checkpointing: bool = False
    offload: bool = False
    available: bool = False


STRATEGIES = (
    Strategy(name="fp32", available=True),
    Strategy(name="mixed precision", half=True, available=True),
    Strategy(name="+ checkpointing", half=True, checkpointing=True),
    Strategy(name="+ offloaded optimizer", half=True, checkpointing=True, offload=True),
)


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
        """What tensors need, on any device: all but the workspaces of CUDA's libraries."""
        return self.gpu_bytes - self.gpu_parts["cuBLAS"]

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
        activations=activation_parts(config, shape, half=False, checkpointing=False),
        half_activations=activation_parts(config, shape, half=True, checkpointing=False),
        strategies=[_plan_strategy(strategy, config, shape, counts, budget) for strategy in STRATEGIES],
    )


def activation_parts(
    config: ResNetBKConfig, shape: TrainingShape, *, half: bool, checkpointing: bool
) -> list[ActivationPart]:
    """Everything kept for backward, logits and loss last."""
    per_block = block_activations(config, shape, half=half)
    layers = config.num_layers
    if checkpointing:
        whole_block = sum(part.num_bytes for part in per_block)
        inputs = layers * shape.tokens * config.hidden_size * 4
        blocks = [
            ActivationPart(name="block inputs", num_bytes=inputs, formula="4 L T D"),
            ActivationPart(name="one block, recomputed", num_bytes=whole_block, formula="one block's parts"),
        ]
    else:
        blocks = [
            ActivationPart(name=part.name, num_bytes=layers * part.num_bytes, formula=f"L x [{part.formula}]")
            for part in per_block
        ]
    return [
        *blocks,
        *outer_activations(config, shape, half=half),
        working_set(config, shape, half=half),
        logits_and_loss(config, shape, half=half),
    ]


def _plan_strategy(
    strategy: Strategy, config: ResNetBKConfig, shape: TrainingShape, counts: ParameterCounts, budget: Budget
) -> StrategyPlan:
    parameters = counts.total
    parts = activation_parts(config, shape, half=strategy.half, checkpointing=strategy.checkpointing)
    *kept, logits = parts
    on_gpu = 2 if strategy.offload else 4
    # A tied matrix has, for a moment, the head's gradient, the embedding's and their sum.
    passing = 2 * on_gpu * config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    gpu_parts = {
        "weights": on_gpu * parameters,
        "gradients": on_gpu * parameters,
        "optimizer": 0 if strategy.offload else 8 * parameters,
        "activations": sum(part.num_bytes for part in kept),
        "logits and loss": logits.num_bytes,
        "cuBLAS": CUBLAS_BYTES,
        **({"tied head, in passing": passing} if passing else {}),
    }
    host_parts = {
        "process with CUDA": PROCESS_BYTES,
        "fp32 weights": 4 * parameters if strategy.offload else 0,
        "optimizer": 8 * parameters if strategy.offload else 0,
        "gradients on their way": 4 * parameters if strategy.offload else 0,
    }
    resident = gpu_parts["weights"] + gpu_parts["optimizer"] + gpu_parts["cuBLAS"]
    # The block in hand has its working set while gradients pile up; the rest of the activations is gone by then.
    last_gradient = gpu_parts["gradients"] + passing + working_set(config, shape, half=strategy.half).num_bytes
    gpu_bytes = resident + max(gpu_parts["activations"] + gpu_parts["logits and loss"], last_gradient)
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
