"""The fastest way to train that fits a budget: every strategy in every number of pieces, by cost, until one fits.

Formulas say in microseconds what has a chance to fit; a trace says in seconds what does, and its word counts.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from resnet_bk.errors import UserError
from resnet_bk.memory.limits import available_bytes
from resnet_bk.memory.parameters import ParameterCounts, count_parameters
from resnet_bk.memory.plan import Budget, plan_strategy
from resnet_bk.memory.strategy import Strategy
from resnet_bk.memory.units import format_bytes
from resnet_bk.models import ResNetBKConfig
from resnet_bk.planner.cost import Cost, step_cost
from resnet_bk.planner.devices import Device
from resnet_bk.planner.predict import Prediction, host_parts, predict
from resnet_bk.training.config import Checkpointing, Precision, TrainingConfig
from resnet_bk.training.strategy import describe_strategy, strategy_of, training_fields, training_shape

WORTH_MOVING = 0.01
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full", "offload")
# What reserved memory has beyond tensors, at the least that was seen. Only what misses by more is not traced.
LEAST_WASTE = 0.01
# And what it usually has in a step that streams blocks (benchmarks/results/gpu/frugal.json), where nothing is traced.
USUAL_WASTE = 1.15


class NothingFitsError(UserError):
    """No way to train fits the budget; the message says by how much."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to train, what formulas say it takes on the device and on the host, and what it costs."""

    training: TrainingConfig
    device_bytes: int
    host_bytes: int
    cost: Cost


def whole_machine(device: Device) -> Budget:
    """All that a machine has: the GPU's memory, and what is free of the host's."""
    gpu_bytes = device.memory_bytes if device.machine.kind == "cuda" else None
    return Budget(gpu_bytes=gpu_bytes, host_bytes=available_bytes())


def candidates(
    config: ResNetBKConfig, training: TrainingConfig, device: Device, *, fixed: Collection[str] = ()
) -> list[Candidate]:
    """All ways to train that keep the ``fixed`` fields of ``training``, the fastest first."""
    counts = count_parameters(config)
    found = [
        _candidate(config, ways, device, counts)
        for ways in _ways(training, device, fixed)
        if all(getattr(ways, name) == getattr(training, name) for name in fixed if name != "micro_batch_size")
    ]
    return sorted(found, key=lambda way: order(way, device))


def order(way: Candidate, device: Device) -> tuple[bool, bool, float, int]:
    """What changes what is learned comes last: rounded moments, and half types where they are not what the device is
    made for. A way that moves things to the host has to be so much faster than one that does not."""
    training = way.training
    rounded = training.moments != "fp32"
    in_half = device.machine.kind == "cpu" and training.precision != "fp32"
    moved = training.offload_optimizer + training.stream_weights + (training.checkpointing == "offload")
    return rounded, in_half, way.cost.seconds * (1 + WORTH_MOVING * moved), training_shape(training).micro_batches


def choose_training(
    config: ResNetBKConfig,
    training: TrainingConfig,
    budget: Budget,
    device: Device,
    *,
    fixed: Collection[str] = (),
) -> Prediction:
    """The fastest way to train that fits the budget, with what is predicted of it.

    ``fixed`` names fields of ``training`` that stay as they are.

    Raises:
        NothingFitsError: nothing fits; the message says by how much.
        UserError: no strategy has the fixed fields.
    """
    ways = candidates(config, training, device, fixed=fixed)
    if not ways:
        raise UserError("no strategy has the flags that were given; leave some of them out")
    held = budget.gpu_bytes is not None
    corrections: dict[Strategy, float] = {}
    closest: tuple[int, Candidate] | None = None
    for way in ways:
        strategy = _nameless(way.training)
        missing = _missing(way, budget, device, corrections.get(strategy, _first_correction(device, corrections)))
        if missing <= 0:
            prediction = predict(config, way.training, device, held=held)
            missing = prediction.missing(budget)
            if missing <= 0:
                return prediction
            corrections[strategy] = _on_device(prediction) / way.device_bytes
        if closest is None or missing < closest[0]:
            closest = missing, way
    assert closest is not None
    raise NothingFitsError(_refusal(*closest, budget, device))


def _ways(training: TrainingConfig, device: Device, fixed: Collection[str]) -> Iterator[TrainingConfig]:
    half: Precision = "bf16" if device.has_bf16 else "fp16"
    if "precision" in fixed and training.precision != "fp32":
        half = training.precision
    for strategy in _strategies(device, in_fp32="precision" in fixed and training.precision == "fp32"):
        fields: dict[str, Any] = training_fields(strategy, half)
        for rows in _micro_batches(training, fixed):
            yield replace(training, **fields, micro_batch_size=rows if rows < training.batch_size else None)


