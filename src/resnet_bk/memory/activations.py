"""What a training step has on a GPU beside weights, by part, as formulas in the shapes.

    T = batch_size x sequence_length tokens (B x N), D hidden, I expert width, E experts, H chains, A attention heads,
    K key width, R of it turn with the position, W channels of a mixer's convolution, S tokens that it sees,
    w tokens that local attention sees,
    V vocabulary, L layers, M micro-batches, C tokens of a chunk of the loss, G chunks of the carry in all rows;
    P parameters, P_b of one block, P_o outside of blocks; c = 4 bytes in fp32, 2 in the half types of autocast.

What is kept between forward and backward are the tensors that autograd saves in this implementation, one by one. What
a moment needs besides are those that come and go in it. It is all for a GPU of compute capability 9: on a CPU kernels
keep and take other tensors. tests/memory/test_strategy_plans.py holds the sums against steps traced tensor by tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from resnet_bk.errors import UserError
from resnet_bk.models import ResNetBKConfig
from resnet_bk.models.flops import extra_coordinates
from resnet_bk.ops.carry.chunked import CHUNK
from resnet_bk.ops.local_attention import flash_takes
from resnet_bk.ops.loss import chunk_rows

MIXTURE, GRADIENTS_AND_RESULTS, TOKENS_KEPT = "mixture of experts", "gradients and results", "tokens kept"
COMPUTED_AGAIN = "a block computed again"
# The kernel that sums experts' gradients in pieces has at most so many numbers in them, and so many rows in each.
MOST_NUMBERS_OF_PIECES = 2**21
ROWS_OF_PIECE = 256


@dataclass(frozen=True, kw_only=True)
class TrainingShape:
    """Sequences in a micro-batch, tokens in a sequence, and micro-batches in a step.

    ``loss_chunk_tokens`` of a micro-batch have logits at once, None for the loss's own rule.
    """

    batch_size: int
    sequence_length: int
    micro_batches: int = 1
    loss_chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length", "micro_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a number of at least 1")
        if self.loss_chunk_tokens is not None and self.loss_chunk_tokens < 1:
            raise UserError(f"loss_chunk_tokens is {self.loss_chunk_tokens}; give a number of at least 1")

    @property
    def tokens(self) -> int:
        """T."""
        return self.batch_size * self.sequence_length


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part's bytes and the formula they come from."""

    name: str
    num_bytes: int
    formula: str


def block_activations(
    config: ResNetBKConfig, shape: TrainingShape, *, half: bool, half_weights: bool = False
) -> list[Part]:
    """What one block saves; ``half`` is autocast, and ``half_weights`` need no half copies for it."""
    tokens, hidden, width = shape.tokens, config.hidden_size, config.intermediate_size
    experts, c = config.num_experts, 2 if half else 4
    # Half-precision products read half copies of the matrices, which autograd keeps too.
    cast = half and not half_weights
    copies = 2 * experts * hidden * width * 2 if cast else 0
    moe = Part(
        name=MIXTURE,
        num_bytes=tokens * (2 * c * width + 2 * c * hidden + 8 * experts + 28) + copies,
        formula="T (2 c I + 2 c D + 8 E + 28)" + (" + 4 E D I" if cast else ""),
    )
    if config.mixer == "bk":
        return [
            _norms(config, shape, 1, half=half),
            moe,
            *_convolution(config, shape, c),
            _bk_core(config, shape, half=half, cast=cast),
            *_dropout(config, shape, c),
        ]
    mixer = {"attention": _attention, "local": _local_attention, "resolvent": _resolvent}[config.mixer]
    return [
        _norms(config, shape, 2, half=half),
        moe,
        *_convolution(config, shape, c),
        mixer(config, shape, half=half, cast=cast),
        *_dropout(config, shape, c),
    ]


def _norms(config: ResNetBKConfig, shape: TrainingShape, number: int, *, half: bool) -> Part:
    """What they read and write; torch's own, in fp32, keeps two numbers more of each token."""
    per_hidden, statistics = (6 * number, 0) if half else (8 * number, 8 * number)
    return Part(
        name="norm" if number == 1 else "norms",
        num_bytes=shape.tokens * (per_hidden * config.hidden_size + statistics),
        formula=f"{per_hidden} T D" if half else f"T ({per_hidden} D + {statistics})",
    )


