"""The shape of report.json: what a benchmark writes and the report reads. Nothing else is between them.

Times in seconds, memory in bytes, losses in nats per token, FLOPs are 2 x multiply-adds. A ratio is the baseline's
figure over ours, so that above 1 is in our favour.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from resnet_bk.errors import UserError

KIND, VERSION = "resnet-bk benchmark", 1
SECTIONS = ("flops", "timing", "memory", "convergence", "scaling", "stability")
COMPARED = ("resnet-bk", "transformer")
SEED_MIXER = "seed-mixer"  # a third contestant, where ours has another mixer than the seed's

# What a damaged or foreign report.json is refused for: figures are shares, logarithms and quotients of these.
Count = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e30)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e30)]
Number = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
T = TypeVar("T")
Filled = Annotated[list[T], msgspec.Meta(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Raw samples and what they amount to; ``low`` and ``high`` bound the median with 95% confidence."""

    samples: Filled[Positive]
    mean: Positive
    std: Amount
    minimum: Positive
    maximum: Positive
    median: Positive
    first_quartile: Positive
    third_quartile: Positive
    low: Positive
    high: Positive


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure and its 95% interval."""

    value: Number
    low: Number
    high: Number


@dataclass(frozen=True, kw_only=True)
class Check:
    """Something that must hold: ``measured`` may be at most ``limit``. A measured None is not a number."""

    name: str
    measured: float | None
    limit: float
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One of the models that are compared."""

    key: str
    label: str
    parameters: Count
    active_parameters: Count
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is computed on: text, tokens, batch."""

    preset: str
    data: str
    description: str
    tokenizer: str
    vocab_size: Count
    train_tokens: Count
    validation_tokens: Count
    split: str
    batch_size: Count
    sequence_length: Count
    precision: str
    device: str
    threads: Count
    seed: Size


@dataclass(frozen=True, kw_only=True)
class ComponentFlops:
    """FLOPs of one part of the model for one batch, by formula."""

    component: str
    forward: Size
    backward: Size


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """FLOPs of one training step: counted while it ran, and by formula."""

    contestant: str
    forward: Count
    backward: Count
    optimizer: Size
    forward_per_token: Positive
    components: list[ComponentFlops]
    formula_forward: Count
    formula_backward: Count
    counted_as_zero: list[str]

    @property
    def step(self) -> int:
        """Forward, backward and optimizer."""
        return self.forward + self.backward + self.optimizer


@dataclass(frozen=True, kw_only=True)
class FlopsResult:
    """Section 1."""

    models: Filled[ModelFlops]
    ratio: Positive


@dataclass(frozen=True, kw_only=True)
class PhaseTime:
    """Seconds of one phase of one contestant, for one batch (decode: for one token)."""

    phase: str
    contestant: str
    seconds: Summary


@dataclass(frozen=True, kw_only=True)
class PhaseRatio:
    """How many times longer the baseline takes."""

    phase: str
    ratio: Interval


@dataclass(frozen=True, kw_only=True)
class TimingResult:
    """Section 2."""

    warmup_rounds: Size
    rounds: Count
    phases: Filled[PhaseTime]
    ratios: Filled[PhaseRatio]
    tokens_per_second: dict[str, Positive]


@dataclass(frozen=True, kw_only=True)
class ModelMemory:
    """Bytes of tensors in one training step, and what the planner had said of its peak."""

    contestant: str
    parameters: Size
    optimizer: Size
    after_forward: Size
    peak_forward: Size
    peak_backward: Size
    peak_step: Count
    predicted_peak: Size
    largest_part: str
    largest_part_bytes: Size


@dataclass(frozen=True, kw_only=True)
class MemoryResult:
    """Section 3; ``counter`` says what counted, ``process`` is the resident set at the end."""

    counter: str
    models: Filled[ModelMemory]
    ratio: Positive
    process: Size


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A loss after so many steps, tokens and seconds of training (evaluations not timed); None if not a number."""

    step: Size
    tokens: Size
    seconds: Amount
    loss: float | None


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training run. ``leaks`` if the model reads its own targets: its loss is then no measure of anything."""

    key: str
    label: str
    seed: Size
    learning_rate: Positive
    leaks: bool
    parameters: Count
    train: list[CurvePoint]
    validation: Filled[CurvePoint]


@dataclass(frozen=True, kw_only=True)
class ConvergenceResult:
    """Section 4."""

    steps: Count
    tokens_per_step: Count
    seeds: Filled[Size]
    learning_rates: list[Positive]
    evaluated_tokens: Count
    unigram_entropy: Amount
    arms: Filled[Arm]


@dataclass(frozen=True, kw_only=True)
class ScalingPoint:
    """Forward and backward of one sequence; a failure (out of memory) instead of figures."""

    contestant: str
    sequence_length: Count
    seconds: Summary | None
    peak_memory: Size | None
    failure: str | None


@dataclass(frozen=True, kw_only=True)
class Exponent:
    """Slope p of figure ~ N^p over ``from_length`` and longer."""

    contestant: str
    quantity: str
    from_length: Count
    exponent: Interval


@dataclass(frozen=True, kw_only=True)
class ScalingResult:
    """Section 5; ``crossover`` is the shortest measured length from which on ours is faster, None if there is none."""

    points: Filled[ScalingPoint]
    exponents: list[Exponent]
    crossover: Count | None


@dataclass(frozen=True, kw_only=True)
class AccuracyPoint:
    """Largest error of bk_core in float32 against complex128, relative to the largest magnitude; None if not finite."""

    form: str
    sequence_length: Count
    eta: Positive
    potential: Amount
    value_error: float | None
    gradient_error: float | None


@dataclass(frozen=True, kw_only=True)
class CausalityMeasurement:
    """Largest change of a logit before a changed token (float64), for a model that may or may not read ahead."""

    label: str
    causal: bool
    largest_change: float


@dataclass(frozen=True, kw_only=True)
class StabilityResult:
    """Section 6."""

    accuracy: Filled[AccuracyPoint]
    extremes: list[Check]
    causality: list[CausalityMeasurement]
    determinism: list[Check]


@dataclass(frozen=True, kw_only=True)
class Results:
    """What each section measured; None until it has."""

    flops: FlopsResult | None = None
    timing: TimingResult | None = None
    memory: MemoryResult | None = None
    convergence: ConvergenceResult | None = None
    scaling: ScalingResult | None = None
    stability: StabilityResult | None = None


@dataclass(frozen=True, kw_only=True)
class SectionStatus:
    """How a section's measurement ended."""

    seconds: Amount
    failure: str | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """The whole document. The first contestant is ours, the second the baseline; the seed's mixer may be a third."""

    kind: str
    version: int
    created: str
    command: list[str]
    profile: dict[str, Any]
    environment: dict[str, Any]
    workload: Workload
    contestants: list[Contestant]
    gates: list[Check]
    status: dict[str, SectionStatus]
    results: Results

    @property
    def ours(self) -> Contestant:
        """The model that this project is about."""
        return self.contestants[0]

    @property
    def baseline(self) -> Contestant:
        """What it is compared with."""
        return self.contestants[1]


