"""Section 2: wall-clock time of the phases of a step, the contestants in turns.

All contestants are in one process. Each round measures every contestant once, in an order that is reversed every other
round, so that a machine that warms up, throttles or serves others is unfair to nobody. Models are built anew several
times, because where in memory one happens to lie makes it some percent faster or slower. Times include waiting for the
device; Python's garbage collector runs between turns and not within.

A contestant's turn begins with a forward pass after other bytes have been put into the caches. What follows finds its
weights there, as far as they fit.
"""

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import nn

from resnet_bk.bench.cells import Cell, Outcomes, result_of
from resnet_bk.bench.flops import UncountedOperatorError, count_passes, positions
from resnet_bk.bench.machine import CacheFlush, GpuWatch, measure_peaks
from resnet_bk.bench.profiles import Profile
from resnet_bk.bench.setup import Setup
from resnet_bk.bench.statistics import Pairs, compare, summarize
from resnet_bk.bench.subject import Subject, synchronizer
from resnet_bk.memory.parameters import count_parameters
from resnet_bk.models import ResNetBKForCausalLM
from resnet_bk.schema import Peaks, Phase, PhaseRatio, PhaseTime, TimingResult, Utilisation
from resnet_bk.training.config import Precision

NAME = "timing"
RESULT = TimingResult
ALL = "all"

PHASES: tuple[Phase, ...] = get_args(Phase)
# Nothing smaller is claimed: a model differs from itself by so much, when built again.
MARGIN = 0.02
# Steps as long as the one before, within this share, are warm.
STABLE = 0.05
# AdamW reads a weight, its gradient and both moments, and writes all but the gradient, four bytes each.
OPTIMIZER_BYTES = 28

Builders = Mapping[str, Callable[[], Subject]]


def cells(setup: Setup, _: Outcomes) -> list[Cell]:
    """One, in which contestants take turns."""
    profile = setup.profile
    turns = len(setup.contenders) * (profile.rounds + profile.builds * profile.warmup_rounds)
    return [Cell(section=NAME, name=ALL, weight=2 + 0.3 * turns)] if setup.contenders else []


def measure(setup: Setup, _: Cell) -> TimingResult:
    """All phases of all contestants."""
    builders = {key: partial(setup.subject, key) for key in setup.contenders}
    return measure_timing(builders, setup.profile, compared=setup.compared)


def assemble(_: Setup, outcomes: Outcomes) -> TimingResult | None:
    """What the cell has measured."""
    result: TimingResult | None = result_of(outcomes, ALL)
    return result


def measure_timing(builders: Builders, profile: Profile, *, compared: tuple[str, str] | None) -> TimingResult:
    """Seconds per batch of each phase; of decoding per token of every sequence.

    Args:
        builders: make the contestants, at least one, all on one device.
        profile: how many rounds, builds and tokens.
        compared: ours and the baseline; None if there is nothing to compare.
    """
    run = _Run(builders, profile)
    gc.freeze()  # what is there by now need not be looked through between turns
    try:
        for build in range(run.builds):
            run.measure_build(build)
    finally:
        gc.unfreeze()
    peaks = measure_peaks(run.device, run.precision)
    summaries = {name: summarize(found, resamples=profile.bootstrap_resamples) for name, found in run.samples.items()}
    medians = {name: summary.median for name, summary in summaries.items()}
    return TimingResult(
        builds=run.builds,
        rounds=profile.rounds,
        warmup_rounds=run.warmup_rounds,
        margin=MARGIN,
        phases=[
            PhaseTime(phase=phase, contestant=key, seconds=summaries[phase, key])
            for phase in PHASES
            for key in builders
            if (phase, key) in summaries
        ],
        ratios=ratios_of(run.samples, run.blocks, compared, profile.bootstrap_resamples),
        peaks=peaks,
        utilisation=[_utilisation(key, run, medians, peaks) for key in builders],
        gpu=run.watch.samples,
    )


def seconds_of(work: Callable[[], object], synchronize: Callable[[], None]) -> float:
    """Of one call, with the device's work."""
    clock = Clock(synchronize)
    work()
    return clock.lap()


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """What is left over by now is collected first; within the block nothing is."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Clock:
    """Seconds between laps, the device's work included."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        synchronize()
        self._then = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        self._synchronize()
        now = time.perf_counter()
        elapsed, self._then = now - self._then, now
        return elapsed


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """Of a contestant: tokens of a batch, FLOPs of both passes (None if they cannot be counted), parameters that are
    trained, and the bytes of weights that a token needs."""

    tokens: int
    flops: int | None
    trained: int
    weight_bytes: int


