"""What cannot be parsed is one line in plain words, whichever command it was for."""

import os
import re
import subprocess
import sys

import pytest

from resnet_bk.cli.complaint import _options
from resnet_bk.cli.main import COMMANDS, main


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("train --steps 1e3", "--steps is '1e3'; give a whole number; see `resnet-bk train --help`"),
        ("plan --batch-size 2.5", "--batch-size is '2.5'; give a whole number; see `resnet-bk plan --help`"),
        ("train --learning-rate fast", "--learning-rate is 'fast'; give a number; see `resnet-bk train --help`"),
        ("generate run --temperature warm", "--temperature is 'warm'; give a number; see `resnet-bk generate --help`"),
        (
            "plan --max-grad-norm warm",
            "--max-grad-norm: 'warm' is not a norm; give a number, or none; see `resnet-bk plan --help`",
        ),
        ("trian --steps 5", "there is no command trian (did you mean train?); see `resnet-bk --help`"),
        ("--steps 5", "there is no command --steps; see `resnet-bk --help`"),
        ("train --stps 5", "train has no option --stps (did you mean --steps?); see `resnet-bk train --help`"),
        ("eval run --zzz", "eval has no option --zzz; see `resnet-bk eval --help`"),
        (
            "train book.txt",
            "train does not know what book.txt is for; an option begins with --, and words with spaces need quotes; "
            "see `resnet-bk train --help`",
        ),
    ],
)
def test_it_names_the_word_and_the_mend(capsys, words, line):
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {line}\n")


@pytest.mark.parametrize("words", ["train --precision fp8", "train --steps", "eval", ""])
def test_what_else_is_wrong_is_one_line_too(capsys, words):
    assert main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith("--help`") and "─" not in line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_known_by_its_name(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    positional = {"run-folder", "reports"}
    assert {name for name in _options(COMMANDS[command]) if f"--{name}" not in text} <= positional


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_the_parsers_frame_is_taken_off_whatever_the_terminals_encoding(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    words = [sys.executable, "-m", "resnet_bk", "train", "--precision", "fp8"]
    ended = subprocess.run(words, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert re.fullmatch(r"error: invalid choice 'fp8' for argument '--precision'\. [^─]*--help`\n", ended.stderr)
