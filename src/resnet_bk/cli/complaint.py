"""What the parser has to say about arguments, as one line in words of our own."""

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence

_NOT_A_NUMBER = re.compile(
    r"Error parsing (?P<option>\S+): .*?(?P<kind>invalid literal for int\(\) with base 10|could not convert string to "
    r"float): '(?P<value>.*?)'"
)
_UNKNOWN = re.compile(r"Unrecognized (?:or misplaced )?options: (?P<word>.*?)(?:, | \(applied to |$)")


def one_line(complaint: str, arguments: Sequence[str], commands: Mapping[str, type]) -> str:
    """The parser's framed complaint about ``arguments`` as one line, which ends in the help to read."""
    command = arguments[0] if arguments and arguments[0] in commands else ""
    text = _unframed(complaint)
    if number := _NOT_A_NUMBER.match(text):
        kind = "whole number" if "int" in number["kind"] else "number"
        text = f"{number['option']} is {number['value']!r}; give a {kind}"
    elif unknown := _UNKNOWN.match(text):
        text = _about_unknown(unknown["word"], command, commands)
    text = re.sub(r"^Error parsing (\S+: )", r"\1", text)
    return f"{text}; see `{' '.join(['resnet-bk', command]).strip()} --help`"


def _unframed(complaint: str) -> str:
    """Without its frame, which is of dashes below a title where standard output is not UTF-8; behind the next rule it
    repeats the help text."""
    parts: list[list[str]] = [[]]
    is_titled = False
    for line in complaint.splitlines():
        inner = line.strip("│╭╮╰╯|+ ")
        if re.fullmatch("─+|-{3,}", inner):
            is_titled |= len(parts) == 1 and inner.startswith("-")
            parts.append([])
        elif inner and not line.startswith(("╭", "╰")):
            parts[-1].append(inner)
    text = " ".join(parts[1 if is_titled else 0])
    return text.rstrip(".") or "the arguments could not be read"


def _about_unknown(word: str, command: str, commands: Mapping[str, type]) -> str:
    if not command:
        what, known = f"there is no command {word}", list(commands)
    elif word.startswith("-"):
        what, known = f"{command} has no option {word}", [f"--{name}" for name in _options(commands[command])]
    else:
        hint = "an option begins with --, and words with spaces need quotes"
        is_file = os.path.exists(word)  # noqa: PTH110  # Path raises where a name is too long
        if is_file and "data" in _options(commands[command]):
            hint = "--data takes one name: for several files give their folder, or a pattern in quotes"
        return f"{command} does not know what {word} is for; {hint}"
    similar = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return what + (f" (did you mean {similar[0]}?)" if similar else "")


def _options(command: type) -> Iterator[str]:
    """Names of a command's options, those of groups of flags among them."""
    kinds = typing.get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from _options(kind)
        else:
            names = [getattr(note, "name", None) for note in getattr(kind, "__metadata__", ())]
            yield next((name for name in names if name), field.name.replace("_", "-"))