def _strategies(device: Device, *, in_fp32: bool) -> Iterator[Strategy]:
    # On a GPU float32 is slower and larger. On a CPU it is the faster one, and half types are for memory.
    halves = (False,) if in_fp32 else (True,) if device.machine.kind == "cuda" else (False, True)
    for half in halves:
        for checkpointing in CHECKPOINTING:
            plain = Strategy(name="", half=half, checkpointing=checkpointing)
            yield plain
            for half_moments in (False, True):
                offloaded = replace(plain, offload_optimizer=True, half_weights=half, half_moments=half_moments)
                yield offloaded
                if checkpointing in ("full", "offload"):
                    yield replace(offloaded, stream_weights=True)


def _micro_batches(training: TrainingConfig, fixed: Collection[str]) -> list[int]:
    """Numbers of rows to try, the largest first: the batch in 1, 2, 3, 4, 6, 8, 12 and so on pieces."""
    if "micro_batch_size" in fixed:
        return [min(training.micro_batch_size or training.batch_size, training.batch_size)]
    pieces = [count for power in range(training.batch_size.bit_length() + 1) for count in (1 << power, 3 << power)]
    return sorted({-(-training.batch_size // count) for count in pieces}, reverse=True)


def _candidate(config: ResNetBKConfig, training: TrainingConfig, device: Device, counts: ParameterCounts) -> Candidate:
    strategy, shape = strategy_of(training), training_shape(training)
    plan = plan_strategy(strategy, config, shape, counts, Budget())
    on_gpu = device.machine.kind == "cuda"
    on_host = host_parts(config, training, device, counts, 0 if on_gpu else plan.tensor_bytes)
    return Candidate(
        training=training,
        device_bytes=plan.tensor_bytes,
        host_bytes=sum(on_host.values()),
        cost=step_cost(strategy, config, shape, counts, device, clips=training.max_grad_norm is not None),
    )


def _missing(way: Candidate, budget: Budget, device: Device, correction: float) -> int:
    on_device = int(way.device_bytes * correction)
    if device.machine.kind == "cuda":
        on_device = device.context_bytes + int((1 + LEAST_WASTE) * on_device)
    return budget.missing(on_device, way.host_bytes)


def _on_device(prediction: Prediction) -> int:
    """Without the driver's context, as formulas are."""
    if prediction.device.machine.kind == "cpu":
        return prediction.footprint.tensor_bytes
    return int((prediction.gpu_bytes - prediction.device.context_bytes) / (1 + LEAST_WASTE))


def _first_correction(device: Device, known: Mapping[Strategy, float]) -> float:
    """Of the formulas, which are a GPU's, before a strategy is traced: little less than it was for others."""
    return 0.93 * min(known.values(), default=1.05 if device.machine.kind == "cuda" else 0.75)


def _nameless(training: TrainingConfig) -> Strategy:
    return replace(strategy_of(training), name="")


def what_would_fit(config: ResNetBKConfig, training: TrainingConfig, budget: Budget, device: Device) -> dict[str, int]:
    """The longest sequence and the deepest model for which, by formula, some way fits; the rest is as it is.

    A field is missing where not even 1 would do. Batches always go through a model in pieces, if need be, of one row.
    """

    def fits(config: ResNetBKConfig, training: TrainingConfig) -> bool:
        ways = candidates(config, replace(training, micro_batch_size=1), device, fixed={"micro_batch_size"})
        return any(_missing(way, budget, device, USUAL_WASTE) <= 0 for way in ways)

    def with_layers(layers: int) -> ResNetBKConfig:
        return ResNetBKConfig(**{**config.own_fields(), "num_layers": layers})

    length = _largest(training.sequence_length, lambda n: fits(config, replace(training, sequence_length=n)))
    layers = _largest(config.num_layers, lambda n: fits(with_layers(n), training))
    found = {"sequence_length": length, "num_layers": layers}
    return {name: value for name, value in found.items() if value}


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``most`` that fits, all below it fitting too; 0 if 1 does not."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _refusal(missing: int, way: Candidate, budget: Budget, device: Device) -> str:
    rows = training_shape(way.training).batch_size
    sequences = "one sequence" if rows == 1 else f"{rows} sequences"
    words = describe_strategy(replace(way.training, micro_batch_size=None)) or way.training.precision
    short_of_host = budget.host_bytes is not None and way.host_bytes - budget.host_bytes >= missing
    where = "host" if short_of_host else "GPU" if device.machine.kind == "cuda" else "device"
    return (
        f"nothing fits: {words} with {sequences} at a time comes closest and misses by {format_bytes(missing)} of "
        f"{where} memory; take a larger budget, a shorter --sequence-length or a smaller model"
    )
