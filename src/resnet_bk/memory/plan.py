"""What training would need on a GPU and in host memory, by part and strategy, before anything runs.

A step has a few moments at which it may need most; the plan of a strategy is the largest of them. All of it is for a
GPU. What a step needs on a CPU is found by tracing it (``planner.trace``), as is what only a trace knows of a GPU.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from resnet_bk.errors import UserError
from resnet_bk.frugal.activations import IN_FLIGHT, MIN_BYTES
from resnet_bk.frugal.gradients import DEPARTURES, LANDING_PLACES
from resnet_bk.frugal.waiting import UNDER_WAY
from resnet_bk.memory.activations import (
    COMPUTED_AGAIN,
    TOKENS_KEPT,
    BlockMoment,
    Part,
    TrainingShape,
    block_activations,
    block_moments,
    logits_and_loss,
    loss_backward,
    outer_activations,
    selected_activations,
)
from resnet_bk.memory.parameters import BYTES_PER_PARAMETER, ParameterCounts, PartCounts, count_parameters
from resnet_bk.memory.strategy import STRATEGIES, Strategy
from resnet_bk.memory.units import parse_bytes
from resnet_bk.models import ResNetBKConfig

# Host memory of a training process without its tensors: Python, torch, transformers and CUDA's libraries. At the end of
# training on an H100 the resident set was 1.9 GB (benchmarks/results/gpu/frugal.json, the cells inside the GPU).
PROCESS_BYTES = 2_000_000_000

# cuBLAS takes 32 MiB for each thread that multiplies matrices, forward and backward, on a GPU of compute capability 9
# (H100, H200), and 8 MiB on older ones; the allocator counts it (benchmarks/gpu.py measures its sum with the rest).
CUBLAS_BYTES = 2 * 32 * 2**20

STATES = ("weights", "gradients", "optimizer")  # names of parts
CUBLAS, ON_THEIR_WAY = "cuBLAS", "copies on their way"
BLOCK_INPUTS, GRADIENTS = "block inputs", "gradients"
AT_THE_LOSS, WHERE_BACKWARD_BEGINS = "at the loss", "where backward begins"
AT_THE_EMBEDDING = "at the embedding's gradient"


LEAST_BUDGET = 10**3  # with less, a unit was forgotten


def _amount(words: str) -> int:
    size = parse_bytes(words)
    if size < LEAST_BUDGET:
        raise UserError(f"{words!r} is less than a kilobyte; write an amount with its unit, like 4GB")
    return size


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
        sizes = (None if words is None else _amount(words) for words in (gpu, host))
        gpu_bytes, host_bytes = sizes
        return cls(gpu_bytes=gpu_bytes, host_bytes=host_bytes)

    def missing(self, on_device: int, on_host: int) -> int:
        """Bytes by which a need exceeds this, of the two memories the one that misses more; 0 or less if it fits."""
        needs = ((on_device, self.gpu_bytes), (on_host, self.host_bytes))
        return max((need - room for need, room in needs if room is not None), default=0)


@dataclass(frozen=True, kw_only=True)
class Libraries:
    """What CUDA takes of a GPU beside tensors: the driver's context, which headroom alone counts, and the workspaces of
    cuBLAS."""

    context_bytes: int = 0
    cublas_bytes: int = CUBLAS_BYTES


@dataclass(frozen=True, kw_only=True)
class StrategyPlan:
    """What a strategy needs, by part, in bytes.

    ``gpu_parts`` are those of the moment at which the GPU has most, which ``moment`` names; ``gpu_bytes`` is their sum,
    without what the driver takes. The headrooms are what is left of a budget beside all of it, less than 0 where it
    does not fit, and None without a budget.
    """

    strategy: Strategy
    moment: str
    gpu_parts: list[Part]
    host_parts: dict[str, int]
    gpu_bytes: int
    host_bytes: int
    gpu_headroom: int | None
    host_headroom: int | None

    @property
    def tensor_bytes(self) -> int:
        """What tensors need: all but the workspaces of CUDA's libraries, and what copies hold."""
        return sum(part.num_bytes for part in self.gpu_parts if part.name not in (CUBLAS, ON_THEIR_WAY))

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
    activations: list[Part]
    half_activations: list[Part]
    strategies: list[StrategyPlan]

    @property
    def fastest_that_fits(self) -> StrategyPlan | None:
        """The first strategy in order (each next one trades time for memory) that fits, if any does."""
        return next((plan for plan in self.strategies if plan.fits), None)


