"""The tensor tracker against what is really alive."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from resnet_bk.bench.subject import Subject, random_batch
from resnet_bk.memory.tracking import TensorTracker, training_tensors
from resnet_bk.models import ResNetBKConfig
from resnet_bk.training.config import TrainingConfig

CPU = torch.device("cpu")


def distinct_bytes(tensors):
    """Bytes of the storages behind ``tensors``, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


ACTIONS = {
    "make": lambda tensors, i, n: tensors.append(torch.zeros(n)),
    "view": lambda tensors, i, n: tensors.append(tensors[i].view(-1)),
    "slice": lambda tensors, i, n: tensors.append(tensors[i][: n % 7]),
    "expand": lambda tensors, i, n: tensors.append(tensors[i].unsqueeze(0).expand(n, -1)[0]),
    "add in place": lambda tensors, i, n: tensors[i].add_(1),
    "copy": lambda tensors, i, n: tensors.append(tensors[i].clone()),
    "compute": lambda tensors, i, n: tensors.append(tensors[i] * 2),
    "forget": lambda tensors, i, n: tensors.pop(i),
    "resize": lambda tensors, i, n: tensors.__setitem__(i, tensors[i].clone().resize_(n)),
}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(sorted(ACTIONS)), st.integers(0, 100), st.integers(1, 500)), max_size=40))
def test_the_count_is_that_of_the_storages_that_are_alive(program):
    highest = 0
    tensors = []
    with TensorTracker() as tracker:
        for action, place, size in program:
            if not tensors:
                tensors.append(torch.zeros(size))
            ACTIONS[action](tensors, place % len(tensors), size)
            alive = distinct_bytes(tensors)
            highest = max(highest, alive)
            assert tracker.current_bytes == alive
            assert tracker.peak_bytes >= highest
        tensors.clear()
        assert tracker.current_bytes == 0


def test_views_and_work_in_place_cost_nothing():
    with TensorTracker() as tracker:
        x = torch.zeros(100, 10)
        _views = [x.t(), x[3:], x.view(-1), x.unsqueeze(0), x.detach(), *x.unbind(0)]
        x.mul_(2).add_(1).zero_()
    assert (tracker.current_bytes, tracker.peak_bytes) == (4000, 4000)


def test_a_view_keeps_its_whole_storage_alive():
    with TensorTracker() as tracker:
        x = torch.zeros(1000)
        corner = x[:1]
        del x
        assert tracker.current_bytes == 4000
        del corner
        assert tracker.current_bytes == 0


def test_the_peak_is_the_most_at_once_and_not_the_sum():
    with TensorTracker() as tracker:
        for _ in range(5):
            torch.zeros(1000)
        assert (tracker.current_bytes, tracker.peak_bytes) == (0, 4000)
        kept = torch.zeros(250)
        tracker.reset_peak()
        assert tracker.peak_bytes == tracker.current_bytes == kept.nbytes
        torch.zeros(50)
        assert tracker.peak_bytes == 1200


def test_freeing_counts_after_the_tracker_has_ended_too():
    with TensorTracker() as tracker:
        x = torch.zeros(1000)
    assert tracker.current_bytes == 4000
    del x
    assert tracker.current_bytes == 0


def test_what_was_there_before_counts_once_and_only_if_told():
    x = torch.zeros(1000)
    with TensorTracker() as untold:
        torch.zeros(1)
    assert untold.peak_bytes == 4
    with TensorTracker() as tracker:
        tracker.include([x, x.view(10, 100), x[5:]])
        tracker.include([x])
        x.add_(1)
        assert tracker.current_bytes == tracker.peak_bytes == 4000
        del x
        assert tracker.current_bytes == 0


def test_a_resized_storage_counts_with_its_new_size():
    with TensorTracker() as tracker:
        x = torch.zeros(10)
        x.resize_(1000)
        assert tracker.current_bytes == x.untyped_storage().nbytes() == 4000
        x.resize_(500)
        assert tracker.current_bytes == x.untyped_storage().nbytes()
        del x
        assert tracker.current_bytes == 0


def test_what_only_autograd_holds_counts_until_backward_lets_go():
    x = torch.zeros(1000, requires_grad=True)
    with TensorTracker() as tracker:
        y = x.exp().sum()
        assert tracker.current_bytes == 4000 + 4, "exp keeps its result for backward"
        y.backward()
        assert x.grad.nbytes == 4000
        assert tracker.current_bytes == 4 + 4000, "the scalar and the gradient"
        assert tracker.peak_bytes >= 4 + 8000
        x.grad = None
        del y
        assert tracker.current_bytes == 0


def test_an_error_inside_leaves_the_counts_right():
    with pytest.raises(RuntimeError), TensorTracker() as tracker:
        x = torch.zeros(1000)
        torch.zeros(3) @ torch.zeros(4)
    gc.collect()
    assert tracker.current_bytes == x.nbytes


def small_subject(**overrides):
    config = ResNetBKConfig.from_preset("tiny", **overrides)
    training = TrainingConfig(batch_size=2, sequence_length=16)
    return Subject.build(config, training, random_batch(config, 2, 16, CPU))


@pytest.mark.parametrize("tied", [True, False])
def test_what_outlives_a_step_is_weights_and_moments(tied):
    subject = small_subject(tie_word_embeddings=tied)
    subject.step()
    weights = sum(parameter.nbytes for parameter in subject.model.parameters())
    tensors = sum(1 for _ in subject.model.parameters())
    buffers = distinct_bytes(subject.model.buffers())
    # Two moments of each weight, and a step count of 4 bytes for each tensor.
    assert distinct_bytes(training_tensors(subject.model, subject.optimizer)) == 3 * weights + 4 * tensors + buffers
    subject.forward().backward()
    with_gradients = distinct_bytes(training_tensors(subject.model, subject.optimizer))
    assert with_gradients == 4 * weights + 4 * tensors + buffers


# Neither the resolvent mixer nor a convolution: chunks of its carry and copies of its input are made inside operators.
@pytest.mark.parametrize(
    "overrides", [{"mixer": "bk"}, {"mixer": "attention"}, {"tie_word_embeddings": True, "vocab_size": 5000}]
)
def test_a_steps_peak_is_what_the_allocator_hands_out(overrides):
    overrides = {"mixer": "bk", "conv_size": 0, **overrides}
    tracked, watched = small_subject(**overrides), small_subject(**overrides)
    tracked.step()
    with TensorTracker() as tracker:
        tracker.include([*training_tensors(tracked.model, tracked.optimizer), tracked.inputs, tracked.targets])
        tracked.step()
    watched.step()
    resident = [*training_tensors(watched.model, watched.optimizer), watched.inputs, watched.targets]
    current, peak = distinct_bytes(resident), 0
    del resident
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        watched.step()
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    # The allocator also sees what operators use inside themselves, which the tracker does not claim to; and the tracker
    # makes autograd add a tied matrix's two gradients out of place.
    tied = tracked.model.lm_head.weight.nbytes if tracked.model.config.tie_word_embeddings else 0
    assert tracker.peak_bytes <= peak + tied
    assert peak - tracker.peak_bytes <= 0.001 * peak
