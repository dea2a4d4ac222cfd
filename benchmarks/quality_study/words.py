"""Losses and their differences as tables have them."""

import statistics

from quality_study.summary import Difference, standard_error


def signed(gap: Difference) -> str:
    """With its interval."""
    return f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"


def with_error(losses: list[float]) -> str:
    """Their mean, and its standard error where there are two."""
    error = f" ± {standard_error(losses):.3f}" if len(losses) > 1 else ""
    return f"{statistics.mean(losses):.3f}{error}"


def markdown(columns: list[str], lines: list[list[str]]) -> list[str]:
    """A table."""
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *lines)]