def make_plan(config: ResNetBKConfig, shape: TrainingShape, budget: Budget, libraries: Libraries | None = None) -> Plan:
    """Plans AdamW training of ``config`` in micro-batches of ``shape``."""
    counts = count_parameters(config)
    return Plan(
        counts=counts,
        weight_bytes={name: counts.total * size for name, size in BYTES_PER_PARAMETER.items()},
        activations=activation_parts(config, shape, STRATEGIES[0]),
        half_activations=activation_parts(config, shape, STRATEGIES[1]),
        strategies=[plan_strategy(strategy, config, shape, counts, budget, libraries) for strategy in STRATEGIES],
    )


def activation_parts(config: ResNetBKConfig, shape: TrainingShape, strategy: Strategy) -> list[Part]:
    """What a micro-batch has on the device between forward and backward, logits and loss last."""
    half = strategy.half
    return [
        *_joined(_kept(config, shape, strategy, config.num_layers, "L")),
        *outer_activations(config, shape, half=half),
        logits_and_loss(config, shape, half=half, half_weights=strategy.half_weights),
    ]


def plan_strategy(
    strategy: Strategy,
    config: ResNetBKConfig,
    shape: TrainingShape,
    counts: ParameterCounts,
    budget: Budget,
    libraries: Libraries | None = None,
) -> StrategyPlan:
    """What one strategy needs for micro-batches of ``shape``."""
    libraries = libraries or Libraries()
    step = _step(strategy, config, shape, counts)
    moments = _moments(step)
    sizes = {name: _sum(parts) for name, parts in moments.items()}
    moment = max(sizes, key=lambda name: sizes[name])
    gpu_parts = _joined([*moments[moment], *step.of_libraries(libraries.cublas_bytes)])
    on_host = host_parts(strategy, config, shape, counts)
    gpu_bytes, host_bytes = _sum(gpu_parts), sum(on_host.values())
    return StrategyPlan(
        strategy=strategy,
        moment=moment,
        gpu_parts=gpu_parts,
        host_parts=on_host,
        gpu_bytes=gpu_bytes,
        host_bytes=host_bytes,
        gpu_headroom=None if budget.gpu_bytes is None else budget.gpu_bytes - libraries.context_bytes - gpu_bytes,
        host_headroom=None if budget.host_bytes is None else budget.host_bytes - host_bytes,
    )


def step_moments(
    strategy: Strategy, config: ResNetBKConfig, shape: TrainingShape, counts: ParameterCounts
) -> dict[str, list[Part]]:
    """What there is on the GPU at each moment of a step at which memory may be largest, but for CUDA's libraries."""
    return _moments(_step(strategy, config, shape, counts))


def _joined(parts: list[Part]) -> list[Part]:
    """Parts of the same name as one; none of no bytes."""
    by_name: dict[str, list[Part]] = {}
    for part in parts:
        if part.num_bytes:
            by_name.setdefault(part.name, []).append(part)
    return [
        Part(name=name, num_bytes=_sum(alike), formula=" + ".join(part.formula for part in alike))
        for name, alike in by_name.items()
    ]


def _sum(parts: list[Part]) -> int:
    return sum(part.num_bytes for part in parts)


# A moment's name, and what is there besides what is all along.
Moment = tuple[str, list[Part]]


