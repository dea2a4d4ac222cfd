"""What each of the six sections measures.

Times in seconds, memory in bytes, losses in nats per token, FLOPs are 2 x multiply-adds. A ratio is the baseline's
figure over ours, so that above 1 is in our favour.
"""

from dataclasses import dataclass, field
from typing import Literal

from resnet_bk.schema.figures import (
    Amount,
    Check,
    Comparison,
    Count,
    Failure,
    Filled,
    Interval,
    Number,
    Positive,
    Share,
    Size,
    Summary,
)

Phase = Literal["forward", "backward", "optimizer", "step", "prefill", "decode", "forward, cold cache"]
Axis = Literal["sequence_length", "batch_size", "hidden_size", "num_layers", "num_experts"]
Quantity = Literal["time", "memory"]


@dataclass(frozen=True, kw_only=True)
class ComponentFlops:
    """FLOPs of one part of the model for one batch, by formula."""

    component: str
    forward: Size
    backward: Size


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """FLOPs of one training step: counted while it ran, and by formula.

    A model that is not ours has no formula. ``counted_as_zero`` are operators without products, by a reviewed list.
    ``seed_forward`` is what the formulas of the document that this project began with give for this model's sizes.
    """

    contestant: str
    forward: Count
    backward: Count
    optimizer: Size
    forward_per_token: Positive
    step_per_token: Positive
    counted_as_zero: list[str]
    components: list[ComponentFlops] = field(default_factory=list)
    formula_forward: Count | None = None
    formula_backward: Count | None = None
    seed_forward: Count | None = None

    @property
    def step(self) -> int:
        """Forward, backward and optimizer."""
        return self.forward + self.backward + self.optimizer


@dataclass(frozen=True, kw_only=True)
class FlopsResult:
    """Section 1; ``ratio`` is of a step, None without one of both."""

    models: Filled[ModelFlops]
    ratio: Positive | None
    forward_ratio: Positive | None


@dataclass(frozen=True, kw_only=True)
class PhaseTime:
    """Seconds of one phase of one contestant, for one batch (decode: for one token of every sequence)."""

    phase: Phase
    contestant: str
    seconds: Summary


@dataclass(frozen=True, kw_only=True)
class PhaseRatio:
    """How many times longer the baseline takes."""

    phase: Phase
    ratio: Comparison


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """What this machine does at best, measured in the same cell: FLOPs a second of matrix products in the precision of
    the benchmark, bytes a second of a copy (read and written)."""

    flops: Positive
    copy_bandwidth: Positive


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """Of the machine's peaks: counted FLOPs of forward and backward over the step's median time (None if they cannot be
    counted), and bytes that must move over the median time of AdamW (28 a parameter) and of decoding (weights that a
    token needs, once)."""

    contestant: str
    tokens_per_second: Positive
    first_step_seconds: Positive
    step_flops: Amount | None
    optimizer_bandwidth: Amount
    decode_bandwidth: Amount | None


@dataclass(frozen=True, kw_only=True)
class GpuSample:
    """What the driver said between rounds."""

    seconds: Amount
    sm_clock_mhz: Amount
    temperature: Number
    power_watts: Amount | None
    throttled: bool


@dataclass(frozen=True, kw_only=True)
class TimingResult:
    """Section 2. Models are built anew ``builds`` times, in turns; each build has its share of the ``rounds``.

    ``margin`` is the difference, as a share, below which nothing is claimed.
    """

    builds: Count
    rounds: Count
    warmup_rounds: list[Size]
    margin: Share
    phases: Filled[PhaseTime]
    ratios: list[PhaseRatio]
    peaks: Peaks
    utilisation: list[Utilisation]
    gpu: list[GpuSample] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class MemoryPart:
    """Bytes of one kind of tensor at the worst moment, as the planner says."""

    kind: str
    num_bytes: Size


