"""Where commands print: results on standard output, progress and remarks on standard error."""

import json
import sys
from typing import Any

from rich.console import Console

progress_console = Console(stderr=True, highlight=False)
result_console = Console(highlight=False)


def remark(text: str) -> None:
    """One line about what is going on, on standard error."""
    progress_console.print(text, soft_wrap=True, markup=False)


def print_json(document: Any) -> None:
    """The command's one JSON document, on standard output. NaN and infinity are refused: JSON has none."""
    json.dump(document, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")
