"""Figures as people read them."""

from typing import Protocol

from resnet_bk.schema import Comparison, Contestant

MIXERS = {
    "resolvent": "keys and values carried by the resolvent",
    "bk": "the resolvent's diagonal as features",
    "attention": "attention with rotary positions",
    "local": "attention to the last tokens",
}


class Bounded(Protocol):
    """A figure with an interval."""

    @property
    def value(self) -> float:
        """The estimate."""

    @property
    def low(self) -> float:
        """The lower end of its 95% interval."""

    @property
    def high(self) -> float:
        """The upper end."""


def quantity(value: float) -> str:
    """Three significant digits with a prefix: 1.23 M, 45.6 G."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}" if abs(value) < 999.5 * size else f"{value / size:,.0f} {prefix}"
    return f"{value:.3g} "


def milliseconds(seconds: float) -> str:
    """Milliseconds without the unit."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def megabytes(num_bytes: float) -> str:
    """MB (10^6) without the unit."""
    return f"{num_bytes / 1e6:,.1f}"


def interval(figure: Bounded) -> str:
    """1.23 (1.10 to 1.31)."""
    return f"{figure.value:.2f} ({figure.low:.2f} to {figure.high:.2f})"


def inverse(figure: Bounded) -> str:
    """The same interval of one over the figure."""
    return f"{1 / figure.value:.2f} ({1 / figure.high:.2f} to {1 / figure.low:.2f})"


def signed_interval(figure: Bounded) -> str:
    """+0.123 (-0.010 to +0.256)."""
    return f"{figure.value:+.3f} ({figure.low:+.3f} to {figure.high:+.3f})"


def error(value: float | None) -> str:
    """A relative error."""
    return "not finite" if value is None else f"{value:.1e}"


def verdict(figure: Comparison, ours: str, baseline: str, better: str = "as fast") -> str:
    """Who is ahead, if that may be claimed."""
    if not figure.claimed:
        return "no difference can be claimed"
    if figure.value > 1:
        return f"{ours} is {figure.value:.2f} times {better}"
    return f"{baseline} is {1 / figure.value:.2f} times {better}"


def mixer_in_words(contestant: Contestant) -> str:
    """How its tokens mix: attention with rotary positions behind a short convolution over 4 tokens. Of a model that is
    not ours only where it is from."""
    mixer, size = contestant.config.get("mixer"), contestant.config.get("conv_size", 0)
    if mixer not in MIXERS:
        return f"from {contestant.source}"
    every = contestant.config.get("local_attention_every", 0) if mixer == "resolvent" else 0
    # In the middle of so many blocks: a shallow model has none.
    has_local = every and contestant.config.get("num_layers", 0) > every // 2
    # Reports of before there was a choice do not say.
    turns = contestant.config.get("local_attention_positions") == "rotary"
    local = MIXERS["local"] + (" with rotary positions" if turns else "")
    hybrid = f", {local} in one block of {every}" if has_local else ""
    return (
        (local if mixer == "local" else MIXERS[mixer])
        + hybrid
        + (f", behind a short convolution over {size} tokens" if size else "")
    )


def listing(names: list[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def shortened(text: str, letters: int) -> str:
    """The text on one line, its middle left out if it is longer than ``letters``."""
    line = " ".join(text.split())
    half = (letters - 1) // 2
    return line if len(line) <= letters else f"{line[: letters - 1 - half]}…{line[-half:]}"