@dataclass(frozen=True, kw_only=True)
class ModelMemory:
    """Bytes through one training step, and what the planner had said of its peak.

    ``reserved`` is the CUDA allocator's, None without a GPU. ``process`` is the most resident memory of the cell's
    process over what it had before the model. ``grown_per_step`` is by how much a step leaves more behind than the one
    before: 0 unless something leaks. A model that the planner could not trace has no prediction.
    """

    contestant: str
    after_load: Size
    optimizer: Size
    after_forward: Size
    peak_forward: Size
    peak_backward: Size
    peak_step: Count
    reserved: Size | None
    process: Size
    grown_per_step: Number
    predicted_peak: Size | None
    predicted_reserved: Size | None
    parts: list[MemoryPart] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class MemoryResult:
    """Section 3; ``counter`` says what counted, ``ratio`` is of the peak of a step."""

    counter: str
    models: Filled[ModelMemory]
    ratio: Positive | None


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A loss after so many steps, tokens and seconds of training (evaluations not timed); None if not a number.

    ``gradient_norm`` is the mean of the steps since the point before; validation points have none.
    """

    step: Size
    tokens: Size
    seconds: Amount
    loss: float | None
    gradient_norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class WindowLoss:
    """Loss of pieces of the test text that are read in windows of ``length`` tokens, None if it is no number.

    With an ``attention_window`` attention sees so many tokens alone, as rotary attention has to behind what it was
    trained on; without, it sees as far as in training.
    """

    length: Count
    loss: float | None
    attention_window: Count | None = None


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training run. ``leaks`` if the model reads its own targets: its loss is then no measure of anything.

    ``validation`` is what rates are chosen on, ``test_loss`` what claims are made on; ``by_window`` is of pieces of the
    same text in windows of the training length, which come first, and in longer ones, where the model takes them.
    ``largest_jump`` is the largest rise of the training loss over the median of the steps before.
    """

    key: str
    label: str
    seed: Size
    learning_rate: Positive
    leaks: bool
    parameters: Count
    train: list[CurvePoint]
    validation: Filled[CurvePoint]
    test_loss: float | None
    by_window: list[WindowLoss] = field(default_factory=list)
    largest_jump: float | None = None
    largest_gradient_norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """A learning rate that was tried at the first seed, and the validation loss it ended with."""

    key: str
    label: str
    learning_rate: Positive
    loss: float | None
    failure: Failure | None = None


@dataclass(frozen=True, kw_only=True)
class LossDifference:
    """The baseline's test loss less this arm's, paired by seed; above 0 this arm is better."""

    key: str
    label: str
    difference: Comparison


@dataclass(frozen=True, kw_only=True)
class ConvergenceResult:
    """Section 4. ``differences`` are empty with one seed, which can carry no claim.

    ``gradient_difference`` is the test loss with the analytic gradient less that with the exact one, paired by seed.
    """

    steps: Count
    tokens_per_step: Count
    seeds: Filled[Size]
    learning_rates: list[Positive]
    validation_tokens: Count
    test_tokens: Count
    unigram_entropy: Amount
    arms: list[Arm]
    sweep: list[SweepPoint] = field(default_factory=list)
    differences: list[LossDifference] = field(default_factory=list)
    failures: dict[str, Failure] = field(default_factory=dict)
    gradient_difference: Comparison | None = None


@dataclass(frozen=True, kw_only=True)
class ScalingPoint:
    """Forward and backward at one place of one axis; a failure (out of memory, say) instead of figures."""

    contestant: str
    value: Count
    seconds: Summary | None
    peak_memory: Size | None
    parameters: Count | None = None
    failure: Failure | None = None


@dataclass(frozen=True, kw_only=True)
class Exponent:
    """Slope p of figure ~ value^p over ``from_value`` and larger."""

    contestant: str
    quantity: Quantity
    from_value: Count
    exponent: Interval


@dataclass(frozen=True, kw_only=True)
class AxisScaling:
    """One axis, all else as in ``fixed``. ``crossover`` is the smallest measured value from which on ours is faster at
    every one, None if there is none."""

    axis: Axis
    fixed: dict[str, int]
    points: Filled[ScalingPoint]
    exponents: list[Exponent]
    crossover: Count | None


@dataclass(frozen=True, kw_only=True)
class ScalingResult:
    """Section 5."""

    axes: Filled[AxisScaling]


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
    """Largest change of a logit before a changed token, for a model that may or may not read ahead.

    Up to ``limit`` it is rounding: in float64, but for models that only compute in float32.
    """

    label: str
    causal: bool
    largest_change: float | None
    limit: Positive = 1e-10


@dataclass(frozen=True, kw_only=True)
class HalfPrecision:
    """Training steps in float16 with dynamic loss scaling: how many an overflow skipped, and the scale after."""

    contestant: str
    steps: Count
    skipped: Size
    scale: Positive
    loss: float | None


@dataclass(frozen=True, kw_only=True)
class StabilityResult:
    """Section 6. Loss spikes and gradient norms are with the runs of section 4."""

    accuracy: list[AccuracyPoint]
    extremes: list[Check]
    causality: list[CausalityMeasurement]
    determinism: list[Check]
    half_precision: list[HalfPrecision] = field(default_factory=list)