def _dropout(config: ResNetBKConfig, shape: TrainingShape, c: int) -> list[Part]:
    """Which numbers of both sums are kept, a byte each, and which of what the resolvent reads, asks and writes.
    Attention's kernels draw theirs again."""
    if not config.dropout:
        return []
    hidden, heads = config.hidden_size, config.num_resolvent_heads
    kept = {"2 D": 2 * hidden}
    if config.mixer == "resolvent":
        kept = {"3 D": 3 * hidden, "H K": heads * config.key_size, f"{c} H": c * heads}
    formula = " + ".join(term for term, number in kept.items() if number)
    return [Part(name="dropout", num_bytes=sum(kept.values()) * shape.tokens, formula=f"T ({formula})")]


def _convolution(config: ResNetBKConfig, shape: TrainingShape, c: int) -> list[Part]:
    """Its input; of bk that is what the experts have kept, and its result is what the potential reads."""
    if not config.conv_size:
        return []
    num_bytes = c * _convolved_channels(config) * shape.tokens
    return [Part(name="short convolution", num_bytes=num_bytes, formula="c W T")]


def _convolved_channels(config: ResNetBKConfig) -> int:
    """W, of any mixer."""
    if config.mixer == "bk":
        return config.hidden_size
    if config.mixer in ("attention", "local"):
        return 3 * config.hidden_size
    return 2 * config.num_resolvent_heads * config.key_size + config.hidden_size


def _bk_core(config: ResNetBKConfig, shape: TrainingShape, *, half: bool, cast: bool) -> Part:
    hidden, heads = config.hidden_size, config.num_bk_heads
    # Re G and Im G, which the operator and the output projection both read; a half copy; v if the sweeps go twice.
    per_head = 8 + (4 if half else 0) + (0 if config.causal else 4)
    return Part(
        name="BK-Core and projections",
        num_bytes=shape.tokens * per_head * heads + 8 * shape.batch_size * heads + (4 * hidden * heads if cast else 0),
        formula=f"{per_head} T H + 8 B H" + (" + 4 D H" if cast else ""),
    )


def _attention(config: ResNetBKConfig, shape: TrainingShape, *, half: bool, cast: bool) -> Part:
    hidden, heads = config.hidden_size, config.num_attention_heads
    projections = 8 * hidden * hidden if cast else 0
    # fp32: qkv, the turned q and k, and the mixed values, 4 D each but qkv's 12 D. Halves: qkv, q, k and the mixed
    # values twice, which their kernel leaves in another layout than the projection reads.
    per_hidden = 14 if half else 24
    # And a number for each query and head; fp32's kernel makes rows of 32 of them.
    queries = shape.batch_size * _multiple(shape.sequence_length, 1 if half else 32)
    return Part(
        name="attention and projections",
        num_bytes=shape.tokens * per_hidden * hidden + 4 * heads * queries + projections,
        formula=f"T ({per_hidden} D + 4 A)" + (" + 8 D^2" if cast else ""),
    )


