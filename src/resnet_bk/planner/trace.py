"""What a training step will hold in memory, found by running it with tensors that have shapes and no numbers."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

from resnet_bk.errors import UserError
from resnet_bk.frugal.gradients import HostGradient
from resnet_bk.frugal.optimizer import OffloadedAdamW
from resnet_bk.imagined import Machine, hearing_of_copies, imagining
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.planner.as_on_cuda import AsOnCuda
from resnet_bk.planner.copies import CopiesOfFakes
from resnet_bk.planner.ranks import imagined_ranks, of_one_rank
from resnet_bk.planner.recorder import Event, Origin, StepRecorder
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.distributed import ALONE, World, shard_model
from resnet_bk.training.step import train_step
from resnet_bk.training.strategy import prepare_training, training_shape

# A model, its optimizer, what runs a step, and the tensors of the batch.
Prepared = tuple[nn.Module, torch.optim.Optimizer, Callable[[], object], list[Tensor]]

CPU = torch.device("cpu")
# The second micro-batch is the first that meets gradients, and those behind it are like it. Block by block each piece
# waits beside those before and behind it, and each block is as the one before.
ENOUGH_MICRO_BATCHES, ENOUGH_BY_BLOCK, ENOUGH_BLOCKS = 2, 3, 4


# Scalars that a step by block has left behind before.
SMALL_CHANGE = 1024
# A block takes some hundredths of a second.
MOST_BLOCKS = 1000


@dataclass(frozen=True, kw_only=True)
class TracedPart:
    """Bytes of one kind: ``kind`` is weights, gradients, optimizer, activations or temporaries, ``where`` a module."""

    kind: str
    where: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A step, tensor by tensor, with gradients and moments there that the step before has left.

    ``resident`` are the tensors on the device before it, in the order in which they were made; ``events`` are those of
    the step. The memory of ``copied_away`` is free only when its copy to the host has ended. ``host_bytes`` is the most
    that was in host memory set aside for what would otherwise be on the device. ``threads_of_biased_products`` is how
    many threads, autograd's being one, multiply matrices and add a bias in one.
    """

    machine: Machine
    origins: list[Origin]
    resident: list[Event]
    events: list[Event]
    kinds: dict[int, str]
    copied_away: frozenset[int]
    host_bytes: int
    threads_of_biased_products: int = 0

    @property
    def peak_bytes(self) -> int:
        """The most bytes of tensors on the device at once."""
        return self._peak()[0]

    def parts(self) -> list[TracedPart]:
        """What the peak is made of, largest first."""
        _, count = self._peak()
        sums: dict[tuple[str, str], int] = {}
        for tensor, num_bytes in live_bytes((*self.resident, *self.events[:count])).items():
            key = self._kind(tensor), self.origins[tensor].module
            sums[key] = sums.get(key, 0) + num_bytes
        parts = [TracedPart(kind=kind, where=where, num_bytes=size) for (kind, where), size in sums.items()]
        return sorted(parts, key=lambda part: -part.num_bytes)

    def _peak(self) -> tuple[int, int]:
        """Bytes, and how many events lead to them."""
        current = sum(event.num_bytes for event in self.resident)
        best = current, 0
        for index, event in enumerate(self.events, start=1):
            current += event.num_bytes
            if current > best[0]:
                best = current, index
        return best

    def _kind(self, tensor: int) -> str:
        known = self.kinds.get(tensor)
        if known is not None:
            return known
        return "activations" if self.origins[tensor].phase == "forward" else "temporaries"


def live_bytes(events: Iterable[Event]) -> dict[int, int]:
    """Bytes of each tensor that is there after these events, in the order in which they were made."""
    live: dict[int, int] = {}
    for event in events:
        live[event.tensor] = live.get(event.tensor, 0) + event.num_bytes
    return {tensor: num_bytes for tensor, num_bytes in live.items() if num_bytes}