class _Run:
    """Samples by phase and contestant, build after build."""

    def __init__(self, builders: Builders, profile: Profile) -> None:
        self._builders, self._profile = builders, profile
        self.builds = min(profile.builds, profile.rounds)
        self.blocks = blocks_of(profile.rounds, self.builds)
        self.samples: dict[tuple[Phase, str], list[float]] = defaultdict(list)
        self.first_step: dict[str, float] = {}
        self.warmup_rounds: list[int] = []
        self.facts: dict[str, _Facts] = {}
        self.device = torch.device("cpu")
        self.precision: Precision = "fp32"

    def measure_build(self, build: int) -> None:
        """Builds all contestants, warms them up, and measures this build's share of the rounds."""
        subjects = {key: self._builders[key]() for key in _turns(self._builders, build)}
        if build == 0:
            self._begin(next(iter(subjects.values())))
            self.first_step = {key: seconds_of(subjects[key].step, self._synchronize) for key in self._builders}
        self.warmup_rounds.append(self._warm_up(subjects))
        self.watch.sample()
        for number in (number for number, block in enumerate(self.blocks) if block == build):
            for key, seconds in self._round(subjects, number).items():
                for phase, value in seconds.items():
                    self.samples[phase, key].append(value)
        self.watch.sample()
        if build == self.builds - 1:
            self.facts = {key: _facts(subject) for key, subject in subjects.items()}

    def _begin(self, subject: Subject) -> None:
        self.device, self.precision = subject.device, subject.training.precision
        self._synchronize = synchronizer(self.device)
        self._flush = CacheFlush(self.device)
        self.watch = GpuWatch(self.device)

    def _warm_up(self, subjects: Mapping[str, Subject]) -> int:
        """Rounds that were needed until every contestant's step took as long as in the round before."""
        before: dict[str, float] = {}
        for number in range(self._profile.warmup_rounds):
            steps = {key: seconds["step"] for key, seconds in self._round(subjects, number).items()}
            if before and all(abs(steps[key] / before[key] - 1) <= STABLE for key in steps):
                return number + 1
            before = steps
        return self._profile.warmup_rounds

    def _round(self, subjects: Mapping[str, Subject], number: int) -> dict[str, dict[Phase, float]]:
        return {key: self._turn(subjects[key]) for key in _turns(self._builders, number)}

    def _turn(self, subject: Subject) -> dict[Phase, float]:
        subject.model.train()
        self._flush()
        with without_garbage_collection():
            clock = Clock(self._synchronize)
            subject.forward()
            found: dict[Phase, float] = {"forward, cold cache": clock.lap()}
            loss = subject.forward()
            found["forward"] = clock.lap()
            loss.backward()  # type: ignore[no-untyped-call]
            found["backward"] = clock.lap()
            subject.update()
            found["optimizer"] = clock.lap()
            # Not the sum of its parts: between them a GPU need not be waited for.
            subject.step()
            found["step"] = clock.lap()
            return found | self._generation(subject, clock)

    @torch.no_grad()
    def _generation(self, subject: Subject, clock: Clock) -> dict[Phase, float]:
        """Reading all but the last tokens of the batch, and each token after that."""
        tokens = self._profile.decode_tokens
        prompt_length = subject.inputs.shape[1] - tokens if subject.generates else 0
        if prompt_length < 1:
            return {}
        subject.model.eval()
        clock.lap()
        output = subject.read(prompt_length)
        prefill = clock.lap()
        for position in range(prompt_length, prompt_length + tokens):
            output = subject.decode(position, output.past_key_values)
        return {"prefill": prefill, "decode": clock.lap() / tokens}


def _turns(builders: Builders, number: int) -> list[str]:
    """Reversed every other time."""
    return list(builders) if number % 2 == 0 else list(builders)[::-1]


def blocks_of(rounds: int, builds: int) -> list[int]:
    """The build of each round."""
    return sorted(number % builds for number in range(rounds))


def ratios_of(
    samples: Mapping[tuple[Phase, str], Sequence[float]],
    blocks: Sequence[int],
    compared: tuple[str, str] | None,
    resamples: int,
) -> list[PhaseRatio]:
    """The baseline's over ours in each phase that both have.

    ``samples`` by phase and contestant, in the order of rounds; ``blocks`` as :func:`blocks_of` has them; ``compared``
    as in :func:`measure_timing`.
    """
    if compared is None:
        return []
    ours, baseline = compared
    pairs = {
        phase: Pairs(ours=samples[phase, ours], baseline=samples[phase, baseline], blocks=blocks)
        for phase in PHASES
        if {(phase, ours), (phase, baseline)} <= set(samples)
    }
    found = compare(pairs, margin=MARGIN, resamples=resamples)
    return [PhaseRatio(phase=phase, ratio=ratio) for phase, ratio in found.items()]


def _utilisation(key: str, run: _Run, medians: Mapping[tuple[Phase, str], float], peaks: Peaks) -> Utilisation:
    facts, step = run.facts[key], medians["step", key]
    optimizer_bytes = OPTIMIZER_BYTES * facts.trained
    decode = medians.get(("decode", key))
    return Utilisation(
        contestant=key,
        tokens_per_second=facts.tokens / step,
        first_step_seconds=run.first_step[key],
        step_flops=None if facts.flops is None else facts.flops / step / peaks.flops,
        optimizer_bandwidth=optimizer_bytes / medians["optimizer", key] / peaks.copy_bandwidth,
        decode_bandwidth=None if decode is None else facts.weight_bytes / decode / peaks.copy_bandwidth,
    )


def _facts(subject: Subject) -> _Facts:
    subject.model.train()
    try:
        counted = count_passes(subject)
    except UncountedOperatorError:
        counted = None
    return _Facts(
        tokens=positions(subject),
        flops=None if counted is None else counted.forward + counted.backward,
        trained=sum(parameter.numel() for parameter in subject.model.parameters() if parameter.requires_grad),
        weight_bytes=weight_bytes_of_a_token(subject.model),
    )


def weight_bytes_of_a_token(model: nn.Module) -> int:
    """Weights that a token meets: all but tables of which it reads a row, and experts that it does not choose."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    others = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    met = [parameter for parameter in model.parameters() if id(parameter) not in tables - others]
    total = sum(parameter.numel() * parameter.element_size() for parameter in met)
    if isinstance(model, ResNetBKForCausalLM):
        counts = count_parameters(model.config)
        total -= (counts.total - counts.active) * next(model.parameters()).element_size()
    return total
