"""What a training step keeps between forward and backward, by part, as formulas in the shapes.

    T = batch_size x sequence_length tokens (B x N), D hidden, I expert width, E experts, H chains, A attention heads,
    K key width, R of it turn with the position, W channels of a mixer's convolution, V vocabulary,
    L layers, C tokens of a chunk of the loss; c = 4 bytes in fp32, 2 in the half types of autocast.

They list the tensors that autograd saves in this implementation, one by one. Against tensors tracked on a CPU the
predicted peak of a step is between 0 and 15% above the measured one over the grid of
tests/memory/test_activations.py. What kernels use inside themselves is not in it.
"""

from dataclasses import dataclass

import torch

from resnet_bk.errors import UserError
from resnet_bk.models import ResNetBKConfig
from resnet_bk.ops.loss import bytes_per_logit, chunk_rows


@dataclass(frozen=True, kw_only=True)
class TrainingShape:
    """Sequences in a micro-batch, tokens in a sequence, and micro-batches in a step."""

    batch_size: int
    sequence_length: int
    micro_batches: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length", "micro_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a number of at least 1")

    @property
    def tokens(self) -> int:
        """T."""
        return self.batch_size * self.sequence_length


@dataclass(frozen=True, kw_only=True)
class ActivationPart:
    """One part's bytes and the formula they come from."""

    name: str
    num_bytes: int
    formula: str


def block_activations(
    config: ResNetBKConfig, shape: TrainingShape, *, half: bool, half_weights: bool = False
) -> list[ActivationPart]:
    """What one block saves; ``half`` is autocast, and ``half_weights`` need no half copies for it."""
    tokens, hidden, width = shape.tokens, config.hidden_size, config.intermediate_size
    experts, c = config.num_experts, 2 if half else 4
    # Half-precision products read half copies of the matrices, which autograd keeps too.
    cast = half and not half_weights
    copies = 2 * experts * hidden * width * 2 if cast else 0
    moe = ActivationPart(
        name="mixture of experts",
        num_bytes=tokens * (2 * c * width + 2 * c * hidden + 8 * experts + 28 + c) + copies,
        formula="T (2 c I + 2 c D + 8 E + 28 + c)" + (" + 4 E D I" if cast else ""),
    )
    norm_input = 8 * hidden + 8
    if config.mixer == "bk":
        return [
            ActivationPart(name="norm", num_bytes=tokens * norm_input, formula="T (8 D + 8)"),
            moe,
            *_convolution(config, shape, c),
            _bk_core(config, shape, half=half, cast=cast),
        ]
    mixer = _attention if config.mixer == "attention" else _resolvent
    return [
        ActivationPart(name="norms", num_bytes=tokens * 2 * norm_input, formula="T (16 D + 16)"),
        moe,
        *_convolution(config, shape, c),
        mixer(config, shape, half=half, cast=cast),
    ]


def _convolution(config: ResNetBKConfig, shape: TrainingShape, c: int) -> list[ActivationPart]:
    """Its input."""
    if not config.conv_size:
        return []
    num_bytes = c * _convolved_channels(config) * shape.tokens
    return [ActivationPart(name="short convolution", num_bytes=num_bytes, formula="c W T")]


def _convolved_channels(config: ResNetBKConfig) -> int:
    """W, of any mixer."""
    if config.mixer == "bk":
        return config.hidden_size
    if config.mixer == "attention":
        return 3 * config.hidden_size
    return 2 * config.num_resolvent_heads * config.key_size + config.hidden_size


def _bk_core(config: ResNetBKConfig, shape: TrainingShape, *, half: bool, cast: bool) -> ActivationPart:
    hidden, heads = config.hidden_size, config.num_bk_heads
    # Re G and Im G, which the operator and the output projection both read; a half copy; v if the sweeps go twice.
    per_head = 8 + (4 if half else 0) + (0 if config.causal else 4)
    return ActivationPart(
        name="BK-Core and projections",
        num_bytes=shape.tokens * (4 * hidden + per_head * heads) + (4 * hidden * heads if cast else 0),
        formula=f"T (4 D + {per_head} H)" + (" + 4 D H" if cast else ""),
    )


def _attention(config: ResNetBKConfig, shape: TrainingShape, *, half: bool, cast: bool) -> ActivationPart:
    hidden, heads = config.hidden_size, config.num_attention_heads
    projections = 8 * hidden * hidden if cast else 0
    # fp32: input of qkv, qkv, the turned q and k, the mixed values in two layouts, 4 D each but qkv's 12 D. Autocast
    # keeps qkv, q, k and the mixed values as halves.
    per_hidden = 12 if half else 28
    return ActivationPart(
        name="attention and projections",
        num_bytes=shape.tokens * (per_hidden * hidden + 4 * heads) + projections,
        formula=f"T ({per_hidden} D + 4 A)" + (" + 8 D^2" if cast else ""),
    )