@dataclass(frozen=True)
class _Step:
    """The second step or a later one, in the order in which it goes through a model."""

    strategy: Strategy
    config: ResNetBKConfig
    shape: TrainingShape
    counts: ParameterCounts

    def moments(self) -> Iterator[Moment]:
        """Those at which memory may be largest."""
        raise NotImplementedError

    def all_along(self) -> list[Part]:
        """What no moment is without."""
        strategy, config, counts = self.strategy, self.config, self.counts
        layers, pieces = config.num_layers, self.shape.micro_batches
        blocks = min(2, layers) if strategy.stream_weights else layers
        stored = (
            blocks * _stored(counts.block, strategy)
            if strategy.stream_weights
            else _stored_blocks(config, counts, strategy)
        )
        # Step by block, each micro-batch keeps what it is told of its tokens.
        tables = pieces if strategy.goes_by_block else 1
        # Its embedding is computed again for the backward pass.
        kept_tokens = self.shape.tokens if config.token_dropout and not strategy.goes_by_block else 0
        return [
            Part(
                name="weights",
                num_bytes=stored + _stored(counts.outside, strategy),
                formula=f"{strategy.weight_bytes} ({blocks} P_b + P_o)",
            ),
            Part(name="optimizer", num_bytes=0 if strategy.offload_optimizer else 8 * counts.total, formula="8 P"),
            Part(name="token ids and targets", num_bytes=16 * pieces * self.shape.tokens, formula="16 M T"),
            Part(
                name="rotary positions",
                num_bytes=4 * tables * self.shape.sequence_length * config.rotary_numbers,
                formula="4 M N R" if tables > 1 else "4 N R",
            ),
            Part(name=TOKENS_KEPT, num_bytes=kept_tokens, formula="T"),
            Part(
                name="vectors and scalars",
                num_bytes=512 * (layers + 1) + 16 * layers * config.num_experts,
                formula="512 (L + 1) + 16 L E",
            ),
        ]

    def of_libraries(self, cublas_bytes: int) -> list[Part]:
        """What is no tensor of the step: workspaces of CUDA's libraries, and what copies under way hold."""
        parts = [Part(name=CUBLAS, num_bytes=cublas_bytes, formula="2 threads")]
        # Step by block, gradients leave while the next block's forward goes on, which needs less than its backward.
        if self.strategy.offload_optimizer and not self.strategy.goes_by_block:
            size = 2 * self.strategy.weight_bytes
            formula = f"{size} x the largest matrix"
            parts.append(Part(name=ON_THEIR_WAY, num_bytes=size * self.counts.largest, formula=formula))
        return parts

    def _at_the_loss(self, others: list[Part]) -> Iterator[Moment]:
        """Two moments, where ``others`` are there besides: with a chunk of logits, and where backward begins."""
        strategy, kept = self.strategy, outer_activations(self.config, self.shape, half=self.strategy.half)
        names = {part.name for part in self.all_along()}
        there = [*others, *(part for part in kept if part.name not in names)]
        working = (self.config, self.shape)
        logits = logits_and_loss(*working, half=strategy.half, half_weights=strategy.half_weights)
        yield AT_THE_LOSS, [*there, self._of_tokens("normed tokens", 4), logits]
        gradients = loss_backward(*working, half=strategy.half, half_weights=strategy.half_weights)
        yield WHERE_BACKWARD_BEGINS, [*there, gradients]

    def _block_moments(self, config: ResNetBKConfig) -> list[BlockMoment]:
        """Of a block with the mixer that ``config`` has in all."""
        strategy = self.strategy
        moments = block_moments(
            config,
            self.shape,
            half=strategy.half,
            half_weights=strategy.half_weights,
            by_block=strategy.goes_by_block,
        )
        return [moment for moment in moments if strategy.checkpointing != "none" or moment.name != COMPUTED_AGAIN]

    def _expert_gradients(self, moment: BlockMoment) -> Part:
        """Of the block whose backward goes on, if they stay: in float32, and what is yet to be rounded up to it."""
        config, half = self.config, self.strategy.half
        experts = config.num_experts * config.hidden_size * config.intermediate_size
        size, others, formula = 0, 0, ""
        if self._several:
            # Each is added to that of the micro-batches before as soon as it has their type.
            adds_halves = self.strategy.goes_by_block and self.strategy.half_weights
            size = (2 if adds_halves else 8 if half else 4) if moment.experts == "last" else 0
        elif moment.experts != "none":
            size = {"second": 6 if half else 8, "last": 10 if half else 8, "all": 8}[moment.experts]
            if moment.experts == "all":
                others, formula = 8 * config.hidden_size**2, " + 8 D^2"
            elif config.mixer == "bk":
                others, formula = 4 * (self.counts.block.total - 2 * experts), " + 4 (P_b - 2 E D I)"
        return Part(name=GRADIENTS, num_bytes=size * experts + others, formula=f"{size} E D I{formula}")

    def _of_tokens(self, name: str, times: int) -> Part:
        numbers = self.shape.tokens * self.config.hidden_size
        return Part(name=name, num_bytes=times * numbers, formula=f"{times} T D")

    def _of_table(self, times: int) -> Part:
        """Gradients of the head or of the embedding."""
        return Part(name=GRADIENTS, num_bytes=times * self._table, formula=f"{times} V D")

    def _of_head(self, times: int) -> Part:
        """Its gradient, and the final norm's."""
        num_bytes = times * self._table + 8 * self.config.hidden_size
        return Part(name=GRADIENTS, num_bytes=num_bytes, formula=f"{times} V D + 8 D")

    def _of_other_tables(self) -> Part:
        """Gradients of what is outside of blocks and neither head nor embedding nor final norm."""
        tables, hidden = 1 if self.config.tie_word_embeddings else 2, self.config.hidden_size
        others = self.counts.outside.total - tables * self._table - 2 * hidden
        return Part(name=GRADIENTS, num_bytes=4 * others, formula=f"4 (P_o - {tables} V D - 2 D)")

    def _made_table(self) -> Part:
        """The embedding's gradient, summed in float32; or before it that of positions, if their table is larger."""
        size, hidden = 6 if self.strategy.half_weights else 4, self.config.hidden_size
        positions = self.config.max_position_embeddings or 0
        if not (self.strategy.offload_optimizer or self._several):
            positions = 0  # it stays, and is counted there
        num_bytes = max(size * self._table, self.strategy.weight_bytes * positions * hidden)
        return Part(name=GRADIENTS, num_bytes=num_bytes, formula=f"{size} V D")

    def _made_from(self, times: int) -> Part:
        """Tokens' gradients, and what torch sorts ids in; a half table's gradient is summed without sorting."""
        part = self._of_tokens("gradients of tokens", times)
        if self.strategy.half_weights:
            return part
        return replace(part, num_bytes=part.num_bytes + 32 * self.shape.tokens, formula=f"{part.formula} + 32 T")

    @property
    def _table(self) -> int:
        return self.config.vocab_size * self.config.hidden_size

    @property
    def _several(self) -> bool:
        return self.shape.micro_batches > 1


