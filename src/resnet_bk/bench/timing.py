"""Section 2: wall-clock time of the phases of a step, the contestants in turns.

Each round measures every contestant once, in an order that is reversed every other round, so that a machine that
warms up, throttles or serves others is unfair to nobody. Times include waiting for the device.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch

from resnet_bk.bench.contestants import BASELINE, OURS, Subject, synchronizer
from resnet_bk.bench.profiles import Profile
from resnet_bk.bench.statistics import paired_ratio, summarize
from resnet_bk.schema import PhaseRatio, PhaseTime, TimingResult

PHASES = ("forward", "backward", "optimizer", "step", "prefill", "decode")


def measure_timing(subjects: Mapping[str, Subject], profile: Profile) -> TimingResult:
    """Seconds per batch of forward, backward, optimizer, the whole step and prefill; per token of decoding."""
    samples: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(profile.warmup_rounds + profile.rounds):
        order = list(subjects) if number % 2 == 0 else list(subjects)[::-1]
        for key in order:
            for phase, seconds in _one_round(subjects[key], profile.decode_tokens).items():
                if number >= profile.warmup_rounds:
                    samples[phase, key].append(seconds)
    resamples = profile.bootstrap_resamples
    phases = [
        PhaseTime(phase=phase, contestant=key, seconds=summarize(samples[phase, key], resamples=resamples))
        for phase in PHASES
        for key in subjects
    ]
    ratios = [
        PhaseRatio(phase=phase, ratio=paired_ratio(samples[phase, BASELINE], samples[phase, OURS], resamples=resamples))
        for phase in PHASES
    ]
    tokens = next(iter(subjects.values())).input_ids.numel()
    medians = {phase.contestant: phase.seconds.median for phase in phases if phase.phase == "step"}
    return TimingResult(
        warmup_rounds=profile.warmup_rounds,
        rounds=profile.rounds,
        phases=phases,
        ratios=ratios,
        tokens_per_second={key: tokens / seconds for key, seconds in medians.items()},
    )


def _one_round(subject: Subject, decode_tokens: int) -> dict[str, float]:
    clock = _Clock(synchronizer(subject.model.device))
    subject.model.train()
    loss = subject.forward()
    forward = clock.lap()
    loss.backward()  # type: ignore[no-untyped-call]
    backward = clock.lap()
    subject.update()
    optimizer = clock.lap()
    prefill, decode = _generation(subject, clock, decode_tokens)
    return {
        "forward": forward,
        "backward": backward,
        "optimizer": optimizer,
        "step": forward + backward + optimizer,
        "prefill": prefill,
        "decode": decode,
    }


@torch.no_grad()
def _generation(subject: Subject, clock: "_Clock", decode_tokens: int) -> tuple[float, float]:
    """Seconds to read all but the last ``decode_tokens`` of the batch, and per token after that."""
    subject.model.eval()
    prompt_length = subject.input_ids.shape[1] - decode_tokens
    clock.lap()
    output = subject.model(subject.input_ids[:, :prompt_length], use_cache=True, logits_to_keep=1)
    prefill = clock.lap()
    for position in range(prompt_length, prompt_length + decode_tokens):
        output = subject.model(
            subject.input_ids[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True
        )
    return prefill, clock.lap() / decode_tokens


class _Clock:
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
