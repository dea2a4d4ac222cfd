"""The settings in which contestants meet."""

from dataclasses import dataclass, field
from typing import Any, Literal

from quality_study.cells import WEIGHT_DECAY
from quality_study.tasks import Copying, Needle, Recall, Synthetic
from resnet_bk.training.config import Precision

Corpus = Literal["characters", "embedded"]


@dataclass(frozen=True, kw_only=True)
class Study:
    """``rows`` of ``length`` tokens a step.

    Every contestant tries all ``rates`` with the first of each other knob's values, then the other ``weight_decays`` at
    the best rate, the other ``dropouts`` at the best of these and the other ``token_dropouts`` at the best of those,
    with the first seed; the best of all, by what chooses, is then trained with the other seeds. ``base`` is whom tables
    compare with. With a ``tests`` dictionary what is learned is ``task``, and the tests are what it is asked after
    training. ``evaluated_tokens`` of each half of the held-out text are read.
    """

    name: str
    label: str
    shape: dict[str, Any]
    contestants: tuple[str, ...]
    rates: tuple[float, ...]
    steps: int
    rows: int
    length: int
    dropouts: tuple[float, ...] = (0.0,)
    weight_decays: tuple[float, ...] = (WEIGHT_DECAY,)
    token_dropouts: tuple[float, ...] = (0.0,)
    base: str = "attention"
    corpus: Corpus | None = None
    task: Synthetic | None = None
    tests: dict[str, Synthetic] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    precision: Precision = "fp32"
    evaluations: int = 10
    warmup_steps: int = 100
    evaluated_tokens: int = 60_000
    published_loss: float | None = None


SMALL = {"hidden_size": 128, "num_layers": 4, "num_attention_heads": 4, "resolvent_longest_memory": 128.0}
LARGE = {"hidden_size": 512, "num_layers": 9, "num_attention_heads": 8, "resolvent_longest_memory": 256.0}
HALF_NANOGPT = {"hidden_size": 256, "num_layers": 6, "num_attention_heads": 4, "resolvent_longest_memory": 256.0}
NANOGPT = {"hidden_size": 384, "num_layers": 6, "num_attention_heads": 6, "resolvent_longest_memory": 256.0}
MEMORY = {"hidden_size": 128, "num_layers": 2, "num_attention_heads": 4}

