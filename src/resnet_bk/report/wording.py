"""Figures as people read them."""

from resnet_bk.schema import Contestant, Interval

MIXERS = {
    "resolvent": "keys and values carried by the resolvent",
    "bk": "the resolvent's diagonal as features",
    "attention": "attention with rotary positions",
}


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


def interval(figure: Interval) -> str:
    """1.23 (1.10 to 1.31)."""
    return f"{figure.value:.2f} ({figure.low:.2f} to {figure.high:.2f})"


def error(value: float | None) -> str:
    """A relative error."""
    return "not finite" if value is None else f"{value:.1e}"


def verdict(figure: Interval, ours: str, baseline: str, better: str = "faster") -> str:
    """Who is ahead, if the interval says so."""
    if figure.low > 1:
        return f"{ours} is {figure.value:.2f} times {better}"
    if figure.high < 1:
        return f"{baseline} is {1 / figure.value:.2f} times {better}"
    return "no difference that this measurement can see"


def mixer_in_words(contestant: Contestant) -> str:
    """How its tokens mix: attention with rotary positions behind a short convolution over 4 tokens."""
    mixer, size = str(contestant.config["mixer"]), contestant.config.get("conv_size", 0)
    words = MIXERS.get(mixer, mixer)
    return words + (f" behind a short convolution over {size} tokens" if size else "")


def listing(names: list[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