def trace_training(config: ResNetBKConfig, training: TrainingConfig, machine: Machine, *, ranks: int = 1) -> Trace:
    """Traces a step of ``train_step`` with this model, strategy and batch, as ``machine`` would run it.

    Nothing is allocated: a laptop traces what no machine could hold. Streamed blocks are traced as blocks that stay,
    and two blocks' room is put in their place. Of several ranks, which share model and batch, it is the first one's
    step, on a machine of its own: they hear nothing but what torch's fake process group says.
    """
    own = of_one_rank(training, ranks)
    small = _in_few_pieces(own)
    layers = min(config.num_layers, _enough_blocks(config)) if training.goes_by_block else config.num_layers
    if layers > MOST_BLOCKS:
        raise UserError(f"{layers:,} layers are too many to trace one by one; plan a model of up to {MOST_BLOCKS:,}")
    model_config = ResNetBKConfig(**{**config.own_fields(), "num_layers": layers})

    def prepare(world: World, mesh: DeviceMesh | None) -> Prepared:
        model = ResNetBKForCausalLM(model_config).train()
        if mesh is not None:
            shard_model(model, world, CPU, mesh)
        prepared = prepare_training(model, small, CPU)
        batches = [_batch(small) for _ in range(small.gradient_accumulation_steps)]
        arguments = (prepared.model, prepared.optimizer, prepared.scaler, batches, small, 0)

        def step() -> None:
            train_step(*arguments, by_block=prepared.by_block, world=world)

        return prepared.model, prepared.optimizer, step, [tokens for batch in batches for tokens in batch]

    with imagined_ranks(ranks) if ranks > 1 else nullcontext((ALONE, None)) as (world, mesh):
        trace, blocks = _trace(lambda: prepare(world, mesh), machine, with_first_step=ranks > 1)
    trace = _with_blocks(trace, blocks, config, streamed=training.stream_weights)
    return _with_resident(trace, _left_out(config, own, layers, training_shape(small).micro_batches))


def _left_out(config: ResNetBKConfig, training: TrainingConfig, layers: int, pieces: int) -> list[int]:
    """Bytes of the tensors that more micro-batches, or blocks, than the traced ones leave for the whole step."""
    shape = training_shape(training)
    tokens = [8 * shape.tokens] * 2  # ids and targets
    of_a_piece = [*tokens, 4, 4 * config.num_layers * config.num_experts]  # loss and load
    if not training.goes_by_block:
        return of_a_piece * max(0, shape.micro_batches - pieces)
    of_a_piece = [*tokens, 4 * shape.sequence_length * config.rotary_numbers]
    # Of each pass through a block the experts' load, a scalar and that one's gradient.
    passes = config.num_layers * shape.micro_batches - layers * pieces
    of_a_pass = [4 * config.num_experts, 4, 4]
    return [SMALL_CHANGE] + of_a_piece * (shape.micro_batches - pieces) + of_a_pass * passes


def trace_step(prepare: Callable[[], Prepared], machine: Machine) -> Trace:
    """Traces any training step. ``prepare`` makes model, optimizer, what runs a step, and the tensors of the batch."""
    return _trace(prepare, machine)[0]


def _trace(
    prepare: Callable[[], Prepared], machine: Machine, *, with_first_step: bool = False
) -> tuple[Trace, list[list[Event]]]:
    """The trace, and the weights of each block among what is resident."""
    with _imagined(machine) as recorder:
        model, optimizer, step, batch = prepare()
        if with_first_step:  # as gradients of a sharded model are parts of larger tensors, which only a step makes so
            with recorder.naming(model):  # without which what is computed again is not as on a GPU
                step()
        else:
            _first_update(model, optimizer)
        weights = _numbers(recorder, (*model.parameters(), *model.buffers()))
        resident = live_bytes(recorder.events)
        blocks = [
            [Event(number, resident[number]) for number in _numbers(recorder, block.parameters())]
            for block in _blocks(model)
        ]
        start = len(recorder.events)
        recorder.phase = "forward"
        with recorder.naming(model):
            step()
        kinds = dict.fromkeys(weights, "weights") | _kinds_after_step(recorder, model, optimizer)
        trace = Trace(
            machine=machine,
            origins=recorder.origins,
            resident=[Event(tensor, num_bytes) for tensor, num_bytes in resident.items()],
            events=recorder.events[start:],
            kinds=kinds,
            copied_away=frozenset(recorder.copied_away),
            host_bytes=recorder.peak_host_bytes,
            threads_of_biased_products=len(recorder.threads_of_biased_products),
        )
        del batch
    return trace, blocks


