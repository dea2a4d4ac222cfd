"""The fastest way to train that fits a budget: every strategy in every number of pieces, by cost, until one fits.

Formulas say in microseconds what has a chance to fit; a trace says in seconds what does, and its word counts.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from resnet_bk.errors import UserError
from resnet_bk.memory.activations import TrainingShape, tokens_with_logits
from resnet_bk.memory.limits import available_bytes
from resnet_bk.memory.parameters import ParameterCounts, count_parameters
from resnet_bk.memory.plan import AT_THE_LOSS, Budget
from resnet_bk.memory.strategy import Strategy
from resnet_bk.memory.units import format_bytes
from resnet_bk.models import ResNetBKConfig
from resnet_bk.planner.cost import Cost, step_cost
from resnet_bk.planner.devices import Device
from resnet_bk.planner.predict import Prediction, host_parts, nccl_bytes, predict
from resnet_bk.planner.ranks import of_one_rank
from resnet_bk.planner.sharded import moment_sizes_of_a_rank
from resnet_bk.training.config import Checkpointing, Precision, TrainingConfig
from resnet_bk.training.strategy import describe_strategy, strategy_of, training_fields, training_shape

WORTH_MOVING = 0.01
# How many times as fast a replayed step has to be as one that moves nothing: what it gains is Python's time, which
# differs that much between hosts.
WORTH_REPLAYING = 3
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full", "offload")
# What reserved memory has beyond tensors, at the least that was seen. Only what misses by more is not traced.
LEAST_WASTE = 0.01
# And what it usually has in a step that streams blocks (benchmarks/results/gpu/frugal.json), before one is traced.
USUAL_WASTE = 1.15
# Of what a replayed step has beyond the formulas, the share that one of smaller micro-batches may have at the least.
LESS_IN_SMALLER = 0.9
# Of a step that several ranks share, before one is traced: their formula is up to a seventh above the trace.
FIRST_OF_RANKS = 0.9
# Of the loss's chunk: an eighth, and below so many tokens products no longer fill a GPU.
MOST_HALVINGS, FEWEST_OF_CHUNK = 3, 256
# Of the ways that formulas refuse, so many that miss least, and by no more than this share of the budget, are traced
# before it is said that nothing fits.
CLOSEST_TRACED, NEAR = 3, 0.3
# GPUs of one host that are tried, if a number is searched.
MOST_GPUS = 64


class NothingFitsError(UserError):
    """No way to train fits the budget; the message says by how much."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to train, what formulas say it takes on the device and on the host, and what it costs."""

    training: TrainingConfig
    device_bytes: int
    host_bytes: int
    cost: Cost


@dataclass(frozen=True)
class _Refused:
    """A way that misses the budget by so many bytes, as a trace says or only the formulas."""

    missing: int
    way: Candidate
    traced: bool


@dataclass(frozen=True)
class _Searched:
    """What a search is about: the budget is one GPU's and the whole host's."""

    config: ResNetBKConfig
    budget: Budget
    device: Device
    ranks: int


def whole_machine(device: Device) -> Budget:
    """All that a machine has: the GPU's memory, and what is free of the host's."""
    gpu_bytes = device.memory_bytes if device.machine.kind == "cuda" else None
    return Budget(gpu_bytes=gpu_bytes, host_bytes=available_bytes())


def candidates(
    config: ResNetBKConfig, training: TrainingConfig, device: Device, *, fixed: Collection[str] = (), ranks: int = 1
) -> list[Candidate]:
    """All ways to train that keep the ``fixed`` fields of ``training``, the fastest first.

    Of several ``ranks`` under FSDP2 they are those that ``train`` accepts of them; bytes are one GPU's and the whole
    host's.
    """
    counts = count_parameters(config)
    found = [
        _candidate(config, chunked, tensor_bytes, device, counts, ranks)
        for ways in _ways(training, device, fixed, ranks)
        if not (ways.cuda_graphs and config.dropout)
        for chunked, tensor_bytes in _chunks(config, ways, counts, ranks, fixed)
        if all(getattr(ways, name) == getattr(training, name) for name in fixed if name != "micro_batch_size")
    ]
    return sorted(found, key=lambda way: order(way, device, ranks))


def order(way: Candidate, device: Device, ranks: int = 1) -> tuple[bool, bool, float, int]:
    """What changes what is learned comes last: rounded moments, and half types where they are not what the device is
    made for. A way that moves things to the host has to be so much faster than one that does not."""
    training = way.training
    rounded = training.moments != "fp32"
    in_half = device.machine.kind == "cpu" and training.precision != "fp32"
    seconds = way.cost.seconds * (1 + WORTH_MOVING * _moved(training))
    return rounded, in_half, seconds, _shape(training, ranks).micro_batches