def _step(strategy: Strategy, config: ResNetBKConfig, shape: TrainingShape, counts: ParameterCounts) -> _Step:
    return (_StepByBlock if strategy.goes_by_block else _StepByPiece)(strategy, config, shape, counts)


def _moments(step: _Step) -> dict[str, list[Part]]:
    always = step.all_along()
    return {name: [*always, *parts] for name, parts in step.moments()}


class _StepByPiece(_Step):
    """Each micro-batch through all blocks, and back."""

    def moments(self) -> Iterator[Moment]:
        config, layers = self.config, self.config.num_layers
        before = self._gradients_before()
        kept = _kept(config, self.shape, self.strategy, layers, "L")
        yield from self._at_the_loss([before, *kept])
        # Of what grows in backward, gradients, and what shrinks, activations, there is most at one of the ends: of each
        # mixer's blocks.
        for index in self._ends():
            where, others = {layers - 1: ("the last block", "(L - 1)"), 0: ("the first block", "0")}.get(
                index, (f"block {index + 1}", str(index))
            )
            passed = [before, self._head_gradient(), self._gradients_behind(index + 1)]
            kept = _kept(config, self.shape, self.strategy, index, others)
            for moment in self._block_moments(config.of_mixer(config.mixer_of(index))):
                parts = [*passed, *kept, *moment.parts, *self._never_taken(), self._expert_gradients(moment)]
                yield f"in {where}: {moment.name}", parts
        blocks = [before, self._gradients_behind(0)]
        yield AT_THE_EMBEDDING, [*blocks, *self._embedding_gradient()]

    def _ends(self) -> list[int]:
        """Each mixer's last and first block; a single block's twice would be once."""
        ends = (self.config.ends_of(mixer) for mixer in self.config.mixer_numbers())
        return sorted({index for both in ends for index in both}, reverse=True)

    def _gradients_before(self) -> Part:
        size = 4 if self._several and not self.strategy.offload_optimizer else 0
        return Part(name=GRADIENTS, num_bytes=size * self.counts.total, formula=f"{size} P")

    def _head_gradient(self) -> Part:
        """From the loss on. A tied head's waits for the embedding's; else it leaves, or is added to what is there."""
        if self.strategy.offload_optimizer or self._several:
            return self._of_head(self.strategy.weight_bytes if self.config.tie_word_embeddings else 0)
        return self._of_head(4)

    def _gradients_behind(self, index: int) -> Part:
        """Of the blocks from this one on, if they stay."""
        blocks = self.config.num_layers - index
        if self.strategy.offload_optimizer or self._several:
            blocks = 0
        numbers = 0
        if blocks:
            before = self.config.mixer_numbers(index)
            for mixer, number in self.config.mixer_numbers().items():
                numbers += (number - before.get(mixer, 0)) * self.counts.blocks[mixer].total
        return Part(name=GRADIENTS, num_bytes=4 * numbers, formula=f"4 x {blocks} P_b")

    def _expert_gradients(self, moment: BlockMoment) -> Part:
        if self.strategy.offload_optimizer:
            return Part(name=GRADIENTS, num_bytes=0, formula="0")  # they leave as they are made
        return super()._expert_gradients(moment)

    def _never_taken(self) -> list[Part]:
        """Of bk's block nothing behind the last product is computed again, but for dropout, so that nobody takes its
        result."""
        if self.strategy.checkpointing == "selective" and self.config.mixer == "bk" and not self.config.dropout:
            return [self._of_tokens("result of the last product", 2 if self.strategy.half else 4)]
        return []

    def _embedding_gradient(self) -> list[Part]:
        """Made from the tokens' in float32; a tied matrix then has both its parts and their sum."""
        strategy, tied = self.strategy, self.config.tie_word_embeddings
        there = [] if strategy.offload_optimizer or self._several else [self._of_other_tables()]
        making = [self._head_gradient(), self._made_table(), self._made_from(4)]
        adding = [self._of_head(3 * strategy.weight_bytes)] if tied else []
        return [*there, *max(making, adding, key=_sum)]


