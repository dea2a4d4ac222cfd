"""Section 5: time and memory of one sequence, forward and backward, over its length."""

import gc
import time
from collections.abc import Callable, Sequence

import torch

from resnet_bk.bench.contestants import (
    BASELINE,
    OURS,
    Subject,
    random_batch,
    synchronizer,
    without_position_table,
)
from resnet_bk.bench.memory import peak_bytes
from resnet_bk.bench.profiles import Profile
from resnet_bk.bench.statistics import power_law, summarize
from resnet_bk.memory.limits import is_out_of_memory
from resnet_bk.models import ResNetBKConfig
from resnet_bk.schema import Exponent, ScalingPoint, ScalingResult
from resnet_bk.training.config import TrainingConfig

# An asymptote shows at the long end: short sequences measure the cost of launching operators.
TAIL_POINTS = 4


def measure_scaling(
    configs: dict[str, ResNetBKConfig],
    training: TrainingConfig,
    profile: Profile,
    device: torch.device,
    on_progress: Callable[[str], None],
) -> ScalingResult:
    """Every length that fits; a contestant that ran out of memory is not asked again."""
    points: list[ScalingPoint] = []
    failed: set[str] = set()
    for length in profile.lengths:
        for key, config in configs.items():
            if key in failed:
                continue
            point = _measure(key, without_position_table(config), length, training, profile, device)
            points.append(point)
            if point.failure:
                failed.add(key)
        on_progress(f"  N = {length:,}")
    exponents = [
        exponent
        for key in configs
        for quantity in ("time", "memory")
        if (exponent := _exponent(points, key, quantity, profile.bootstrap_resamples))
    ]
    return ScalingResult(points=points, exponents=exponents, crossover=_crossover(points))


def _measure(
    key: str, config: ResNetBKConfig, length: int, training: TrainingConfig, profile: Profile, device: torch.device
) -> ScalingPoint:
    try:
        subject = Subject.build(config, training, random_batch(config, 1, length, device))
        seconds = _times(subject, profile.scaling_rounds)
        peak = peak_bytes(subject)
    except (MemoryError, RuntimeError) as error:  # CUDA's out of memory is one, and so is the CPU allocator's
        if not is_out_of_memory(error):
            raise
        return ScalingPoint(
            contestant=key, sequence_length=length, seconds=None, peak_memory=None, failure="out of memory"
        )
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return ScalingPoint(
        contestant=key,
        sequence_length=length,
        seconds=summarize(seconds, resamples=profile.bootstrap_resamples),
        peak_memory=peak,
        failure=None,
    )


def _times(subject: Subject, rounds: int) -> list[float]:
    """Seconds of forward and backward, after one that warms up."""
    synchronize = synchronizer(subject.model.device)
    seconds = []
    for _ in range(rounds + 1):
        synchronize()
        began = time.perf_counter()
        subject.forward().backward()  # type: ignore[no-untyped-call]
        synchronize()
        seconds.append(time.perf_counter() - began)
        subject.optimizer.zero_grad(set_to_none=True)
    return seconds[1:]


def _exponent(points: Sequence[ScalingPoint], key: str, quantity: str, resamples: int) -> Exponent | None:
    measured = [point for point in points if point.contestant == key and not point.failure][-TAIL_POINTS:]
    if len(measured) < 2:
        return None
    lengths = [point.sequence_length for point in measured]
    samples = [
        point.seconds.samples if quantity == "time" and point.seconds else [float(point.peak_memory or 0)]
        for point in measured
    ]
    return Exponent(
        contestant=key,
        quantity=quantity,
        from_length=lengths[0],
        exponent=power_law(lengths, samples, resamples=resamples),
    )


def _crossover(points: Sequence[ScalingPoint]) -> int | None:
    medians = {(point.contestant, point.sequence_length): point.seconds.median for point in points if point.seconds}
    lengths = sorted({length for _, length in medians})
    crossover = None
    for length in reversed(lengths):
        ours, baseline = medians.get((OURS, length)), medians.get((BASELINE, length))
        if ours is None or (baseline is not None and ours >= baseline):
            break
        crossover = length
    return crossover