def _local_attention(config: ResNetBKConfig, shape: TrainingShape, *, half: bool, cast: bool) -> Part:
    """Of what fades: what the kernel reads and writes, wider by the coordinates for places; the mixed values; rates and
    queries' places, once for all rows. Of what turns: what it is made from, keys and queries that are turned, results.

    Half types take one call. Without, and with dropout, keys and values behind the first window are read twice, in
    blocks and what is left.
    """
    hidden, heads, c = config.hidden_size, config.num_attention_heads, 2 if half else 4
    rows, extra = shape.batch_size, extra_coordinates(config)
    fades = config.local_attention_positions == "fading"
    in_one_call = half and not config.dropout and flash_takes(hidden // heads, fades=fades)
    calls = [(rows * shape.sequence_length, shape.sequence_length, 0)]
    if not in_one_call:
        calls = _calls_of_local_attention(config, shape)
    wide = hidden + extra * heads
    num_bytes = 8 * hidden * hidden if cast else 0
    for queries, length, before in calls:
        in_kernel = queries if in_one_call else queries // length * _multiple(length, 32)
        num_bytes += 4 * heads * in_kernel + c * length * (before + length) * bool(before)
        keys = queries + queries // length * before
        if fades:
            num_bytes += 2 * c * wide * (queries + keys) + 4 * (length + 3 * heads * (not before))
        else:
            # What is read in blocks is copied, queries where there are several blocks in each of several rows.
            in_blocks = before > 0 and length == config.local_attention_window
            of_queries = queries if rows > 1 and queries > rows * length else 0
            num_bytes += c * hidden * (queries + in_blocks * (2 * keys + of_queries))
    parts = len(calls) > 1
    if fades:
        num_bytes += c * shape.tokens * hidden
        formula = f"{4 * c} T (D + {extra} A) + 4 (T A + N + 3 A) + {c} T D"
        formula += f" + {2 * c} B (N - w) (D + {extra} A) + masks" if parts else ""
    else:
        num_bytes += c * shape.tokens * hidden * (5 + parts)
        formula = f"{6 * c} T D + 4 T A" + (f" + {5 * c} B (N - w) D + masks" if parts else "")
    formula += " + 8 D^2" if cast else ""
    return Part(name="attention and projections", num_bytes=num_bytes, formula=formula)


def _calls_of_local_attention(config: ResNetBKConfig, shape: TrainingShape) -> list[tuple[int, int, int]]:
    """Queries of each call, of each of its rows, and how many keys those have before their own."""
    rows, length, window = shape.batch_size, shape.sequence_length, config.local_attention_window
    first, rest = min(length, window), length % window if length > window else 0
    blocks = (length - first) // window
    calls = [(rows * first, first, 0), (rows * blocks * window, window, window), (rows * rest, rest, window)]
    return [call for call in calls if call[0]]


def _multiple(number: int, of: int) -> int:
    """The next multiple."""
    return -(-number // of) * of


def _resolvent(config: ResNetBKConfig, shape: TrainingShape, *, half: bool, cast: bool) -> Part:
    hidden, heads, channels = config.hidden_size, config.num_resolvent_heads, _convolved_channels(config)
    vector, scattering = config.resolvent_state == "vector", config.resolvent_regime == "scattering"
    c, key_size = 2 if half else 4, config.key_size or 1
    per_hidden = 3 * c  # o, gate and their product
    # q, k and v. What they are made from is the convolution's input, if there is one; a vector's silu reads what that
    # has made.
    per_channel = 2 * c if vector or not config.conv_size else c
    # Tunnelling: potential, softplus, rate and log l. Scattering: potential, l as a pair, |l|^2, log l, and two phases,
    # their cosines and their sines. A vector's ones.
    per_head = (44 if scattering else 16) + (c if vector else 0)
    # q and k turned by the chain's phases; k l of a single token, which goes by the recurrence.
    per_key = (2 * c if scattering else 0) + (4 if shape.sequence_length == 1 else 0)
    # The state before the first token; and, for a moment, the last one, where a
    # single token or a phase turns it.
    states = 2 if scattering or shape.sequence_length == 1 else 1
    state = states * 4 * shape.batch_size * key_size * hidden + (8 * shape.batch_size * heads if scattering else 0)
    projections = 2 * hidden * (channels + 2 * hidden) if cast else 0
    per_token = per_hidden * hidden + per_channel * channels + per_head * heads + per_key * heads * key_size
    return Part(
        name="carry and projections",
        num_bytes=shape.tokens * per_token + state + projections,
        formula=f"T ({per_hidden} D + {per_channel} W + {per_head} H"
        + (f" + {per_key} H K" if per_key else "")
        + f") + {4 * states} B K D"
        + (" + 2 D (W + 2 D)" if cast else ""),
    )


def selected_activations(config: ResNetBKConfig, shape: TrainingShape, *, half: bool) -> list[Part]:
    """What a block keeps under selective checkpointing: its input, and the results of products and of operators."""
    tokens, hidden, c = shape.tokens, config.hidden_size, 2 if half else 4
    mixture = tokens * (c * (config.intermediate_size + hidden) + 4 * config.num_experts)
    if config.mixer == "bk":
        mixer, formula = tokens * (12 * config.num_bk_heads + c * hidden), "T (12 H + c D)"
    elif config.mixer in ("attention", "local"):
        heads, extra = config.num_attention_heads, extra_coordinates(config)
        mixer = tokens * (5 * c * hidden + (4 + extra * c) * heads)
        formula = f"T (5 c D + {4 + extra * c} A)"
    else:
        heads, channels = config.num_resolvent_heads, _convolved_channels(config)
        state = 4 * shape.batch_size * (config.key_size or 1) * hidden
        chains = 12 if config.resolvent_regime == "scattering" else 8
        mixer = tokens * (c * (channels + 3 * hidden) + chains * heads) + state
        formula = f"T (c (W + 3 D) + {chains} H) + 4 B K D"
    return [
        Part(name="block inputs", num_bytes=4 * tokens * hidden, formula="4 T D"),
        Part(name="mixer's products", num_bytes=mixer, formula=formula),
        Part(name="experts' products", num_bytes=mixture, formula="T (c (I + D) + 4 E)"),
    ]


def outer_activations(config: ResNetBKConfig, shape: TrainingShape, *, half: bool) -> list[Part]:
    """What embedding, final norm and loss save. The loss keeps no logits but the gradients that it has computed."""
    tokens, hidden, c = shape.tokens, config.hidden_size, 2 if half else 4
    rotary = 4 * shape.sequence_length * config.rotary_numbers
    return [
        *([Part(name="rotary positions", num_bytes=rotary, formula="4 N R")] if rotary else []),
        Part(name="token ids and targets", num_bytes=16 * tokens, formula="16 T"),
        *([Part(name=TOKENS_KEPT, num_bytes=tokens, formula="T")] if config.token_dropout else []),
        *([Part(name="dropout", num_bytes=tokens * hidden, formula="T D")] if config.dropout else []),
        Part(name="final norm", num_bytes=tokens * (4 * hidden + 8), formula="T (4 D + 8)"),
        Part(
            name="gradients of the head",
            num_bytes=4 * config.vocab_size * hidden + tokens * c * hidden,
            formula="4 V D + c T D",
        ),
    ]


def tokens_with_logits(config: ResNetBKConfig, shape: TrainingShape, *, half: bool) -> int:
    """C."""
    rule = chunk_rows(shape.tokens, config.vocab_size, config.hidden_size, bytes_per_logit=2 if half else 4)
    return min(shape.loss_chunk_tokens or rule, shape.tokens)


def logits_and_loss(config: ResNetBKConfig, shape: TrainingShape, *, half: bool, half_weights: bool = False) -> Part:
    """What a chunk of the loss needs for a moment, beside what it keeps: logits, and its tokens twice.

    Autocast besides: a half copy of the head, unless it is one.
    """
    tokens, hidden, c = shape.tokens, config.hidden_size, 2 if half else 4
    chunk, head = tokens_with_logits(config, shape, half=half), config.vocab_size * hidden
    of_head = 2 if half and not half_weights else 0
    copies = 4  # in fp32 one of its tokens without those that count for nothing, in halves one before that
    return Part(
        name="logits and loss",
        num_bytes=chunk * (c * config.vocab_size + copies * hidden + 8) + 9 * tokens + of_head * head,
        formula=f"C ({c} V + {copies} D + 8) + 9 T" + (f" + {of_head} V D" if of_head else "") + f", C = {chunk:,}",
    )


def loss_backward(config: ResNetBKConfig, shape: TrainingShape, *, half: bool, half_weights: bool = False) -> Part:
    """What the loss's backward pass needs for a moment: the tokens' gradient in float32, scaled, and a half head's."""
    tokens, hidden = shape.tokens * config.hidden_size, config.vocab_size * config.hidden_size
    if half_weights:
        return Part(
            name="gradients of the loss",
            num_bytes=4 * tokens + max(4 * tokens, 2 * hidden),
            formula="4 T D + max(4 T D, 2 V D)",
        )
    times = 8 if half else 4
    return Part(name="gradients of the loss", num_bytes=times * tokens, formula=f"{times} T D")


@dataclass(frozen=True, kw_only=True)
class BlockMoment:
    """A moment of a block's backward pass: what is there of the block and of its tokens' gradients.

    Its parameters' gradients are not among the parts: how many bytes they have, and whether they stay, is the
    strategy's. ``experts`` says which of its experts' are there: the second one just made of two, the last one just
    rounded up to float32, or all long since.
    """

    name: str
    parts: list[Part]
    experts: Literal["none", "second", "last", "all"] = "none"


def block_moments(
    config: ResNetBKConfig, shape: TrainingShape, *, half: bool, half_weights: bool = False, by_block: bool = False
) -> list[BlockMoment]:
    """When a block's backward pass may need most, in no order but that its forward pass, done again, is first.

    ``by_block`` is for blocks that are graphs of their own.
    """
    block = block_activations(config, shape, half=half, half_weights=half_weights)
    c = 2 if half else 4
    at_mixer = _at_chains if config.mixer == "bk" else _at_mixer
    return [
        _computed_again(config, shape, block, c, by_block=by_block),
        *_at_experts(config, shape, block, c),
        *at_mixer(config, shape, block, c),
    ]


def _working(
    config: ResNetBKConfig,
    shape: TrainingShape,
    per_hidden: int,
    *,
    per_token: int = 0,
    more: int = 0,
    formula: str = "",
) -> Part:
    num_bytes = (per_hidden * config.hidden_size + per_token) * shape.tokens + more
    return Part(name=GRADIENTS_AND_RESULTS, num_bytes=num_bytes, formula=f"{per_hidden} T D{formula}")


def _computed_again(
    config: ResNetBKConfig, shape: TrainingShape, block: list[Part], c: int, *, by_block: bool
) -> BlockMoment:
    """The block's results and its output's gradient, and what the mixer hands on to the next call.

    A block that is a graph of its own has its output too, and no half copies yet of that one's gradient.
    """
    h, hidden, experts = 4 - c, config.hidden_size, config.num_experts
    if config.mixer == "bk":
        convolved = c if config.conv_size else 0
        per_hidden, before = (8 + c + (0 if convolved else h), 4) if by_block else (4 + 2 * h + convolved, 4)
    else:
        per_hidden, before = (4 + c, 4) if by_block else (4 + c + 2 * h, h)
    if config.dropout:
        # What it makes of the block's last result; or, in backward, of its output's gradient, with a byte more.
        per_hidden += c if by_block or config.mixer == "bk" else c - h + 1
    # With many experts there is more while they are chosen, although so many bytes a token are yet to come.
    routing = max(4, 12 * experts + 8 - before * hidden)
    state, formula = 0, f" + {routing} T"
    if config.mixer == "resolvent":
        state = 4 * (config.key_size or 1) * hidden + 16 * config.num_resolvent_heads
        formula += " + 4 B K D + 16 B H"
    elif config.mixer == "bk":
        state, formula = 16 * config.num_bk_heads, formula + " + 16 B H"
    if config.conv_size:
        state += c * (config.conv_size - 1) * _convolved_channels(config)
        formula += f" + {c} (S - 1) B W"
    more = state * shape.batch_size
    results = _working(config, shape, per_hidden, per_token=routing, more=more, formula=formula)
    return BlockMoment(name=COMPUTED_AGAIN, parts=[*block, results])


def _at_experts(config: ResNetBKConfig, shape: TrainingShape, block: list[Part], c: int) -> Iterator[BlockMoment]:
    """The mixture's own backward pass; bk's mixer, which comes behind it, is done by then."""
    norms, moe, *mixer = block
    rest = [norms] if config.mixer == "bk" else [norms, *mixer]
    inner, routing = c * config.intermediate_size, 8 * config.num_experts + 28
    sums, formula = _sums_of_experts(config, shape, c)
    first = _working(config, shape, 4, per_token=inner, more=sums, formula=f" + {c} T I + {formula}")
    yield BlockMoment(name="the experts' first gradient", parts=[*rest, moe, first])
    formula = f" + T ({c} I + 8 E + 28)"
    second = _working(config, shape, 4 + 2 * c, per_token=inner + routing, formula=formula)
    yield BlockMoment(name="the experts' second gradient", parts=[*rest, second], experts="second")
    last = _working(config, shape, 4 + c, per_token=routing, formula=" + T (8 E + 28)")
    yield BlockMoment(name="the experts' last gradient", parts=[*rest, last], experts="last")


def _at_mixer(config: ResNetBKConfig, shape: TrainingShape, block: list[Part], c: int) -> Iterator[BlockMoment]:
    """Before the mixture's own backward pass, and in that of the mixer before it."""
    norms, _, *mixer = block
    own = c if config.dropout else 0  # the gradient that comes through it
    working = _working(config, shape, 4 + (4 - c) + 2 * c + own)
    yield BlockMoment(name="the router's gradient", parts=[*block, working])
    norm = replace(_norms(config, shape, 1, half=c == 2), name=norms.name)
    backward = _resolvent_backward if config.mixer == "resolvent" else _attention_backward
    yield BlockMoment(name="the mixer's gradients", parts=[norm, *mixer, backward(config, shape, c)], experts="all")


def _at_chains(config: ResNetBKConfig, shape: TrainingShape, block: list[Part], c: int) -> Iterator[BlockMoment]:
    """bk's mixer, with all of the block there yet."""
    # What comes through either dropout is a gradient of its own, made with a byte more; the chains have used theirs.
    own, byte = (c, 1) if config.dropout else (0, 0)
    h, hidden, heads = 4 - c, config.hidden_size, config.num_bk_heads
    per_token, formula = 4 * heads + 2, " + T (4 H + 2) + 12 D H"
    if not h:
        per_token, formula = per_token + config.conv_size * hidden // 16, f"{formula} + T S D / 16"
    more = 12 * hidden * heads
    working = _working(config, shape, 8 + h + 2 * own + byte, per_token=per_token, more=more, formula=formula)
    yield BlockMoment(name="the mixer's gradients", parts=[*block, working])
    # These are computed by torch, pass by pass, with so many bytes of complex numbers for each head.
    if not config.causal:
        yield BlockMoment(
            name="the chains' gradients",
            parts=[*block, _working(config, shape, 4 + h + own, per_token=64 * heads, formula=" + 64 T H")],
        )
    elif config.bk_grad == "blend":
        yield BlockMoment(
            name="the chains' gradients",
            parts=[*block, _working(config, shape, 4 + 2 * h + own, per_token=44 * heads, formula=" + 44 T H")],
        )


def _sums_of_experts(config: ResNetBKConfig, shape: TrainingShape, c: int) -> tuple[int, str]:
    """A gradient of all experts' matrices; the kernel sums that of few and small ones in pieces, in float32."""
    tokens, per_expert = shape.tokens, config.hidden_size * config.intermediate_size
    numbers = config.num_experts * per_expert
    if numbers <= MOST_NUMBERS_OF_PIECES // 2 and tokens >= 2 * ROWS_OF_PIECE * config.num_experts:
        pieces = min(MOST_NUMBERS_OF_PIECES, tokens * per_expert // ROWS_OF_PIECE)
        return 4 * (pieces + numbers), f"4 min(2^21, T D I / {ROWS_OF_PIECE}) + 4 E D I"
    return c * numbers, f"{c} E D I"


def _resolvent_backward(config: ResNetBKConfig, shape: TrainingShape, c: int) -> Part:
    """At the carry, which has each chunk's state three times over, or at what is behind it."""
    tokens, hidden, heads, key_size = shape.tokens, config.hidden_size, config.num_resolvent_heads, config.key_size or 1
    channels, state = _convolved_channels(config), shape.batch_size * key_size * hidden
    states = _multiple(shape.sequence_length, CHUNK) // CHUNK * state
    summing = (2 * c + 4) * states - c * tokens * hidden + 8 * state
    carried = 2 * c * states + c * tokens * (channels - hidden) + 8 * state
    projected = tokens * (2 * c * (channels - hidden) + config.conv_size * channels // 16) - 4 * state
    return Part(
        name=GRADIENTS_AND_RESULTS,
        num_bytes=tokens * (4 * hidden + 8 * heads) + max(summing, carried, projected),
        formula=f"T (4 D + 8 H + {c} (W - D)) + max({2 * c} G K D + 8 B K D, T ({c} (W - D) + S W / 16) - 4 B K D)",
    )


def _attention_backward(config: ResNetBKConfig, shape: TrainingShape, c: int) -> Part:
    """At the kernel. That for halves sums the queries' gradient in float32, 128 queries and 32 numbers at a time."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    extra = extra_coordinates(config)
    per_hidden, formula = (10, "T 10 D + 4 A B N' (D' + 1)") if c == 2 else (20, "T (20 D + 4 A)")
    sums = 4 * heads * shape.tokens
    if extra:
        # Of queries, keys, values and results.
        sums += 4 * c * extra * heads * shape.tokens
        formula += f" + {4 * c * extra} T A"
    if c == 2:
        width = _multiple(hidden // heads + extra, 32) + 1
        queries = shape.batch_size * _multiple(shape.sequence_length, 128)
        if extra and shape.sequence_length > config.local_attention_window:
            queries = shape.tokens + 128 * shape.batch_size
        sums += 4 * heads * (queries * width - shape.tokens)
    num_bytes = per_hidden * hidden * shape.tokens + sums
    return Part(name=GRADIENTS_AND_RESULTS, num_bytes=num_bytes, formula=formula)