class _StepByBlock(_Step):
    """All micro-batches through a block before the next one, with inputs and gradients that wait on the host."""

    def moments(self) -> Iterator[Moment]:
        head_before = self._of_table(4 if self._several else 0)
        yield from self._at_the_loss([head_before, self._inputs(self._others)])
        held = self.counts.block.total if self._several else 0
        gradients = Part(name=GRADIENTS, num_bytes=4 * held, formula="4 P_b")
        kinds = self.config.alike()
        for alike, _ in kinds:
            where = "a block" if len(kinds) == 1 else f"a block of mixer {alike.mixer}"
            for moment in self._block_moments(alike):
                parts = [self._of_head(4), gradients, self._inputs_in_block(moment), *moment.parts]
                yield f"in {where}: {moment.name}", [*parts, self._expert_gradients(moment)]
        yield AT_THE_EMBEDDING, self._embedding_gradient()

    @property
    def _others(self) -> int:
        """Tensors that are here already, or here yet because they were put away last."""
        return min(UNDER_WAY, self.shape.micro_batches - 1) + 1

    def _inputs(self, number: int) -> Part:
        return self._of_tokens(BLOCK_INPUTS, 4 * number)

    def _inputs_in_block(self, moment: BlockMoment) -> Part:
        """Besides those on their way: the block's output, and the next input that it will be asked for."""
        layers = self.config.num_layers
        number = self._others + 2
        if moment.name == COMPUTED_AGAIN:
            # Input and output before these, and that one's gradient, are let go of when this output is there. With few
            # micro-batches the gradient is one of those that leave.
            if self._several or layers > 1:
                number += 3 if self.shape.micro_batches > UNDER_WAY else 2
            if not self._several and layers <= 2:
                number -= 1  # by then there is no next one
        elif moment.experts == "all":
            number += 1  # the output's gradient, which is kept until its block is done
        return self._inputs(number)

    def _embedding_gradient(self) -> list[Part]:
        """Of one micro-batch, beside what there is; the embedding is looked up again."""
        apart = self._several and not self.config.tie_word_embeddings
        there = [self._of_head(4), self._of_table(4 if apart else 0)]
        made = [self._made_table(), self._made_from(8)]
        return [*there, self._of_other_tables(), *made, self._inputs(self._others)]