def _moved(training: TrainingConfig) -> int:
    """How many kinds of things are on the host."""
    return training.offload_optimizer + training.stream_weights + (training.checkpointing == "offload")


def choose_training(
    config: ResNetBKConfig,
    training: TrainingConfig,
    budget: Budget,
    device: Device,
    *,
    fixed: Collection[str] = (),
    ranks: int = 1,
) -> Prediction:
    """The fastest way to train that fits the budget, with what is predicted of it.

    ``fixed`` names fields of ``training`` that stay as they are. Several ``ranks`` share model and batch by FSDP2, a
    GPU each: then the budget is that of each GPU and of the host that they are on.

    Raises:
        NothingFitsError: nothing fits; the message says by how much.
        UserError: no strategy has the fixed fields, or ranks cannot share the batch.
    """
    ways = candidates(config, training, device, fixed=fixed, ranks=ranks)
    if not ways:
        raise UserError("no strategy has the flags that were given; leave some of them out")
    searched = _Searched(config, budget, device, ranks)
    corrections: dict[Strategy, float] = {}
    refused: list[_Refused] = []
    for way in ways:
        missing = _missing(way, searched, _correction(way, searched, corrections))
        traced = missing <= 0
        if traced:
            prediction = _predicted(way, searched)
            missing = prediction.missing(budget)
            corrections[_nameless(way.training)] = _on_device(prediction) / way.device_bytes
            if missing <= 0:
                return (
                    _without_moving(ways, prediction, searched)
                    or _looked_at_again(refused, searched, corrections)
                    or prediction
                )
        refused.append(_Refused(missing, way, traced))
    near = NEAR * max(size for size in (budget.gpu_bytes, budget.host_bytes, 0) if size is not None)
    for _ in range(CLOSEST_TRACED):
        closest = min(refused, key=lambda refusal: refusal.missing)
        if closest.traced or closest.missing > near:
            break
        prediction = _predicted(closest.way, searched)
        missing = prediction.missing(budget)
        if missing <= 0:
            return prediction
        refused.remove(closest)
        refused.append(_Refused(missing, closest.way, True))
    closest = min(refused, key=lambda refusal: refusal.missing)
    raise NothingFitsError(_refusal(closest.missing, closest.way, searched))


def _predicted(way: Candidate, searched: _Searched) -> Prediction:
    held = searched.budget.gpu_bytes is not None
    return predict(searched.config, way.training, searched.device, held=held, ranks=searched.ranks)


def _looked_at_again(
    refused: list[_Refused], searched: _Searched, corrections: Mapping[Strategy, float]
) -> Prediction | None:
    """The fastest of those that only formulas had refused, if by what is known of them since it fits after all."""
    untraced = [refusal.way for refusal in refused if not refusal.traced]
    likely = [way for way in untraced if _missing(way, searched, _correction(way, searched, corrections)) <= 0]
    for way in likely[:CLOSEST_TRACED]:
        prediction = _predicted(way, searched)
        if prediction.missing(searched.budget) <= 0:
            return prediction
    return None


def _without_moving(ways: list[Candidate], found: Prediction, searched: _Searched) -> Prediction | None:
    """In place of a step that is replayed, one that moves nothing to the host and is not much slower."""
    if not found.training.cuda_graphs:
        return None
    most = WORTH_REPLAYING * found.cost.seconds
    ways = [way for way in ways if not _moved(way.training) and way.cost.seconds <= most]
    for way in [way for way in ways if _missing(way, searched, 1.0) <= 0][:CLOSEST_TRACED]:
        prediction = _predicted(way, searched)
        if prediction.missing(searched.budget) <= 0:
            return prediction
    return None


def choose_ranks(
    config: ResNetBKConfig,
    training: TrainingConfig,
    budget: Budget,
    device: Device,
    *,
    fixed: Collection[str] = (),
    most: int = MOST_GPUS,
) -> Prediction:
    """``choose_training`` on the least power of two of GPUs, up to ``most``, on which anything fits.

    Where the budget says nothing of the host, the optimizer is not moved there: one GPU beside a host without end would
    be enough for anything.

    Raises:
        NothingFitsError: nothing fits on any number of them that can share the batch.
    """
    if budget.host_bytes is None:
        fixed = {*fixed, "offload_optimizer"}
    numbers = numbers_of_gpus(training, most)
    for ranks in numbers:
        try:
            return choose_training(config, training, budget, device, fixed=fixed, ranks=ranks)
        except NothingFitsError as error:
            if ranks == numbers[-1]:
                shared = "" if 2 * ranks > most else f"; more cannot share a batch of {training.batch_size} evenly"
                raise NothingFitsError(f"{error} (up to {ranks} GPUs were tried{shared})") from None
    raise AssertionError("there is always one GPU")


