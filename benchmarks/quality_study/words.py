"""Losses and their differences as sentences and tables have them."""

import statistics

from quality_study.summary import Difference, difference, standard_error


def verdict(ours: list[float], theirs: list[float]) -> str:
    """Who is ahead by the losses of their seeds, ours or the Transformer, and by how much."""
    gap = difference(ours, theirs)
    if gap is None:
        means = f"{statistics.mean(ours):.3f} against the Transformer's {statistics.mean(theirs):.3f}"
        return f"test loss {means}, {without_claim(ours, theirs)}"
    if gap.low <= 0 <= gap.high:
        return f"no difference is shown; ours minus the Transformer's is {signed(gap)}"
    near, far = sorted((abs(gap.low), abs(gap.high)))
    where, who = ("below", "wins") if gap.value < 0 else ("above", "loses")
    interval = f"{abs(gap.value):.3f} (95%: {near:.3f} to {far:.3f})"
    return f"our test loss is **{where}** the Transformer's by {interval}: ours **{who}**"


def without_claim(ours: list[float], theirs: list[float]) -> str:
    """Of seeds that are too few."""
    return f"with {len(ours)} and {len(theirs)} seeds, which carries no claim"


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
