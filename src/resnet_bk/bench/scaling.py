"""Section 5: time and memory of forward and backward over the length of a sequence, the batch, width, depth, experts.

A cell measures all contestants of one value in turns, in one process: a slow moment of the machine hits all, and the
libraries are loaded once. If such a cell fails, whatever the reason, nobody can say from outside whose fault it was,
and models that have room one by one may not have it together: each contestant is then measured in a cell of its own,
whose failure is that contestant's point. One that failed is not asked for larger values of the same axis.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch

from resnet_bk.bench.cells import Cell, Outcome, Outcomes
from resnet_bk.bench.contestants import BASELINE, OURS, build_model, without_position_table
from resnet_bk.bench.memory import peak_bytes
from resnet_bk.bench.setup import Setup
from resnet_bk.bench.statistics import power_law, summarize
from resnet_bk.bench.subject import Subject, random_tokens, synchronizer
from resnet_bk.bench.timing import seconds_of, without_garbage_collection
from resnet_bk.models import ResNetBKConfig
from resnet_bk.models.matching import match_total_parameters, total_parameters
from resnet_bk.schema import Axis, AxisScaling, Exponent, Quantity, ScalingPoint, ScalingResult

NAME = "scaling"
RESULT = list[ScalingPoint]
AXES: tuple[Axis, ...] = ("sequence_length", "batch_size", "hidden_size", "num_layers", "num_experts")
# What a model that is not ours can be asked for.
AXES_OF_ANY_MODEL: tuple[Axis, ...] = ("sequence_length", "batch_size")
# A token uses one expert however many there are: time has no power of their number.
AXES_WITH_EXPONENT: tuple[Axis, ...] = ("sequence_length", "batch_size", "hidden_size", "num_layers")
# An asymptote shows at the long end: short sequences measure the cost of launching operators.
TAIL_POINTS = 4
FEWEST_POINTS = 3  # two are on a line whatever they are
WARMUP_ROUNDS = 1
# As a share: models that are the same differ by less from one process to the next, with the few rounds of a point.
MARGIN = 0.05
# Seconds of a cell beside what it computes, and tokens times layers times width that a second is enough for: only the
# time that is said to be left depends on them.
OVERHEAD, WORK_PER_SECOND = 1.5, 5e6


def cells(setup: Setup, outcomes: Outcomes) -> list[Cell]:
    """For each value one of all contestants; one of each where that failed."""
    return [cell for axis in AXES for cell in _axis_cells(setup, axis, outcomes)]


def measure(setup: Setup, cell: Cell) -> list[ScalingPoint]:
    """The contestants of a cell, in turns."""
    axis, value = cell.arguments["axis"], cell.arguments["value"]
    subjects: dict[str, Subject] = {}
    peaks: dict[str, int] = {}
    for key in cell.arguments["contestants"]:
        before = _allocated(setup.device)
        subjects[key] = build(setup, axis, value, key)
        peaks[key] = peak_bytes(subjects[key]) - before
    seconds = times(subjects, setup.profile.scaling_rounds)
    return [
        ScalingPoint(
            contestant=key,
            value=value,
            seconds=summarize(seconds[key], resamples=setup.profile.bootstrap_resamples),
            peak_memory=peaks[key],
            parameters=sum(parameter.numel() for parameter in subject.model.parameters()),
        )
        for key, subject in subjects.items()
    ]


def assemble(setup: Setup, outcomes: Outcomes) -> ScalingResult | None:
    """The axes that have a point."""
    axes = [found for axis in AXES if (found := _axis_result(setup, axis, outcomes)) is not None]
    return ScalingResult(axes=axes) if axes else None


def values_of(setup: Setup, axis: Axis) -> tuple[int, ...]:
    """What the profile asks for on an axis, ascending."""
    profile = setup.profile
    values = {
        "sequence_length": profile.lengths,
        "batch_size": profile.batch_sizes,
        "hidden_size": profile.widths,
        "num_layers": profile.depths,
        "num_experts": profile.experts,
    }
    return tuple(sorted(values[axis]))


def config_at(setup: Setup, axis: Axis, value: int, key: str) -> ResNetBKConfig:
    """A contestant of ours at one place of an axis.

    With its width grow the number of heads, so that their width stays, and the experts. The others have as many
    parameters as ours there, if they have as many at first.

    Raises:
        ValueError: there is no such model.
    """
    config = _changed(setup.contenders[key].config, axis, value)
    if axis not in AXES_OF_ANY_MODEL and key != OURS and setup.baseline is None:
        ours = _changed(setup.all_contenders[OURS].config, axis, value)
        if "intermediate_size" not in setup.overrides:
            config.intermediate_size = match_total_parameters(config, total_parameters(ours))
    return config


def build(setup: Setup, axis: Axis, value: int, key: str) -> Subject:
    """A contestant at one place of an axis, with a batch of random tokens."""
    contender, seed = setup.contenders[key], setup.training.seed
    batch_size, length = _batch_shape(setup, axis, value)
    ours = contender.config is not None
    model = build_model(config_at(setup, axis, value, key), seed) if ours else contender.with_seed(seed)
    return Subject.of(model, setup.training, random_tokens(setup.vocab_size, batch_size, length, setup.device))


def times(subjects: Mapping[str, Subject], rounds: int) -> dict[str, list[float]]:
    """Seconds of forward and backward in each round, after some that warm up; every other round goes backwards."""
    samples: dict[str, list[float]] = {key: [] for key in subjects}
    for number in range(WARMUP_ROUNDS + rounds):
        for key in subjects if number % 2 == 0 else reversed(list(subjects)):
            subject = subjects[key]
            with without_garbage_collection():
                seconds = seconds_of(partial(_forward_and_backward, subject), synchronizer(subject.device))
            subject.optimizer.zero_grad(set_to_none=True)
            if number >= WARMUP_ROUNDS:
                samples[key].append(seconds)
    return samples


def _forward_and_backward(subject: Subject) -> None:
    subject.forward().backward()  # type: ignore[no-untyped-call]


def exponents_of(axis: Axis, points: Sequence[ScalingPoint]) -> list[Exponent]:
    """Of each contestant's time and memory over its largest values; none of one with less than three."""
    found = []
    for key in dict.fromkeys(point.contestant for point in points if axis in AXES_WITH_EXPONENT):
        measured = [point for point in points if point.contestant == key and point.seconds is not None][-TAIL_POINTS:]
        quantities: tuple[Quantity, ...] = ("time", "memory") if len(measured) >= FEWEST_POINTS else ()
        for quantity in quantities:
            values = [point.value for point in measured]
            exponent = power_law(values, [_figure(point, quantity) for point in measured])
            found.append(
                Exponent(contestant=key, quantity=quantity, from_value=values[0], exponent=exponent),
            )
    return found


