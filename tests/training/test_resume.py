"""A run that was stopped and went on is, bit for bit, the run that was not stopped."""

import os
import signal
import threading

import pytest
from small_training import (
    assert_same_state,
    finish,
    metrics_without_times,
    resume,
    start,
)

from resnet_bk.training.checkpoint import checkpoints, step_of
from resnet_bk.training.loop import TrainingInterruptedError, stop_requests

VARIANTS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "bk": {"model": {"mixer": "bk"}},
    "attention": {"model": {"mixer": "attention"}},
    "scattering": {"model": {"resolvent_regime": "scattering", "conv_size": 0}},
    "balanced by a bias": {"model": {"router_bias_update_rate": 0.01}, "gradient_accumulation_steps": 2},
    "tied": {"model": {"tie_word_embeddings": True, "num_experts": 3}},
}
COMMON = {"eval_every": 5, "save_every": 4}


def final_checkpoint(out):
    return checkpoints(out / "checkpoints")[-1]


def without_closing_evaluation(entries, step):
    """A run that ends with ``step`` evaluates once more, on all held-out text; a longer one does not."""
    here = [place for place, entry in enumerate(entries) if entry["step"] == step and "validation_loss" in entry]
    assert len(here) == 2, "the regular evaluation and the closing one"
    return entries[: here[-1]] + entries[here[-1] + 1 :]


@pytest.mark.parametrize("variant", VARIANTS)
def test_10_steps_and_10_more_are_20(tmp_path, text_file, variant):
    options = {**COMMON, **VARIANTS[variant]}
    whole = finish(start(tmp_path / "whole", text_file, steps=20, **options))
    finish(start(tmp_path / "parts", text_file, steps=10, **options))
    assert step_of(final_checkpoint(tmp_path / "parts")) == 10
    ready = resume(tmp_path / "parts", steps=20)
    assert ready.state.step == 10
    parts = finish(ready)
    assert parts.validation == whole.validation
    assert_same_state(parts.checkpoint, whole.checkpoint)
    expected, entries = metrics_without_times(tmp_path / "whole"), metrics_without_times(tmp_path / "parts")
    assert len([entry for entry in expected if "loss" in entry]) == 20
    assert without_closing_evaluation(entries, 10) == expected


def test_saving_evaluating_and_logging_do_not_change_training(tmp_path, text_file):
    often = finish(start(tmp_path / "often", text_file, steps=8, save_every=1, eval_every=1, log_every=1))
    seldom = finish(start(tmp_path / "seldom", text_file, steps=8, log_every=100))
    assert_same_state(often.checkpoint, seldom.checkpoint)


def test_a_run_resumed_after_every_step_is_the_same_run(tmp_path, text_file):
    whole = finish(start(tmp_path / "whole", text_file, steps=5, precision="fp16"))
    finish(start(tmp_path / "parts", text_file, steps=1, precision="fp16"))
    for steps in range(2, 6):
        parts = finish(resume(tmp_path / "parts", steps=steps))
    assert_same_state(parts.checkpoint, whole.checkpoint)


def test_another_seed_is_another_run(tmp_path, text_file):
    """That the comparisons above could fail."""
    ends = [finish(start(tmp_path / str(seed), text_file, steps=3, seed=seed)).checkpoint for seed in (0, 1)]
    with pytest.raises(AssertionError):
        assert_same_state(*ends)


def stop_at(step, number):
    def observer(entry):
        if entry["step"] == step and "loss" in entry:
            os.kill(os.getpid(), number)

    return observer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 7, 10])
def test_a_stop_request_saves_the_step_in_hand_and_resumes_bitwise(tmp_path, text_file, number, step):
    whole = finish(start(tmp_path / "whole", text_file, steps=12, **COMMON))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ready = start(tmp_path / "parts", text_file, steps=12, observer=stop_at(step, number), **COMMON)
    with pytest.raises(TrainingInterruptedError, match=rf"^interrupted after step {step}; saved .*; go on with --resu"):
        finish(ready)
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert step_of(final_checkpoint(tmp_path / "parts")) == step
    ready = resume(tmp_path / "parts")
    assert ready.state.step == step
    parts = finish(ready)
    assert_same_state(parts.checkpoint, whole.checkpoint)
    assert metrics_without_times(tmp_path / "parts") == metrics_without_times(tmp_path / "whole")


def test_a_stop_request_at_the_last_step_lets_the_run_end(tmp_path, text_file):
    summary = finish(start(tmp_path / "run", text_file, steps=3, observer=stop_at(3, signal.SIGINT)))
    assert summary.step == step_of(summary.checkpoint) == 3


def test_a_second_stop_request_acts_at_once(tmp_path, text_file):
    def twice(entry):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second one did not act")

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stop:
        finish(start(tmp_path / "run", text_file, steps=3, observer=twice))
    assert not isinstance(stop.value, TrainingInterruptedError)
    assert signal.getsignal(signal.SIGINT) == handler
    assert step_of(final_checkpoint(tmp_path / "run")) == 0


def test_training_off_the_main_thread_leaves_signals_alone():
    seen = []

    def inside():
        with stop_requests() as asked:
            seen.append(asked())

    handler = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGINT) == handler


def test_a_run_that_goes_on_logs_each_step_once(tmp_path, text_file):
    """Steps after the last checkpoint are logged a second time, in place of the first."""

    class CrashError(Exception):
        pass

    def crash(entry):
        if entry["step"] == 7:
            raise CrashError

    with pytest.raises(CrashError):
        finish(start(tmp_path / "run", text_file, steps=9, observer=crash, **COMMON))
    assert [entry["step"] for entry in metrics_without_times(tmp_path / "run")] == [1, 2, 3, 4, 5, 5, 6, 7]
    ready = resume(tmp_path / "run")
    assert ready.state.step == 4
    finish(ready)
    whole = start(tmp_path / "whole", text_file, steps=9, **COMMON)
    finish(whole)
    assert metrics_without_times(tmp_path / "run") == metrics_without_times(tmp_path / "whole")
