"""Lengths, failures and the crossover."""

import pytest
import torch

from resnet_bk.bench import scaling
from resnet_bk.bench.contestants import contestant_configs
from resnet_bk.bench.profiles import PROFILES
from resnet_bk.bench.statistics import summarize
from resnet_bk.schema import ScalingPoint
from resnet_bk.training.config import TrainingConfig


def point(contestant, length, seconds):
    return ScalingPoint(
        contestant=contestant,
        sequence_length=length,
        seconds=summarize([seconds], resamples=10),
        peak_memory=1,
        failure=None,
    )


@pytest.mark.parametrize(
    ("ours", "baseline", "crossover"),
    [
        ([3, 3, 3], [1, 2, 4], 4),
        ([1, 1, 1], [2, 2, 2], 1),
        ([3, 3, 3], [1, 1, 1], None),
        ([1, 3, 1], [2, 2, 2], 4),
        ([3, 3, 3], [1, 2], 4),
    ],
)
def test_the_crossover_is_where_ours_is_faster_from_then_on(ours, baseline, crossover):
    points = [point("resnet-bk", length, t) for length, t in zip((1, 2, 4), ours, strict=True)]
    points += [point("transformer", length, t) for length, t in zip((1, 2, 4), baseline, strict=False)]
    assert scaling._crossover(points) == crossover


def test_running_out_of_memory_is_a_result_and_longer_lengths_are_not_tried(monkeypatch):
    real = scaling._times

    def limited(subject, rounds):
        if subject.model.config.mixer == "attention" and subject.input_ids.shape[1] >= 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(subject, rounds)

    monkeypatch.setattr(scaling, "_times", limited)
    configs = contestant_configs("tiny", {"vocab_size": 50})
    result = scaling.measure_scaling(
        configs, TrainingConfig(), PROFILES["smoke"], torch.device("cpu"), on_progress=lambda _: None
    )
    failures = {(p.contestant, p.sequence_length): p.failure for p in result.points}
    assert failures["transformer", 32] == "out of memory"
    assert ("transformer", 64) not in failures
    assert failures["resnet-bk", 64] is None
    assert {row.contestant for row in result.exponents} == {"resnet-bk", "seed-mixer"}


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch):
    def broken(subject, rounds):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(scaling, "_times", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        scaling.measure_scaling(
            contestant_configs("tiny", {"vocab_size": 50}),
            TrainingConfig(),
            PROFILES["smoke"],
            torch.device("cpu"),
            on_progress=lambda _: None,
        )