POSITIONS = (
    *("hybrid-rotary", "hybrid-half-rotary", "hybrid-rotary-heads", "hybrid-forgetting"),
    *("hybrid-fading", "hybrid-half-fading"),
)
MORE_POSITIONS = ("hybrid-quarter-rotary", "hybrid-slopes")
MAIN = ("ours", "attention", "resolvent", "hybrid")
RIVALS = ("ours-gated", "ours-mamba2", "hybrid-gated", "hybrid-mamba2")
DROPS_READS = ("ours-mamba2-drops-reads", "hybrid-mamba2-drops-reads", "mamba2-drops-reads")
LARGE_RIVALS = (
    *("ours", "attention", "mamba2", "hybrid", "hybrid-mamba2", *DROPS_READS, "ours-keeps-reads"),
    *("hybrid-input-gate", *POSITIONS),
)
TURNS = ("ours-half-rotary", "ours-both", "ours-half-both")
# What might be less sure of what was learned by heart.
UNSURE = ("ours-quiet", "ours-short-text-quiet", "ours-lost-heads", "ours-lost-taps")
# What might learn less by heart.
LESS_BY_HEART = (
    *("ours-no-convolution", "ours-half-keeps-reads", "ours-memory-64"),
    *("hybrid-keeps-weights", "hybrid-keeps-writes", "hybrid-no-convolution", "hybrid-half-state", "hybrid-half"),
    *("hybrid-third", "hybrid-vector", "attention-plain"),
    *("plain-half", "plain-whole", "plain-resolvent", "plain-rotary", "plain-half-state", "plain-quarter-state"),
    *("plain-vector", "plain-half-half-state", "plain-constant-gap", "plain-no-rotation", "plain-linear-keys"),
    *("plain-ungated", "plain-mamba2", "plain-half-rotary", "plain-memory-16", "plain-memory-64"),
    *("plain-memory-64-rotary", "plain-constant-memory", "plain-constant-linear"),
    *("plain-lost-reads", "plain-sigmoid", "plain-sigmoid-lost-writes"),
    *("ours-short-text", "ours-lost-reads", "plain-all-lost-reads", "plain-half-lost-reads"),
    *("attention-lost-reads", "attention-less-lost-reads", "plain-mamba2-lost-reads"),
    *("ours-half-lost-reads", "ours-half-rotary-lost-reads", "ours-short-text-lost-reads"),
    *("attention-conv-less-lost-reads", "plain-lost-memories", "plain-lost-coordinates"),
    *("ours-short-text-fading", "ours-short-text-fading-mamba2", *TURNS),
    *UNSURE,
)
LOST_READS = (
    *("ours-lost-reads", "ours-half-lost-reads", "ours-half-rotary-lost-reads", "ours-short-text-lost-reads"),
    *("ours-short-text", "ours-mamba2-lost-reads", "hybrid-mamba2-lost-reads", "attention-conv-less-lost-reads"),
    *TURNS,
    *UNSURE,
)
SIX_SEEDS = (0, 1, 2, 3, 4, 5)
NINE_SEEDS = (*SIX_SEEDS, 6, 7, 8)
FIFTEEN_SEEDS = tuple(range(15))
# Where a text is read many times over.
LOST_TOKENS = (0.0, 0.05, 0.1)
# Two blocks: one in every fourth would be none.
MEMORIES = ("ours-half", "attention", "resolvent", "hybrid-half")
ABLATIONS = (
    *(*POSITIONS, *MORE_POSITIONS, "hybrid-half", "hybrid-third"),
    *("hybrid-gated", "hybrid-mamba2", "hybrid-gap", "hybrid-constant-gap", "hybrid-own-gap", "hybrid-scattering"),
    *("hybrid-input-gate", "hybrid-gap-write", "hybrid-delta"),
    *("hybrid-linear-keys", "hybrid-taylor", "hybrid-no-rotation", "hybrid-constant-rotation"),
    *("hybrid-token-rotation", "hybrid-half-state", "hybrid-double-state", "hybrid-vector"),
    *("hybrid-no-convolution", "hybrid-diagonal", "hybrid-moe", "attention-plain", "bk", "bk-blend"),
)
# What might do better where the text is short.
SHAKESPEARE_ABLATIONS = (
    *(*POSITIONS, *MORE_POSITIONS, "hybrid-half", "hybrid-gated", "hybrid-mamba2"),
    *("hybrid-input-gate", "hybrid-gap-write", "hybrid-delta", "hybrid-no-rotation", "hybrid-token-rotation"),
    *("hybrid-double-state", "hybrid-no-convolution", "hybrid-diagonal", "attention-plain"),
)
RECALL_LENGTH, PAIRS = 128, 32


def _recall(times: int) -> Recall:
    """Questions at so many times the training length: what lies between is filler."""
    return Recall(pairs=PAIRS, filler=(times - 1) * RECALL_LENGTH)


def _nanogpt(name: str, steps: int, contestants: tuple[str, ...], **fields: Any) -> Study:
    """nanoGPT's own setting for a GPU, but for the number of steps and for what ``fields`` say."""
    label = f"Tiny Shakespeare by characters, nanoGPT's setting for a GPU, {steps:,} steps"
    given: dict[str, Any] = {
        "label": label,
        "shape": NANOGPT,
        "rates": (1e-3, 2e-3),
        "dropouts": (0.3, 0.2, 0.4),
        "weight_decays": (0.1, 1.0),
        "token_dropouts": LOST_TOKENS,
    }
    return Study(
        name=name,
        corpus="characters",
        contestants=contestants,
        steps=steps,
        rows=64,
        length=256,
        precision="bf16",
        evaluations=20,
        published_loss=1.4697,
        **(given | fields),
    )