def _resolvent(config: ResNetBKConfig, shape: TrainingShape, *, half: bool, cast: bool) -> ActivationPart:
    hidden, heads, channels = config.hidden_size, config.num_resolvent_heads, _convolved_channels(config)
    vector, scattering = config.resolvent_state == "vector", config.resolvent_regime == "scattering"
    c, key_size = 2 if half else 4, config.key_size or 1
    # o, gate and their product, and under autocast a half copy of the projections' input.
    per_hidden = 8 if half else 12
    # q, k and v. What they are made from is the convolution's input, if there is one; a vector's silu reads what that
    # has made.
    per_channel = 2 * c if vector or not config.conv_size else c
    # Tunnelling: potential, softplus and log l. Scattering: potential, l as a pair, |l|^2, log l, and two phases, their
    # cosines and their sines. A vector's ones.
    per_head = (44 if scattering else 12) + (c if vector else 0)
    # q and k turned by the chain's phases; k l of a single token, which goes by the recurrence.
    per_key = (2 * c if scattering else 0) + (4 if shape.sequence_length == 1 else 0)
    # The state before the first token; and, for a moment, the last one, where a
    # single token or a phase turns it.
    states = 2 if scattering or shape.sequence_length == 1 else 1
    state = states * 4 * shape.batch_size * key_size * hidden
    projections = 2 * hidden * (channels + 2 * hidden) if cast else 0
    per_token = per_hidden * hidden + per_channel * channels + per_head * heads + per_key * heads * key_size
    return ActivationPart(
        name="carry and projections",
        num_bytes=shape.tokens * per_token + state + projections,
        formula=f"T ({per_hidden} D + {per_channel} W + {per_head} H"
        + (f" + {per_key} H K" if per_key else "")
        + f") + {4 * states} B K D"
        + (" + 2 D (W + 2 D)" if cast else ""),
    )


def selected_activations(config: ResNetBKConfig, shape: TrainingShape, *, half: bool) -> list[ActivationPart]:
    """What a block keeps under selective checkpointing: its input, and the results of products and of operators."""
    tokens, hidden, c = shape.tokens, config.hidden_size, 2 if half else 4
    mixture = tokens * (c * (config.intermediate_size + hidden) + 4 * config.num_experts)
    if config.mixer == "bk":
        mixer, formula = tokens * (12 * config.num_bk_heads + c * hidden), "T (12 H + c D)"
    elif config.mixer == "attention":
        mixer, formula = tokens * (5 * c * hidden + 4 * config.num_attention_heads), "T (5 c D + 4 A)"
    else:
        heads, channels = config.num_resolvent_heads, _convolved_channels(config)
        state = 4 * shape.batch_size * (config.key_size or 1) * hidden
        chains = 12 if config.resolvent_regime == "scattering" else 8
        mixer = tokens * (c * (channels + 3 * hidden) + chains * heads) + state
        formula = f"T (c (W + 3 D) + {chains} H) + 4 B K D"
    return [
        ActivationPart(name="block inputs", num_bytes=4 * tokens * hidden, formula="4 T D"),
        ActivationPart(name="mixer's products", num_bytes=mixer, formula=formula),
        ActivationPart(name="experts' products", num_bytes=mixture, formula="T (c (I + D) + 4 E)"),
    ]


def outer_activations(config: ResNetBKConfig, shape: TrainingShape, *, half: bool) -> list[ActivationPart]:
    """What embedding, final norm and loss save. The loss keeps no logits but the gradients that it has computed."""
    tokens, hidden, c = shape.tokens, config.hidden_size, 2 if half else 4
    rotary = 4 * shape.sequence_length * config.rotary_size
    return [
        *([ActivationPart(name="rotary positions", num_bytes=rotary, formula="4 N R")] if rotary else []),
        ActivationPart(name="token ids and targets", num_bytes=16 * tokens, formula="16 T"),
        ActivationPart(name="final norm", num_bytes=tokens * (4 * hidden + 8), formula="T (4 D + 8)"),
        ActivationPart(
            name="gradients of the head",
            num_bytes=4 * config.vocab_size * hidden + tokens * c * hidden,
            formula="4 V D + c T D",
        ),
    ]


def logits_and_loss(
    config: ResNetBKConfig, shape: TrainingShape, *, half: bool, half_weights: bool = False
) -> ActivationPart:
    """What a chunk of the loss needs for a moment, beside what it keeps.

    fp32: logits and log-probabilities, 4 C V each. Autocast: logits in both types and log-probabilities, 10 C V; a half
    copy of the head; and a product that is yet to be added to the head's gradient. (The kernel on a GPU works in the
    logits' place; its chunks are larger, and take as much.) With but one chunk, the head's gradient is not there yet
    when the log-probabilities are.
    """
    head = config.vocab_size * config.hidden_size
    size = bytes_per_logit("torch", torch.bfloat16 if half else torch.float32)
    rows = chunk_rows(shape.tokens, config.vocab_size, config.hidden_size, bytes_per_logit=size)
    chunk = min(rows, shape.tokens)
    logits = chunk * config.vocab_size
    if rows < shape.tokens:
        worst = size * logits + (4 * head if half else 0)
    else:
        worst = max(size * logits - 4 * head, 2 * logits + 2 * head if half else 4 * logits)
    return ActivationPart(
        name="logits and loss",
        num_bytes=worst + (2 * head if half and not half_weights else 0),
        formula=f"at most {size} C V"
        + ((" + 4 V D" if half_weights else " + 6 V D") if half else "")
        + f", C = {chunk:,}",
    )


def working_set(config: ResNetBKConfig, shape: TrainingShape, *, half_weights: bool = False) -> ActivationPart:
    """What one block's backward needs for a moment: gradients of its tokens, and of its experts piece by piece."""
    tokens, hidden, width = shape.tokens, config.hidden_size, config.intermediate_size
    expert_size = 2 if half_weights else 4
    return ActivationPart(
        name="working set of a block's backward",
        num_bytes=tokens * 8 * hidden + expert_size * config.num_experts * hidden * width,
        formula=f"8 T D + {expert_size} E D I",
    )