def crossover_of(points: Sequence[ScalingPoint]) -> int | None:
    """The smallest value from which on ours is faster at every one that was measured, beyond noise.

    It is also faster than a baseline that ran out of memory or time at that value or a smaller one.
    """
    ours, theirs = ({point.value: point for point in points if point.contestant == key} for key in (OURS, BASELINE))
    gave_up = [value for value, p in theirs.items() if p.failure and p.failure.kind in ("out of memory", "timeout")]

    def is_ahead(value: int) -> bool:
        point, other = ours.get(value), theirs.get(value)
        if point is None or point.seconds is None:
            return False
        if other is not None and other.seconds is not None:
            apart = point.seconds.high < other.seconds.low
            return apart and point.seconds.median < (1 - MARGIN) * other.seconds.median
        return any(first <= value for first in gave_up)

    def can_be_told(value: int) -> bool:
        """Not where the baseline has no figure for another reason, as beyond a table of its positions."""
        other = theirs.get(value)
        return (other is not None and other.seconds is not None) or any(first <= value for first in gave_up)

    crossover = None
    for value in sorted(filter(can_be_told, {*ours, *theirs}), reverse=True):
        if not is_ahead(value):
            break
        crossover = value
    return crossover


def _axis_cells(setup: Setup, axis: Axis, outcomes: Outcomes) -> Iterator[Cell]:
    asked = [
        key for key, contender in setup.contenders.items() if contender.config is not None or axis in AXES_OF_ANY_MODEL
    ]
    for value in values_of(setup, axis):
        if not asked:
            return
        if len(asked) > 1:
            together = _cell(setup, axis, value, asked, f"{axis}/{value}")
            yield together
            if not _failed(outcomes, together.name):
                continue
        alone = {key: _cell(setup, axis, value, [key], f"{axis}/{value}/{key}") for key in asked}
        yield from alone.values()
        asked = [key for key in asked if not _failed(outcomes, alone[key].name)]