def _kept(config: ResNetBKConfig, shape: TrainingShape, strategy: Strategy, blocks: int, times: str) -> list[Part]:
    """What so many blocks keep for backward; ``times`` is their number in formulas."""
    inputs = 4 * shape.tokens * config.hidden_size
    if strategy.checkpointing in ("none", "selective"):
        # What blocks of different mixers have alike is one part.
        numbers: Counter[Part] = Counter()
        for alike, number in config.alike(blocks):
            numbers.update(dict.fromkeys(_kept_by_a_block(alike, shape, strategy), number))
        return [_times(part, number, times if number == blocks else str(number)) for part, number in numbers.items()]
    if strategy.goes_by_block:
        blocks, times = 0, "0"
    elif _moves_inputs(strategy, inputs) and blocks > IN_FLIGHT:
        blocks, times = IN_FLIGHT, str(IN_FLIGHT)
    return [_times(Part(name=BLOCK_INPUTS, num_bytes=inputs, formula="4 T D"), blocks, times)]


def _kept_by_a_block(config: ResNetBKConfig, shape: TrainingShape, strategy: Strategy) -> list[Part]:
    if strategy.checkpointing == "selective":
        return selected_activations(config, shape, half=strategy.half)
    return block_activations(config, shape, half=strategy.half, half_weights=strategy.half_weights)


def _times(part: Part, number: int, in_words: str) -> Part:
    return replace(part, num_bytes=number * part.num_bytes, formula=f"{in_words} x [{part.formula}]")


def _moves_inputs(strategy: Strategy, num_bytes: int) -> bool:
    return strategy.checkpointing == "offload" and num_bytes >= MIN_BYTES


def _stored(counts: PartCounts, strategy: Strategy) -> int:
    return strategy.weight_bytes * (counts.total - counts.float32) + 4 * counts.float32


def _stored_blocks(config: ResNetBKConfig, counts: ParameterCounts, strategy: Strategy) -> int:
    """All of them."""
    return sum(number * _stored(counts.blocks[mixer], strategy) for mixer, number in config.mixer_numbers().items())


def host_parts(
    strategy: Strategy, config: ResNetBKConfig, shape: TrainingShape, counts: ParameterCounts
) -> dict[str, int]:
    """The host's of :func:`plan_strategy`."""
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
        "streamed weights": _stored_blocks(config, counts, strategy) if strategy.stream_weights else 0,
        "offloaded activations": _waiting(strategy, config, shape),
    }


def _waiting(strategy: Strategy, config: ResNetBKConfig, shape: TrainingShape) -> int:
    """Inputs on the host: by block also the loss's, and a gradient, of every micro-batch."""
    inputs = 4 * shape.tokens * config.hidden_size
    if strategy.goes_by_block:
        return (config.num_layers + 2) * shape.micro_batches * inputs
    return config.num_layers * inputs if _moves_inputs(strategy, inputs) else 0
