"""The shape of report.json: what a benchmark writes and the report reads. Nothing else is between them.

Times in seconds, memory in bytes, losses in nats per token, FLOPs are 2 x multiply-adds. A ratio is the baseline's
figure over ours, so that above 1 is in our favour.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from resnet_bk.errors import UserError

KIND, VERSION = "resnet-bk benchmark", 1
SECTIONS = ("flops", "timing", "memory", "convergence", "scaling", "stability")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Raw samples and what they amount to; ``low`` and ``high`` bound the median with 95% confidence."""

    samples: list[float]
    mean: float
    std: float
    minimum: float
    maximum: float
    median: float
    first_quartile: float
    third_quartile: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float


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
    parameters: int
    active_parameters: int
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is computed on: text, tokens, batch."""

    preset: str
    data: str
    description: str
    tokenizer: str
    vocab_size: int
    train_tokens: int
    validation_tokens: int
    split: str
    batch_size: int
    sequence_length: int
    precision: str
    device: str
    threads: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class ComponentFlops:
    """FLOPs of one part of the model for one batch, by formula."""

    component: str
    forward: int
    backward: int


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """FLOPs of one training step: counted while it ran, and by formula."""

    contestant: str
    forward: int
    backward: int
    optimizer: int
    forward_per_token: float
    components: list[ComponentFlops]
    formula_forward: int
    formula_backward: int
    counted_as_zero: list[str]

    @property
    def step(self) -> int:
        """Forward, backward and optimizer."""
        return self.forward + self.backward + self.optimizer


@dataclass(frozen=True, kw_only=True)
class FlopsResult:
    """Section 1."""

    models: list[ModelFlops]
    ratio: float


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

    warmup_rounds: int
    rounds: int
    phases: list[PhaseTime]
    ratios: list[PhaseRatio]
    tokens_per_second: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ModelMemory:
    """Bytes of tensors in one training step, and what the planner had said of its peak."""

    contestant: str
    parameters: int
    optimizer: int
    after_forward: int
    peak_forward: int
    peak_backward: int
    peak_step: int
    predicted_peak: int
    largest_part: str
    largest_part_bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryResult:
    """Section 3; ``counter`` says what counted, ``process`` is the resident set at the end."""

    counter: str
    models: list[ModelMemory]
    ratio: float
    process: int


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A loss after so many steps, tokens and seconds of training (evaluations not timed); None if not a number."""

    step: int
    tokens: int
    seconds: float
    loss: float | None


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training run. ``leaks`` if the model reads its own targets: its loss is then no measure of anything."""

    key: str
    label: str
    seed: int
    learning_rate: float
    leaks: bool
    parameters: int
    train: list[CurvePoint]
    validation: list[CurvePoint]


@dataclass(frozen=True, kw_only=True)
class ConvergenceResult:
    """Section 4."""

    steps: int
    tokens_per_step: int
    seeds: list[int]
    learning_rates: list[float]
    evaluated_tokens: int
    unigram_entropy: float
    arms: list[Arm]


@dataclass(frozen=True, kw_only=True)
class ScalingPoint:
    """Forward and backward of one sequence; a failure (out of memory) instead of figures."""

    contestant: str
    sequence_length: int
    seconds: Summary | None
    peak_memory: int | None
    failure: str | None


@dataclass(frozen=True, kw_only=True)
class Exponent:
    """Slope p of figure ~ N^p over ``from_length`` and longer."""

    contestant: str
    quantity: str
    from_length: int
    exponent: Interval


@dataclass(frozen=True, kw_only=True)
class ScalingResult:
    """Section 5; ``crossover`` is the shortest measured length from which on ours is faster, None if there is none."""

    points: list[ScalingPoint]
    exponents: list[Exponent]
    crossover: int | None


@dataclass(frozen=True, kw_only=True)
class AccuracyPoint:
    """Largest error of bk_core in float32 against complex128, relative to the largest magnitude; None if not finite."""

    form: str
    sequence_length: int
    eta: float
    potential: float
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

    accuracy: list[AccuracyPoint]
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

    seconds: float
    failure: str | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """The whole document. The first contestant is ours, the second the baseline."""

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
    if len(report.contestants) != 2:
        raise UserError(f"{path} has {len(report.contestants)} contestants instead of 2; make it again")
    return report
