"""Help, flags and their defaults."""

import re
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest

from resnet_bk.cli.flags import DataFlags, ModelFlags, TrainingFlags, given
from resnet_bk.cli.main import COMMANDS, parse
from resnet_bk.models import ResNetBKConfig
from resnet_bk.models.configuration import field_names
from resnet_bk.training.config import DataConfig, TrainingConfig

MODEL = {name: getattr(ResNetBKConfig, name) for name in field_names()}
TRAINING = {field.name: field.default for field in fields(TrainingConfig)}
DATA = {field.name: field.default for field in fields(DataConfig)}
WORDS = {
    "mixer": "attention",
    "local_attention_positions": "rotary",
    "resolvent_state": "vector",
    "resolvent_regime": "scattering",
    "bk_grad": "blend",
    "precision": "bf16",
    "checkpointing": "selective",
    "moments": "bf16",
}


def flag(name):
    return f"--{name.replace('_', '-')}"


def another(name, default):
    """A value for a field that is not its default, as the word to type and as what it should become."""
    if name in WORDS:
        return WORDS[name], WORDS[name]
    if isinstance(default, bool):
        return str(not default), not default
    if isinstance(default, int) or default is None:
        return "7", 7
    if isinstance(default, float):
        return "0.25", 0.25
    return "something", "something"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse(cli, command):
    outcome = cli(command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    examples = outcome.out.partition("\nExamples:\n")[2].splitlines()
    assert examples
    for example in examples:
        program, name, *words = shlex.split(example)
        assert (program, name) == ("resnet-bk", command)
        assert type(parse([name, *words])) is COMMANDS[command]


def test_help_without_a_command_lists_all_of_them(cli):
    outcome = cli("--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert all(re.search(rf"• {command} ", outcome.out) for command in COMMANDS)
    assert "Examples" not in outcome.out


def test_the_version_is_the_packages(cli):
    from importlib.metadata import version

    outcome = cli("--version")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"resnet-bk {version('resnet-bk')}\n", "")


def test_flags_are_the_fields_of_the_configurations():
    assert [field.name for field in fields(ModelFlags)] == list(MODEL)
    assert {field.name for field in fields(TrainingFlags)} == set(TRAINING)
    assert {field.name for field in fields(DataFlags)} == set(DATA)


@pytest.mark.parametrize(
    ("group", "name", "default"),
    [("model", *item) for item in MODEL.items()]
    + [("training", *item) for item in TRAINING.items()]
    + [("text", *item) for item in DATA.items()],
)
def test_each_field_can_be_set_by_its_flag(group, name, default):
    word, value = another(name, default)
    command = parse(["train", flag(name), word])
    assert given(getattr(command, group)) == {name: value}
    assert type(given(getattr(command, group))[name]) is type(value)
    for other in {"model", "training", "text"} - {group}:
        assert given(getattr(command, other)) == {}


@pytest.mark.parametrize(("command", "names"), [("plan", MODEL), ("bench", MODEL | DATA), ("train", MODEL | DATA)])
def test_commands_that_take_a_model_take_all_of_it(command, names):
    wanted = {name: another(name, default) for name, default in names.items()}
    parsed = parse([command, *(part for name, (word, _) in wanted.items() for part in (flag(name), word))])
    got = given(parsed.model) | (given(parsed.text) if command != "plan" else {})
    assert got == {name: value for name, (_, value) in wanted.items()}


def test_what_is_not_given_is_not_set():
    command = parse(["train", "--out", "x"])
    assert [given(flags) for flags in (command.model, command.training, command.text)] == [{}, {}, {}]


def test_the_help_of_train_tells_the_true_defaults(cli):
    text = " ".join(re.sub("[│─╭╮╰╯]", " ", cli("train", "--help").out).split())
    for name, default in {**TRAINING, **DATA}.items():
        shown = re.search(rf"{flag(name)} (?:INT|FLOAT|STR|fp32|none|True)\S* .*?\(default: (.*?)\)", text)[1]
        assert shown == str(default) or (default is None and shown), name


PROGRAM = """
import sys
from resnet_bk.__main__ import main
try:
    code = main()
except SystemExit as stop:
    code = stop.code
print(sorted({"torch", "transformers", "numpy", "datasets"} & sys.modules.keys()), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("word", ["--help", "--version", "train --help"])
def test_asking_for_help_does_not_wait_for_torch(word, tmp_path):
    # The script's name is how the package knows that it is the command line.
    script = tmp_path / "resnet-bk"
    script.write_text(PROGRAM)
    result = subprocess.run([sys.executable, script, *word.split()], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "[]\n")
    assert "resnet-bk" in result.stdout


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_python_dash_m_is_the_same_command(word, cli):
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "resnet_bk", word], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0
    assert not re.search(r"\| +torch$", result.stderr, re.MULTILINE)
    assert result.stdout == cli(word).out


@pytest.mark.parametrize("command", ["plan", "train"])
def test_no_clipping_is_none_or_0_for_every_command(command):
    given = [parse([command, "--max-grad-norm", word]) for word in ("none", "0", "0.0", "1.5")]
    norms = [(one if command == "plan" else one.training).max_grad_norm for one in given]
    assert [norm or None for norm in norms] == [None, None, None, 1.5]
