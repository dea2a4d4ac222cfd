"""Entry point of ``resnet-bk``: reads the arguments, runs one command, turns mistakes into one clear line."""

import contextlib
import inspect
import io
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Annotated

import tyro

from resnet_bk.cli.bench import BenchCommand
from resnet_bk.cli.complaint import one_line
from resnet_bk.cli.env import EnvCommand
from resnet_bk.cli.eval import EvalCommand
from resnet_bk.cli.generate import GenerateCommand
from resnet_bk.cli.plan import PlanCommand
from resnet_bk.cli.report import ReportCommand
from resnet_bk.cli.train import TrainCommand
from resnet_bk.errors import UserError

Command = (
    Annotated[PlanCommand, tyro.conf.subcommand("plan")]
    | Annotated[TrainCommand, tyro.conf.subcommand("train")]
    | Annotated[EvalCommand, tyro.conf.subcommand("eval")]
    | Annotated[GenerateCommand, tyro.conf.subcommand("generate")]
    | Annotated[BenchCommand, tyro.conf.subcommand("bench")]
    | Annotated[ReportCommand, tyro.conf.subcommand("report")]
    | Annotated[EnvCommand, tyro.conf.subcommand("env")]
)

DESCRIPTION = """A language model whose cost grows as O(N): plan its memory, train it, measure it.

Start with `resnet-bk plan --preset seed`, then `resnet-bk train --preset seed --out runs/first`.
"""

COMMANDS = {
    "plan": PlanCommand,
    "train": TrainCommand,
    "eval": EvalCommand,
    "generate": GenerateCommand,
    "bench": BenchCommand,
    "report": ReportCommand,
    "env": EnvCommand,
}
EXIT_OK, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0 done, 2 the user can mend it, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Commands say it in their own words, and on one line.
    warnings.filterwarnings("ignore", message="causal=False", category=UserWarning)
    try:
        command = _parse_once(arguments)
        command.run()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) left; point stdout elsewhere so that the exit flush stays silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}; choose another path", file=sys.stderr)
        return EXIT_USER_ERROR
    except (MemoryError, RuntimeError) as error:
        from resnet_bk.memory.limits import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        advice = "take a smaller --batch-size, --sequence-length or model (`resnet-bk plan` shows what needs how much)"
        print(f"error: out of memory; {advice}", file=sys.stderr)
        return EXIT_USER_ERROR
    return EXIT_OK


def _parse_once(arguments: Sequence[str]) -> Command:
    """Of torchrun's ranks, which all have the same arguments, rank 0 tells what is wrong with them."""
    try:
        return parse(arguments)
    except UserError:
        if os.environ.get("RANK", "0") == "0":
            raise
        time.sleep(1)  # torchrun ends all ranks once one has ended: rank 0 speaks first
        raise SystemExit(EXIT_USER_ERROR) from None


def parse(arguments: Sequence[str]) -> Command:
    """Reads the arguments of one command.

    Raises:
        UserError: they do not fit; the message names the argument and the help to read.
        SystemExit: ``--help`` or ``--version`` was asked for and printed.
    """
    if list(arguments) == ["--version"]:
        from resnet_bk import __version__

        print(f"resnet-bk {__version__}")
        raise SystemExit(EXIT_OK)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                Command,
                prog="resnet-bk",
                description=DESCRIPTION,
                args=list(arguments),
                config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        if not stop.code:
            _print_examples(arguments)
            raise
        raise UserError(one_line(complaint.getvalue(), arguments, COMMANDS)) from None


def _print_examples(arguments: Sequence[str]) -> None:
    """The examples of a command's docstring, below its help: tyro leaves that section out."""
    command = COMMANDS.get(arguments[0]) if arguments else None
    _, heading, examples = inspect.cleandoc((command and command.__doc__) or "").partition("Examples:\n")
    if heading:
        print(f"\n{heading}{examples}")
