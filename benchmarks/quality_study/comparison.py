"""Ours against another, as a line of a table: both losses, their difference with its interval, and who wins."""

import statistics
from dataclasses import dataclass

from quality_study.summary import difference
from quality_study.words import signed, with_error

OURS, BASELINE = "ours", "attention"
# Those that had the same tried as ours.
TRANSFORMERS = (
    *(BASELINE, "attention-plain", "attention-lost-reads", "attention-less-lost-reads"),
    "attention-conv-less-lost-reads",
)
COLUMNS = ["ours", "against", "its test loss", "ours minus it (95%)", "in standard errors", ""]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Test losses of seeds; ``who`` says which of ours it is where it is not the default as all else has it."""

    who: str = ""
    ours: list[float]
    rival: str
    theirs: list[float]

    def line(self) -> list[str]:
        """As :data:`COLUMNS` has them. What the interval leaves open is no difference."""
        gap = difference(self.ours, self.theirs)
        mine, its = (f"{with_error(losses)}, {_seeds(losses)}" for losses in (self.ours, self.theirs))
        mine = f"{self.who}: {mine}" if self.who else mine
        if gap is None:
            return [
                mine,
                self.rival,
                its,
                f"{statistics.mean(self.ours) - statistics.mean(self.theirs):+.3f}",
                "",
                "too few seeds",
            ]
        outcome = "no difference is shown" if gap.low <= 0 <= gap.high else "**wins**" if gap.value < 0 else "**loses**"
        return [mine, self.rival, its, signed(gap), f"{gap.errors:+.1f}", outcome]


def best_transformer(losses: dict[str, list[float]]) -> str:
    """The one with the lowest test loss: the choice flatters it."""
    return min((name for name in TRANSFORMERS if name in losses), key=lambda name: statistics.mean(losses[name]))


def _seeds(losses: list[float]) -> str:
    return f"{len(losses)} seed{'s' if len(losses) > 1 else ''}"