def numbers_of_gpus(training: TrainingConfig, most: int = MOST_GPUS) -> list[int]:
    """Powers of two that can share a batch, the smallest first."""
    powers = [1 << power for power in range(most.bit_length())]
    return [ranks for ranks in powers if ranks <= most and training.batch_size % ranks == 0]


def _ways(training: TrainingConfig, device: Device, fixed: Collection[str], ranks: int) -> Iterator[TrainingConfig]:
    own = of_one_rank(training, ranks)
    half: Precision = "bf16" if device.has_bf16 else "fp16"
    if "precision" in fixed and training.precision != "fp32":
        half = training.precision
    for strategy in _strategies(device, ranks, in_fp32="precision" in fixed and training.precision == "fp32"):
        fields: dict[str, Any] = training_fields(strategy, half)
        for rows in _micro_batches(own, fixed):
            if strategy.replayed and own.batch_size % -(-own.batch_size // rows):
                continue  # pieces of two sizes are not alike
            yield replace(training, **fields, micro_batch_size=rows if rows < own.batch_size else None)


def _chunks(
    config: ResNetBKConfig, training: TrainingConfig, counts: ParameterCounts, ranks: int, fixed: Collection[str]
) -> Iterator[tuple[TrainingConfig, int]]:
    """The same with fewer logits at once, by halves, as long as a step has most at the loss and it would have less.

    Each with the bytes of its tensors on the device.
    """
    strategy, shape = strategy_of(training), _shape(training, ranks)
    sizes = moment_sizes_of_a_rank(strategy, config, shape, counts, ranks)
    yield training, max(sizes.values())
    if "loss_chunk_tokens" in fixed:
        return
    chunk = tokens_with_logits(config, shape, half=strategy.half)
    for _ in range(MOST_HALVINGS):
        chunk //= 2
        if max(sizes, key=lambda name: sizes[name]) != AT_THE_LOSS or chunk < FEWEST_OF_CHUNK:
            return
        smaller = replace(shape, loss_chunk_tokens=chunk)
        before, sizes = sizes[AT_THE_LOSS], moment_sizes_of_a_rank(strategy, config, smaller, counts, ranks)
        if sizes[AT_THE_LOSS] >= before:
            return
        yield replace(training, loss_chunk_tokens=chunk), max(sizes.values())


def _strategies(device: Device, ranks: int, *, in_fp32: bool) -> Iterator[Strategy]:
    # On a GPU float32 is slower and larger. On a CPU it is the faster one, and half types are for memory.
    halves = (False,) if in_fp32 else (True,) if device.machine.kind == "cuda" else (False, True)
    for half in halves:
        for checkpointing in CHECKPOINTING:
            plain = Strategy(name="", half=half, checkpointing=checkpointing)
            yield plain
            if ranks > 1:
                continue  # an optimizer on the host is of one process
            for half_moments in (False, True):
                offloaded = replace(plain, offload_optimizer=True, half_weights=half, half_moments=half_moments)
                yield offloaded
                if checkpointing in ("full", "offload"):
                    streamed = replace(offloaded, stream_weights=True)
                    yield streamed
                    if streamed.goes_by_block and device.machine.kind == "cuda":
                        yield replace(streamed, replayed=True)


def _micro_batches(training: TrainingConfig, fixed: Collection[str]) -> list[int]:
    """Numbers of rows to try, the largest first: the batch in 1, 2, 3, 4, 6, 8, 12 and so on pieces."""
    if "micro_batch_size" in fixed:
        return [min(training.micro_batch_size or training.batch_size, training.batch_size)]
    pieces = [count for power in range(training.batch_size.bit_length() + 1) for count in (1 << power, 3 << power)]
    return sorted({-(-training.batch_size // count) for count in pieces}, reverse=True)


def _candidate(
    config: ResNetBKConfig,
    training: TrainingConfig,
    tensor_bytes: int,
    device: Device,
    counts: ParameterCounts,
    ranks: int,
) -> Candidate:
    strategy, shape = strategy_of(training), _shape(training, ranks)
    on_gpu = device.machine.kind == "cuda"
    on_host = host_parts(config, training, device, counts, 0 if on_gpu else tensor_bytes, ranks=ranks)
    clips = training.max_grad_norm is not None
    return Candidate(
        training=training,
        device_bytes=tensor_bytes,
        host_bytes=sum(on_host.values()),
        cost=step_cost(strategy, config, shape, counts, device, clips=clips, ranks=ranks),
    )


def _shape(training: TrainingConfig, ranks: int) -> TrainingShape:
    return training_shape(of_one_rank(training, ranks))


def _missing(way: Candidate, searched: _Searched, correction: float) -> int:
    on_device, device = int(way.device_bytes * correction), searched.device
    if device.machine.kind == "cuda":
        outside = device.context_bytes + nccl_bytes(device, searched.ranks)
        on_device = outside + int((1 + LEAST_WASTE) * on_device)
    return searched.budget.missing(on_device, way.host_bytes)


def _on_device(prediction: Prediction) -> int:
    """Without what the driver and NCCL have, as formulas are."""
    if prediction.device.machine.kind == "cpu":
        return prediction.footprint.tensor_bytes
    outside = prediction.device.context_bytes + prediction.nccl_bytes
    return int((prediction.gpu_bytes - outside) / (1 + LEAST_WASTE))


def _correction(way: Candidate, searched: _Searched, known: Mapping[Strategy, float]) -> float:
    """Of the formulas, for its strategy."""
    strategy = _nameless(way.training)
    correction = known.get(strategy, _first_correction(searched, known))
    # The formulas know nothing of what graphs have of their own.
    return correction * LESS_IN_SMALLER if strategy.replayed else correction


def _first_correction(searched: _Searched, known: Mapping[Strategy, float]) -> float:
    """Of the formulas, which are a GPU's, before a strategy is traced: little less than it was for others."""
    on_gpu = searched.device.machine.kind == "cuda"
    first = 0.75 if not on_gpu else 1.05 if searched.ranks == 1 else FIRST_OF_RANKS
    return 0.93 * min(known.values(), default=first)


def _nameless(training: TrainingConfig) -> Strategy:
    return replace(strategy_of(training), name="")


def what_would_fit(
    config: ResNetBKConfig, training: TrainingConfig, budget: Budget, device: Device, *, ranks: int = 1
) -> dict[str, int]:
    """The longest sequence and the deepest model for which some way fits; the rest is as it is.

    By formula, with the waste that a step of about that size has when it is traced. A field is missing where not even 1
    would do. Batches always go through a model in pieces, if need be, of one row.
    """
    searched = _Searched(config, budget, device, ranks)

    def closest(config: ResNetBKConfig, training: TrainingConfig, waste: float) -> Candidate:
        in_rows = replace(training, micro_batch_size=1)
        ways = candidates(config, in_rows, device, fixed={"micro_batch_size"}, ranks=ranks)
        return min(ways, key=lambda way: _missing(way, searched, waste))

    def largest(most: int, of: Callable[[int], tuple[ResNetBKConfig, TrainingConfig]]) -> int:
        def by_formula(waste: float) -> int:
            return _largest(most, lambda number: _missing(closest(*of(number), waste), searched, waste) <= 0)

        usual = by_formula(USUAL_WASTE)
        if not usual:
            return 0
        way = closest(*of(usual), USUAL_WASTE)
        traced = predict(of(usual)[0], way.training, device, held=budget.gpu_bytes is not None, ranks=ranks)
        return by_formula(_on_device(traced) / way.device_bytes)

    def with_layers(layers: int) -> ResNetBKConfig:
        return ResNetBKConfig(**{**config.own_fields(), "num_layers": layers})

    found = {
        "sequence_length": largest(training.sequence_length, lambda n: (config, replace(training, sequence_length=n))),
        "num_layers": largest(config.num_layers, lambda n: (with_layers(n), training)),
    }
    return {name: value for name, value in found.items() if value}


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``most`` that fits, all below it fitting too; 0 if 1 does not."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _refusal(missing: int, way: Candidate, searched: _Searched) -> str:
    budget, device = searched.budget, searched.device
    rows = _shape(way.training, searched.ranks).batch_size
    sequences = "one sequence" if rows == 1 else f"{rows} sequences"
    words = describe_strategy(replace(way.training, micro_batch_size=None)) or way.training.precision
    short_of_host = budget.host_bytes is not None and way.host_bytes - budget.host_bytes >= missing
    where = "host" if short_of_host else "GPU" if device.machine.kind == "cuda" else "device"
    each, more = ("", "") if searched.ranks == 1 else (f" on each of {searched.ranks} GPUs", "more GPUs, ")
    return (
        f"nothing fits: {words} with {sequences} at a time{each} comes closest and misses by {format_bytes(missing)} "
        f"of {where} memory; take {more}a larger budget, a shorter --sequence-length or a smaller model"
    )