def to_json(report: Report) -> dict[str, Any]:
    """The report as what JSON is made of."""
    document: dict[str, Any] = msgspec.to_builtins(report)
    return document


def read_report(path: Path) -> Report:
    """Reads a report.json.

    Raises:
        UserError: it is missing, damaged, or no report of this version.
    """
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; make one with `resnet-bk bench`") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        reason = f"{error}; make it again with `resnet-bk bench`"
        raise UserError(f"{path} is not a whole report.json: {reason}") from None
    if report.kind != KIND or report.version != VERSION:
        raise UserError(
            f"{path} is {report.kind!r} version {report.version}, this program reads {KIND!r} version {VERSION}; "
            "make it again with `resnet-bk bench`"
        )
    if len(report.contestants) < len(COMPARED):
        raise UserError(f"{path} has {len(report.contestants)} contestants instead of 2 or 3; make it again")
    if complaint := _inconsistency(report):
        raise UserError(f"{path} is damaged: {complaint}; make it again with `resnet-bk bench`")
    return report


def _inconsistency(report: Report) -> str | None:
    """What a table or plot would look for in vain."""
    keys, results = [contestant.key for contestant in report.contestants], report.results
    if tuple(keys) not in (COMPARED, (*COMPARED, SEED_MIXER)):
        return f"its contestants are {' and '.join(keys)} instead of {' and '.join(COMPARED)}"
    for name, models in (("flops", results.flops), ("memory", results.memory)):
        if models and [model.contestant for model in models.models] != keys:
            return f"section {name} does not have its {len(keys)} contestants"
    if results.timing:
        measured = {(row.phase, row.contestant) for row in results.timing.phases}
        for row in results.timing.ratios:
            if not {(row.phase, key) for key in keys} <= measured:
                return f"no time of phase {row.phase!r}"
            if row.ratio.value <= 0:
                return f"the ratio of phase {row.phase!r} is {row.ratio.value}"
    if results.scaling and not {point.contestant for point in results.scaling.points} <= set(keys):
        return "section scaling has an unknown contestant"
    return None