def _blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.model.layers) if isinstance(model, ResNetBKForCausalLM) else []


def _enough_blocks(config: ResNetBKConfig) -> int:
    """So many that each mixer is among them."""
    return max(ENOUGH_BLOCKS, *(1 + config.ends_of(mixer)[0] for mixer in config.mixer_numbers()))


def _with_blocks(trace: Trace, blocks: list[list[Event]], config: ResNetBKConfig, *, streamed: bool) -> Trace:
    """The trace with the weights on the device of all blocks of ``config``, of which the first were traced and those of
    one mixer are alike; of ``streamed`` ones there are the two largest."""
    if streamed:
        by_size = sorted(blocks, key=lambda block: -sum(event.num_bytes for event in block))
        gone = {event.tensor for block in by_size[2:] for event in block}
        return replace(trace, resident=[event for event in trace.resident if event.tensor not in gone])
    origins, kinds, resident = list(trace.origins), dict(trace.kinds), list(trace.resident)
    for index in range(len(blocks), config.num_layers):
        first, _ = config.ends_of(config.mixer_of(index))
        for event in blocks[first]:
            kinds[len(origins)] = "weights"
            resident.append(Event(len(origins), event.num_bytes))
            origins.append(origins[event.tensor])
    return replace(trace, origins=origins, kinds=kinds, resident=resident)


def _with_resident(trace: Trace, sizes: list[int]) -> Trace:
    origins, resident = list(trace.origins), list(trace.resident)
    for num_bytes in sizes:
        if num_bytes:
            resident.append(Event(len(origins), num_bytes))
            origins.append(Origin("forward", "", None))
    return replace(trace, origins=origins, resident=resident)


def _in_few_pieces(training: TrainingConfig) -> TrainingConfig:
    """The same strategy and micro-batch in a step that is no longer than it must be."""
    rows, enough = training.micro_batch_size or training.batch_size, ENOUGH_MICRO_BATCHES
    if training.goes_by_block:
        enough = ENOUGH_BY_BLOCK
    if rows >= training.batch_size:
        accumulated = min(enough, training.gradient_accumulation_steps)
        return replace(training, gradient_accumulation_steps=accumulated, stream_weights=False)
    pieces = math.ceil(training.batch_size / rows) * training.gradient_accumulation_steps
    return replace(
        training,
        gradient_accumulation_steps=1,
        batch_size=min(pieces, enough) * rows,
        stream_weights=False,
    )


@contextmanager
def _imagined(machine: Machine) -> Iterator[StepRecorder]:
    with ExitStack() as stack:
        stack.enter_context(imagining(machine))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(CopiesOfFakes())
        as_on_cuda = AsOnCuda() if machine.kind == "cuda" else None
        stack.enter_context(as_on_cuda or nullcontext())
        recorder = stack.enter_context(StepRecorder(as_on_cuda))
        stack.enter_context(hearing_of_copies(recorder.copies_away))
        stack.enter_context(recorder.hearing_of_resizes())
        yield recorder


def _batch(training: TrainingConfig) -> tuple[Tensor, Tensor]:
    size = (training.batch_size, training.sequence_length)
    return torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)


def _first_update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Leaves what the first step leaves: gradients and, where they are on the device, moments."""
    if isinstance(optimizer, OffloadedAdamW):
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def _numbers(recorder: StepRecorder, tensors: Iterable[Tensor]) -> list[int]:
    numbers = (recorder.number_of(tensor) for tensor in tensors)
    return list(dict.fromkeys(number for number in numbers if number is not None))


def _kinds_after_step(recorder: StepRecorder, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    gradients = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p.grad, HostGradient)]
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return {
        **dict.fromkeys(_numbers(recorder, gradients), "gradients"),
        **dict.fromkeys(_numbers(recorder, state), "optimizer"),
    }