def _cell(setup: Setup, axis: Axis, value: int, keys: list[str], name: str) -> Cell:
    batch_size, length = _batch_shape(setup, axis, value)
    config = setup.all_contenders[OURS].config
    shape = {"hidden_size": 1, "num_layers": 1}
    if config is not None:
        shape = {"hidden_size": config.hidden_size, "num_layers": config.num_layers}
    shape = shape | ({axis: value} if axis in shape else {})
    work = batch_size * length * shape["hidden_size"] * shape["num_layers"]
    rounds = setup.profile.scaling_rounds + WARMUP_ROUNDS + 2
    return Cell(
        section=NAME,
        name=name,
        arguments={"axis": axis, "value": value, "contestants": keys},
        weight=OVERHEAD + len(keys) * rounds * work / WORK_PER_SECOND,
    )


def _failed(outcomes: Outcomes, name: str) -> bool:
    return name in outcomes and outcomes[name].status.failure is not None


def _batch_shape(setup: Setup, axis: Axis, value: int) -> tuple[int, int]:
    """Rows and tokens of each."""
    if axis == "sequence_length":
        return 1, value
    return value if axis == "batch_size" else setup.training.batch_size, setup.training.sequence_length


def _changed(config: ResNetBKConfig | None, axis: Axis, value: int) -> ResNetBKConfig:
    assert config is not None
    if axis == "sequence_length":
        return without_position_table(config)
    if axis == "batch_size":
        return config
    changes: dict[str, int] = {axis: value}
    if axis == "hidden_size":
        growing = ("intermediate_size", "num_resolvent_heads", "num_bk_heads", "num_attention_heads")
        changes |= {name: max(1, round(getattr(config, name) * value / config.hidden_size)) for name in growing}
    return ResNetBKConfig(**{**config.own_fields(), **changes})


def _allocated(device: torch.device) -> int:
    """Bytes that are none of the next model's: its peak is the allocator's, in which the others' are too."""
    if device.type != "cuda":
        return 0
    # What products work in is each model's own need; it would be the first one's alone.
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated(device)


def _axis_result(setup: Setup, axis: Axis, outcomes: Outcomes) -> AxisScaling | None:
    points = [
        point
        for cell in _axis_cells(setup, axis, outcomes)
        if cell.name in outcomes
        for point in _points(cell, outcomes[cell.name])
    ]
    if not points:
        return None
    return AxisScaling(
        axis=axis,
        fixed=_fixed(setup, axis),
        points=points,
        exponents=exponents_of(axis, points),
        crossover=crossover_of(points),
    )


def _points(cell: Cell, outcome: Outcome) -> list[ScalingPoint]:
    """What a cell measured; the failure of one that had a single contestant in its name is that one's point."""
    keys = cell.arguments["contestants"]
    if outcome.result is not None:
        found: list[ScalingPoint] = outcome.result
        return found
    if not cell.name.endswith(f"/{keys[0]}"):
        return []
    return [
        ScalingPoint(
            contestant=keys[0],
            value=cell.arguments["value"],
            seconds=None,
            peak_memory=None,
            failure=outcome.status.failure,
        )
    ]


def _fixed(setup: Setup, axis: Axis) -> dict[str, int]:
    """What all points of an axis share."""
    batch_size, length = _batch_shape(setup, axis, 1)
    config = setup.all_contenders[OURS].config
    assert config is not None
    everything = {
        "sequence_length": length,
        "batch_size": batch_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "num_experts": config.num_experts,
    }
    return {name: size for name, size in everything.items() if name != axis}


def _figure(point: ScalingPoint, quantity: Quantity) -> float:
    assert point.seconds is not None and point.peak_memory is not None
    return point.seconds.median if quantity == "time" else point.peak_memory
