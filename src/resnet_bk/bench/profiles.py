"""How much a benchmark measures. Light to import: the command line reads the names from here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Sizes of every section.

    ``rounds`` are interleaved repetitions after ``warmup_rounds``; ``learning_rates`` are tried by every contestant
    on held-out text, with the best kept for each, and where there are none :func:`fixed_rate` applies; potentials and
    etas span the accuracy grid.
    """

    name: str
    purpose: str
    warmup_rounds: int
    rounds: int
    decode_tokens: int
    convergence_steps: int
    evaluations: int
    evaluated_tokens: int
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    lengths: tuple[int, ...]
    scaling_rounds: int
    accuracy_lengths: tuple[int, ...]
    etas: tuple[float, ...] = (1.0, 0.1, 0.01)
    potentials: tuple[float, ...] = (0.1, 1.0, 10.0)
    bootstrap_resamples: int = 2000


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


def fixed_rate(kind: str, hidden_size: int) -> float:
    """The learning rate of a mixer or variant that is not tuned: what did well at preset seed, where it was measured.

    Wider models take less in proportion, the usual rule for Adam.
    """
    return FIXED_RATES[kind] * min(1.0, FIXED_RATES_WIDTH / hidden_size)


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="smoke",
            purpose="shows that everything runs; its figures mean nothing",
            warmup_rounds=1,
            rounds=3,
            decode_tokens=4,
            convergence_steps=4,
            evaluations=2,
            evaluated_tokens=256,
            seeds=(0,),
            learning_rates=(),
            lengths=(16, 32, 64),
            scaling_rounds=2,
            accuracy_lengths=(32,),
            etas=(1.0, 0.1),
            potentials=(1.0,),
            bootstrap_resamples=200,
        ),
        Profile(
            name="quick",
            purpose="a first look, with one seed and learning rates fixed beforehand",
            warmup_rounds=3,
            rounds=15,
            decode_tokens=16,
            convergence_steps=150,
            evaluations=6,
            evaluated_tokens=20_000,
            seeds=(0,),
            learning_rates=(),
            lengths=(128, 256, 512, 1024, 2048, 4096),
            scaling_rounds=3,
            accuracy_lengths=(128, 1024),
        ),
        Profile(
            name="standard",
            purpose="three seeds, each contestant at the best of four learning rates, longer sequences",
            warmup_rounds=5,
            rounds=50,
            decode_tokens=64,
            convergence_steps=1000,
            evaluations=10,
            evaluated_tokens=100_000,
            seeds=(0, 1, 2),
            learning_rates=(1e-3, 2e-3, 4e-3, 8e-3),
            lengths=(128, 256, 512, 1024, 2048, 4096, 8192, 16_384),
            scaling_rounds=7,
            accuracy_lengths=(128, 1024, 8192),
        ),
    )
}
