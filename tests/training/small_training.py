"""A small text, runs of preset tiny on it, and ways to compare how they ended."""

import json
import re
import resource
from contextlib import contextmanager
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from resnet_bk.errors import UserError
from resnet_bk.models import ResNetBKConfig
from resnet_bk.training.checkpoint import MOMENTS, STATE, WEIGHTS
from resnet_bk.training.config import DataConfig, TrainingConfig
from resnet_bk.training.data import prepare_dataset
from resnet_bk.training.metrics import read_metrics
from resnet_bk.training.run import RunConfig, open_run
from resnet_bk.training.start import resume_run, start_run

LINKS = [
    ("malt", "lay in"),
    ("rat", "ate"),
    ("cat", "killed"),
    ("dog", "worried"),
    ("cow with the crumpled horn", "tossed"),
    ("maiden all forlorn", "milked"),
    ("man all tattered and torn", "kissed"),
    ("priest all shaven and shorn", "married"),
    ("cock that crowed in the morn", "waked"),
    ("farmer sowing his corn", "kept"),
]


def _verse(length):
    lines = [f"This is the {LINKS[length - 1][0]}"] if length else ["This is the house that Jack built.\n"]
    for number in range(length - 1, -1, -1):
        target = LINKS[number - 1][0] if number else "house that Jack built.\n"
        lines.append(f"That {LINKS[number][1]} the {target}")
    return "\n".join(lines)


# The nursery rhyme: every verse repeats the ones before it.
TEXT = "\n".join(_verse(length) for length in range(len(LINKS) + 1))

SETTINGS = {
    "batch_size": 2,
    "sequence_length": 16,
    "warmup_steps": 4,
    "learning_rate": 0.01,
    "log_every": 1,
    "eval_every": 1000,
    "eval_tokens": 100,
    "save_every": 1000,
    "num_threads": 1,
    "device": "cpu",
}
TIMES = {"seconds", "tokens_per_second"}


def ignore(_entry):
    """An observer that does not look."""


def start(out, text_file, *, observer=ignore, tokenizer="char", model=(), **training):
    """A new run, ready to train."""
    data = DataConfig(data=str(text_file), tokenizer=tokenizer)
    dataset = prepare_dataset(data)
    config = RunConfig(
        model=ResNetBKConfig.from_preset("tiny", vocab_size=dataset.tokenizer.vocab_size, **dict(model)),
        training=TrainingConfig(**{**SETTINGS, **training}),
        data=data,
    )
    return start_run(out, config, dataset, command=[], observer=observer)


def resume(out, *, steps=None, observer=ignore):
    """The run in ``out``, ready to go on."""
    run = open_run(out)
    if steps is not None:
        run = run.changed(steps=steps)
    return resume_run(run, prepare_dataset(run.config.data), observer=observer)


def finish(ready):
    return ready.trainer.train(ready.state)


def tensors(checkpoint):
    """Weights and moments, byte for byte."""
    files = {file: load_file(checkpoint / file) for file in (WEIGHTS, MOMENTS)}
    return {(file, name): value.numpy().tobytes() for file, loaded in files.items() for name, value in loaded.items()}


def state_without_times(checkpoint):
    state = json.loads((checkpoint / STATE).read_text())
    return {key: value for key, value in state.items() if key not in TIMES}


def assert_same_state(checkpoint, expected):
    """Weights, moments, step and loss scale are equal bit for bit."""
    assert checkpoint.name == expected.name
    ours, theirs = tensors(checkpoint), tensors(expected)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if ours[key] != theirs[key]] == []
    assert state_without_times(checkpoint) == state_without_times(expected)


def metrics_without_times(run_folder):
    entries = read_metrics(run_folder / "metrics.jsonl")
    return [{key: value for key, value in entry.items() if key not in TIMES} for entry in entries]


def with_training(run, **changes):
    return replace(run, config=replace(run.config, training=replace(run.config.training, **changes)))


@contextmanager
def refused(pattern):
    """The block must end in a ``UserError`` of one line that matches."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(pattern, message), message


@contextmanager
def files_of_at_most(num_bytes):
    """Writing past this size fails, as on a full disk: with an OSError from the system itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
