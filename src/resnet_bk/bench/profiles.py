"""How much a benchmark measures. Light to import: the command line reads the names from here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Sizes of every section.

    ``rounds`` are interleaved repetitions after at most ``warmup_rounds``, over ``builds`` fresh sets of models;
    ``learning_rates`` and ``rate_factors`` are what :func:`rates_to_try` makes sweeps of, and where there are no
    ``learning_rates`` nothing is swept; a sweep whose best rate is its largest or smallest goes on in that direction,
    ``sweep_extensions`` times at most; ``lengths`` and the axes after it are what scaling goes through; potentials and
    etas span the accuracy grid. A cell that takes more than ``cell_seconds`` is stopped.
    """

    name: str
    purpose: str
    warmup_rounds: int
    rounds: int
    builds: int
    decode_tokens: int
    convergence_steps: int
    evaluations: int
    evaluated_tokens: int
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    lengths: tuple[int, ...]
    batch_sizes: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    scaling_rounds: int
    accuracy_lengths: tuple[int, ...]
    half_precision_steps: int
    cell_seconds: float
    etas: tuple[float, ...] = (1.0, 0.1, 0.01)
    potentials: tuple[float, ...] = (0.1, 1.0, 10.0)
    bootstrap_resamples: int = 2000
    rate_factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    sweep_extensions: int = 1


# Held-out losses after the quick profile's 150 steps, preset seed, bpe:2048 on the standard library's source, seed 0;
# the first two with a convolution over 4 tokens and without a position table, the others as the seed has them:
#
#     rate             0.003  0.005  0.008  0.012  0.02   0.03   0.05
#     resolvent               5.00   4.82   4.74   4.63   4.64
#     attention               5.48   5.25   5.23   5.27   5.42
#     bk               5.37   5.20   5.10   5.06   5.02   5.01   5.04
#     blend            6.86   6.43   6.68   6.94   7.83   13.46  11.90
#     bidirectional    5.33   5.17   5.03   5.06   5.03   4.98   4.98
#
# Neighbours differ by 0.1 without a pattern, so that a finer choice would mean nothing.
FIXED_RATES = {"resolvent": 0.02, "attention": 0.012, "bk": 0.02, "blend": 0.005, "bidirectional": 0.02}
FIXED_RATES_WIDTH = 64
FOREIGN_RATE = 1e-3  # of a model about which nothing is known, where nothing is tuned: Adam's default


def fixed_rate(kind: str, hidden_size: int) -> float:
    """The learning rate of a mixer or variant that is not tuned: what did well at preset seed, where it was measured.

    Wider models take less in proportion, the usual rule for Adam. Local attention takes attention's.
    """
    return FIXED_RATES["attention" if kind == "local" else kind] * min(1.0, FIXED_RATES_WIDTH / hidden_size)


def rate_of(kind: str | None, hidden_size: int | None) -> float:
    """The rate where nothing is tuned; ``kind`` and ``hidden_size`` are None of a model that is not ours."""
    return FOREIGN_RATE if kind is None or hidden_size is None else fixed_rate(kind, hidden_size)


def rates_to_try(profile: Profile, kind: str | None, hidden_size: int | None) -> list[float]:
    """The rates of a sweep, ascending, by one rule for all; empty where the profile has none.

    A kind that was measured before gets ``rate_factors`` around its own :func:`fixed_rate`, so that all begin as well
    placed. Of a model that is not ours nothing is known: it gets all ``learning_rates``, which are more and wider.
    """
    if not profile.learning_rates:
        return []
    if kind is None or hidden_size is None:
        return sorted(profile.learning_rates)
    centre = fixed_rate(kind, hidden_size)
    return sorted(rounded_rate(centre * factor) for factor in profile.rate_factors)


def rounded_rate(rate: float) -> float:
    """Three digits: what a table shows is what was trained with."""
    return float(f"{rate:.3g}")


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="smoke",
            purpose="shows that everything runs; its figures mean nothing",
            warmup_rounds=1,
            rounds=4,
            builds=2,
            decode_tokens=4,
            convergence_steps=4,
            evaluations=2,
            evaluated_tokens=256,
            seeds=(0,),
            learning_rates=(),
            lengths=(16, 32, 64),
            depths=(1, 2),
            scaling_rounds=2,
            accuracy_lengths=(32,),
            half_precision_steps=2,
            cell_seconds=120,
            etas=(1.0, 0.1),
            potentials=(1.0,),
            bootstrap_resamples=200,
        ),
        Profile(
            name="quick",
            purpose="a first look, with one seed and learning rates fixed beforehand",
            warmup_rounds=3,
            rounds=24,
            builds=5,
            decode_tokens=16,
            convergence_steps=100,
            evaluations=5,
            evaluated_tokens=10_000,
            seeds=(0,),
            learning_rates=(),
            lengths=(128, 256, 512, 1024, 2048, 4096),
            scaling_rounds=3,
            accuracy_lengths=(128, 1024),
            half_precision_steps=5,
            cell_seconds=240,
        ),
        Profile(
            name="standard",
            purpose="three seeds, each contestant at the best learning rate of a sweep, longer sequences",
            warmup_rounds=5,
            rounds=32,
            builds=5,
            decode_tokens=16,
            convergence_steps=320,
            evaluations=5,
            evaluated_tokens=40_000,
            seeds=(0, 1, 2),
            learning_rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
            lengths=(128, 256, 512, 1024, 2048, 4096, 8192, 16_384),
            batch_sizes=(1, 2, 4, 8, 16, 32),
            widths=(64, 128, 256, 512),
            depths=(1, 2, 4, 8),
            experts=(1, 2, 4, 8, 16),
            scaling_rounds=5,
            accuracy_lengths=(128, 1024, 8192),
            half_precision_steps=20,
            cell_seconds=900,
        ),
        Profile(
            name="full",
            purpose="five seeds, a wider sweep and longer training, for hours",
            warmup_rounds=5,
            rounds=100,
            builds=10,
            decode_tokens=64,
            convergence_steps=2000,
            evaluations=20,
            evaluated_tokens=100_000,
            seeds=(0, 1, 2, 3, 4),
            learning_rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
            lengths=(128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768),
            batch_sizes=(1, 2, 4, 8, 16, 32, 64),
            widths=(64, 128, 256, 512, 1024),
            depths=(1, 2, 4, 8, 16),
            experts=(1, 2, 4, 8, 16, 32),
            scaling_rounds=15,
            accuracy_lengths=(128, 1024, 8192, 32_768),
            half_precision_steps=200,
            cell_seconds=7200,
            rate_factors=(0.25, 0.5, 1.0, 2.0),
            sweep_extensions=2,
        ),
    )
}