def _small(**fields: Any) -> Study:
    """About a million parameters; some three million tokens."""
    return Study(shape=SMALL, steps=1000, rows=24, length=128, **fields)


def _large(**fields: Any) -> Study:
    """About 30 million parameters; some sixteen million tokens, but where ``fields`` say more steps."""
    return Study(**({"shape": LARGE, "steps": 1000, "rows": 64, "length": 256, "precision": "bf16"} | fields))


# The most important ones first: what runs, runs in this order.
STUDIES = {
    study.name: study
    for study in (
        _small(
            name="embedded-1m",
            label="Python's source, about 1.1M parameters",
            corpus="embedded",
            contestants=(*MAIN, "gated", "mamba2", "gated-delta", "deltanet", *RIVALS),
            rates=(2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
            seeds=NINE_SEEDS,
        ),
        # The source is that of the Python that runs, and another one's losses are another text's. Each at the rate that
        # was best above.
        _small(
            name="embedded-1m-cpu",
            label="Python's source on a CPU, about 1.1M parameters",
            corpus="embedded",
            contestants=("ours", "attention"),
            rates=(4e-3, 8e-3),
            seeds=(6, 7, 8),
        ),
        # With the one ablation that takes a study with dropout.
        _nanogpt(
            "nanogpt",
            2000,
            (*MAIN, "mamba2", "hybrid-mamba2", *DROPS_READS, "ours-keeps-reads", "hybrid-keeps-writes"),
        ),
        _nanogpt(
            "nanogpt-small",
            2000,
            ("ours", "attention", "hybrid", "ours-keeps-reads", *POSITIONS),
            label="Tiny Shakespeare by characters, nanoGPT's setting with models of width 256, 2,000 steps",
            shape=HALF_NANOGPT,
            rates=(1e-3, 2e-3, 4e-3),
            weight_decays=(0.1, 1.0, 2.0),
        ),
        _small(
            name="shakespeare-1m",
            label="Tiny Shakespeare by characters, about 0.8M parameters",
            corpus="characters",
            contestants=(*MAIN, "gated", "mamba2", *RIVALS),
            rates=(2e-3, 4e-3, 8e-3, 1.6e-2),
            dropouts=(0.0, 0.1),
            seeds=SIX_SEEDS,
        ),
        _large(
            name="embedded-30m",
            label="Python's source, about 30M parameters",
            corpus="embedded",
            contestants=(*LARGE_RIVALS, *LOST_READS),
            rates=(5e-4, 1e-3, 2e-3, 4e-3),
            dropouts=(0.1, 0.0, 0.2),
            weight_decays=(0.1, 0.5, 1.0),
            seeds=SIX_SEEDS,
        ),
        _large(
            name="shakespeare-30m",
            label="Tiny Shakespeare by characters, about 30M parameters",
            corpus="characters",
            contestants=(*LARGE_RIVALS, *LESS_BY_HEART),
            rates=(1e-3, 2e-3, 4e-3, 8e-3),
            dropouts=(0.3, 0.4, 0.5),
            weight_decays=(1.0, 2.0, 4.0),
            token_dropouts=(*LOST_TOKENS, 0.2),
            seeds=FIFTEEN_SEEDS,
        ),
        # At what each is best at with 1,000 steps, but for the token dropout: what all are best at in nanoGPT's setting
        # with 2,000. Then with more dropout, and with more token dropout: by the end all know the text by heart.
        _large(
            name="shakespeare-30m-long",
            label="Tiny Shakespeare by characters, about 30M parameters, 2,500 steps",
            corpus="characters",
            contestants=("ours", "attention", "attention-less-lost-reads"),
            steps=2500,
            rates=(4e-3,),
            dropouts=(0.2, 0.1, 0.3),
            weight_decays=(2.0,),
            token_dropouts=(0.1, 0.2),
            seeds=NINE_SEEDS,
        ),
        _small(
            name="ablations",
            label="one thing changed; Python's source, about 1.1M parameters",
            corpus="embedded",
            # Its own base, at the same rates as all others.
            contestants=("hybrid", *ABLATIONS),
            base="hybrid",
            rates=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
        ),
        _small(
            name="ablations-shakespeare",
            label="one thing changed; Tiny Shakespeare by characters, about 0.8M parameters",
            corpus="characters",
            contestants=("hybrid", *SHAKESPEARE_ABLATIONS),
            base="hybrid",
            rates=(2e-3, 4e-3, 8e-3, 1.6e-2),
        ),
        Study(
            name="recall",
            label=f"associative recall: {PAIRS} pairs, trained at {RECALL_LENGTH} tokens",
            task=_recall(1),
            tests={
                **{f"{times}x the length": _recall(times) for times in (1, 2, 4)},
                "2x the pairs": Recall(pairs=2 * PAIRS),
                "4x the pairs": Recall(pairs=4 * PAIRS),
            },
            shape=MEMORY,
            contestants=(*MEMORIES, "gated-delta"),
            rates=(1e-3, 3e-3),
            steps=4000,
            rows=256,
            length=RECALL_LENGTH,
        ),
        Study(
            name="recall-small",
            label="associative recall: 8 pairs, small enough for a CPU",
            task=Recall(pairs=8, keys=32, values=32, fillers=2),
            tests={
                "1x the length": Recall(pairs=8, keys=32, values=32, fillers=2),
                "4x the length": Recall(pairs=8, keys=32, values=32, fillers=2, filler=96),
                "2x the pairs": Recall(pairs=16, keys=32, values=32, fillers=2),
            },
            shape={"hidden_size": 64, "num_layers": 2, "num_attention_heads": 2},
            contestants=(*MEMORIES, "gated-delta"),
            rates=(3e-3,),
            seeds=(0,),
            steps=800,
            rows=64,
            length=32,
        ),
        Study(
            name="copying",
            label="copying 64 symbols",
            task=Copying(length=64),
            tests={f"{times}x the length": Copying(length=64 * times) for times in (1, 2, 4)},
            shape=MEMORY,
            contestants=MEMORIES,
            rates=(1e-3, 3e-3),
            steps=3000,
            rows=128,
            length=129,
        ),
        Study(
            name="needle",
            label="a needle in random filler, trained at 512 tokens",
            task=Needle(length=512),
            tests={f"{length:,} tokens": Needle(length=length) for length in (512, 1024, 4096, 16_384, 65_536)},
            shape=MEMORY,
            contestants=MEMORIES,
            rates=(1e-3, 3e-3),
            steps=3000,
            rows=64,
            length=512,
        ),
        # At what both are best at with 2,000 steps.
        _nanogpt(
            "nanogpt-full",
            5000,
            ("ours", "attention"),
            rates=(4e-3,),
            dropouts=(0.2,),
            weight_decays=(2.0,),
            token_dropouts=(0.1,),
            seeds=(0,),
        ),
        # For tests and a first look: it says nothing.
        Study(
            name="smoke",
            label="that it runs",
            corpus="embedded",
            shape={"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "resolvent_longest_memory": 32.0},
            contestants=("ours", "attention"),
            rates=(4e-3,),
            dropouts=(0.0, 0.1),
            steps=4,
            rows=2,
            length=32,
            evaluations=2,
            warmup_steps=1,
            evaluated_tokens=600,
        ),
        Study(
            name="smoke-recall",
            label="that it runs",
            task=Recall(pairs=4),
            tests={"1x": Recall(pairs=4), "4x": Recall(pairs=4, filler=48)},
            shape={"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2},
            contestants=("resolvent", "attention"),
            rates=(4e-3,),
            dropouts=(0.0, 0.1),
            steps=4,
            rows=2,
            length=16,
            evaluations=2,
            warmup_steps=1,
            evaluated_tokens=600,
        ),
    )
}
PUBLISHED = tuple(name for name in STUDIES if not name.startswith("smoke"))
