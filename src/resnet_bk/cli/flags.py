"""Flags that several commands share, each optional so that a command knows which ones were given."""

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import tyro

from resnet_bk.training.config import Checkpointing, DataConfig, MomentsType, Precision, TrainingConfig


def shown(default: Any, metavar: str | None = None) -> Any:
    """An optional flag whose help shows the default that applies when it is left out."""
    return tyro.conf.arg(metavar=metavar or type(default).__name__.upper(), help_behavior_hint=f"(default: {default})")


def preset(metavar: str) -> Any:
    """An optional flag that changes a preset's field."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="(default: the preset's)")


def _length_or_none(words: list[str]) -> int:
    """None is a flag that was not given, so that "none" is 0 until :func:`given` reads it."""
    if words[0].lower() == "none":
        return 0
    try:
        return int(words[0])
    except ValueError:
        raise ValueError(f"{words[0]!r} is not a length; give a number, or none") from None


def _norm_or_none(words: list[str]) -> float:
    """As ``_length_or_none``, for a number with a fraction."""
    if words[0].lower() == "none":
        return 0.0
    try:
        return float(words[0])
    except ValueError:
        raise ValueError(f"{words[0]!r} is not a norm; give a number, or none") from None


# Fields where none is a value; none of them may be 0.
MAY_BE_NONE = ("max_position_embeddings", "resolvent_key_size", "max_grad_norm")
LENGTH_OR_NONE = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="INT|none",
    instance_from_str=_length_or_none,
    is_instance=lambda value: value is None or isinstance(value, int),
    str_from_instance=lambda value: [str(value)],
)
NORM_OR_NONE = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="FLOAT|none",
    instance_from_str=_norm_or_none,
    is_instance=lambda value: value is None or isinstance(value, float),
    str_from_instance=lambda value: [str(value)],
)


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Fields of the model that differ from the preset's."""

    vocab_size: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the tokenizer's)")] = (
        None
    )
    """Number of token ids."""
    hidden_size: Annotated[int | None, preset("INT")] = None
    """Width of a token's vector."""
    num_layers: Annotated[int | None, preset("INT")] = None
    """Number of blocks."""
    num_experts: Annotated[int | None, preset("INT")] = None
    """Experts per block; each token uses one."""
    intermediate_size: Annotated[int | None, preset("INT")] = None
    """Width inside an expert. With another --mixer it is chosen to keep the total number of parameters."""
    mixer: Annotated[
        Literal["resolvent", "bk", "attention", "local"] | None, preset("resolvent|bk|attention|local")
    ] = None
    """How tokens mix: keys and values carried by the resolvent, the resolvent's diagonal (the seed's mixer), the
    Transformer's attention, or attention to the last tokens only."""
    local_attention_every: Annotated[int | None, preset("INT")] = None
    """With the resolvent mixer every so many-th block has local attention instead; 0 for none."""
    local_attention_window: Annotated[int | None, preset("INT")] = None
    """Tokens that a token sees there."""
    local_attention_positions: Annotated[Literal["fading", "rotary"] | None, preset("fading|rotary")] = None
    """What it knows of them: logits that lose something for each token between, or keys that turn, which fails on
    longer texts than those of training unless the window is no longer than those."""
    conv_size: Annotated[int | None, preset("INT")] = None
    """Tokens of a short causal convolution before any mixer; 0 for none."""
    num_resolvent_heads: Annotated[int | None, preset("INT")] = None
    """Heads of the resolvent mixer, each with its chain."""
    resolvent_key_size: Annotated[int | None, preset("INT|none"), LENGTH_OR_NONE] = None
    """Width of its keys and queries; none (or 0) for that of its values."""
    resolvent_state: Annotated[Literal["matrix", "vector"] | None, preset("matrix|vector")] = None
    """Keys times values, or values alone, which are carried without keys and queries."""
    resolvent_regime: Annotated[Literal["tunnelling", "scattering"] | None, preset("tunnelling|scattering")] = None
    """Energies below the band, where decays are real, or inside it, where they are complex."""
    resolvent_longest_memory: Annotated[float | None, preset("FLOAT")] = None
    """Tokens that its last head remembers at the start; the first remembers two."""
    num_bk_heads: Annotated[int | None, preset("INT")] = None
    """Independent chains of the bk mixer."""
    num_attention_heads: Annotated[int | None, preset("INT")] = None
    """Heads of attention, local or not."""
    causal: Annotated[bool | None, preset("True|False")] = None
    """False lets tokens read the future: a loss of such a model is a leak."""
    max_position_embeddings: Annotated[int | None, preset("INT|none"), LENGTH_OR_NONE] = None
    """Length of a learned position table, which bounds the sequence; none (or 0) for no table and no bound."""
    tie_word_embeddings: Annotated[bool | None, preset("True|False")] = None
    """The head reuses the embedding."""
    dropout: Annotated[float | None, preset("FLOAT")] = None
    """Share of numbers set to 0 in training: of embeddings, of what mixers and experts add, of attention's weights
    and of what the resolvent writes, asks and reads."""
    token_dropout: Annotated[float | None, preset("FLOAT")] = None
    """Share of tokens that one learned embedding stands for in training; for short texts that are read many times."""
    router_temperature: Annotated[float | None, preset("FLOAT")] = None
    """Temperature of the Gumbel-softmax in training."""
    router_aux_loss_coef: Annotated[float | None, preset("FLOAT")] = None
    """Weight of the load-balancing loss in training; 0 turns it off."""
    router_bias_update_rate: Annotated[float | None, preset("FLOAT")] = None
    """Step of each expert's bias towards an even load; 0 for no bias."""
    bk_h0: Annotated[float | None, preset("FLOAT")] = None
    """Constant part of the Hamiltonian's diagonal."""
    bk_hopping: Annotated[float | None, preset("FLOAT")] = None
    """Product of the Hamiltonian's off-diagonals."""
    bk_energy: Annotated[float | None, preset("FLOAT")] = None
    """Initial energy of a single chain."""
    bk_eta: Annotated[float | None, preset("FLOAT")] = None
    """Initial distance of the energy from the real axis."""
    bk_grad: Annotated[Literal["exact", "blend"] | None, preset("exact|blend")] = None
    """Exact adjoint, or the analytic rule that keeps only a token's own gradient."""
    bk_blend: Annotated[float | None, preset("FLOAT")] = None
    """Share of 1/G^2 in the analytic rule."""
    rope_theta: Annotated[float | None, preset("FLOAT")] = None
    """Base of all rotary positions."""
    layer_norm_eps: Annotated[float | None, preset("FLOAT")] = None
    """Epsilon of every LayerNorm."""
    initializer_range: Annotated[float | None, preset("FLOAT")] = None
    """Standard deviation of the embeddings at the start."""
    use_cache: Annotated[bool | None, preset("True|False")] = None
    """Whether the saved model returns its decoding state by default."""
    pad_token_id: Annotated[int | None, preset("INT")] = None
    """Token id of padding, recorded for those who generate with the saved model; also the next two."""
    bos_token_id: Annotated[int | None, preset("INT")] = None
    """Token id that begins a text."""
    eos_token_id: Annotated[int | None, preset("INT")] = None
    """Token id that ends a text."""


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """Text and tokens."""

    data: Annotated[str | None, shown(DataConfig.data)] = None
    """stdlib (the source text of Python's standard library), a text file, a folder, a glob, or hf:ORG/NAME[:CONFIG]."""
    tokenizer: Annotated[str | None, shown(DataConfig.tokenizer)] = None
    """byte, char, word:N, bpe:N, the path of a tokenizer.json, or a Hub name."""
    validation_fraction: Annotated[float | None, shown(DataConfig.validation_fraction)] = None
    """Share of the text that is held out."""


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """How to train."""

    steps: Annotated[int | None, shown(TrainingConfig.steps)] = None
    """Optimizer steps."""
    batch_size: Annotated[int | None, shown(TrainingConfig.batch_size)] = None
    """Sequences in a batch."""
    sequence_length: Annotated[int | None, shown(TrainingConfig.sequence_length)] = None
    """Tokens in a sequence (N)."""
    gradient_accumulation_steps: Annotated[int | None, shown(TrainingConfig.gradient_accumulation_steps)] = None
    """Batches in a step."""
    learning_rate: Annotated[float | None, shown(TrainingConfig.learning_rate)] = None
    """Highest learning rate."""
    min_learning_rate_ratio: Annotated[float | None, shown(TrainingConfig.min_learning_rate_ratio)] = None
    """Where the cosine ends, as a share of the highest rate."""
    warmup_steps: Annotated[int | None, shown(TrainingConfig.warmup_steps)] = None
    """Steps of linear warm-up."""
    decay_steps: Annotated[int | None, shown("the larger of --steps and 1000", "INT")] = None
    """Step at which the cosine ends."""
    weight_decay: Annotated[float | None, shown(TrainingConfig.weight_decay)] = None
    """AdamW's decay of matrices (embeddings, norms and energies do not decay)."""
    beta1: Annotated[float | None, shown(TrainingConfig.beta1)] = None
    """AdamW's first moment."""
    beta2: Annotated[float | None, shown(TrainingConfig.beta2)] = None
    """AdamW's second moment."""
    max_grad_norm: Annotated[float | None, shown(TrainingConfig.max_grad_norm, "FLOAT|none"), NORM_OR_NONE] = None
    """Gradients are clipped to this global norm; none (or 0) for no clipping."""
    precision: Annotated[Precision | None, shown(TrainingConfig.precision, "fp32|bf16|fp16")] = None
    """Mixed precision of the matrix products; fp16 scales the loss."""
    micro_batch_size: Annotated[int | None, shown("all of --batch-size", "INT")] = None
    """Sequences that go through the model at once; a step that runs out of memory goes on with half of them."""
    checkpointing: Annotated[
        Checkpointing | None, shown(TrainingConfig.checkpointing, "none|selective|full|offload")
    ] = None
    """What backward computes again instead of keeping it: nothing, what is cheap, whole blocks, or whole blocks whose
    inputs wait on the host."""
    offload_optimizer: Annotated[bool | None, shown(TrainingConfig.offload_optimizer, "True|False")] = None
    """AdamW's master weights, moments and update on the host. With --checkpointing offload a step goes block by block:
    however many micro-batches it has, weights and gradients cross once."""
    moments: Annotated[MomentsType | None, shown(TrainingConfig.moments, "fp32|bf16")] = None
    """Type of the offloaded moments; bf16 rounds at random, right on average."""
    half_weights: Annotated[bool | None, shown(TrainingConfig.half_weights, "True|False")] = None
    """Matrices on the device in --precision; their masters stay float32 on the host."""
    stream_weights: Annotated[bool | None, shown(TrainingConfig.stream_weights, "True|False")] = None
    """Blocks wait on the host: two of them are on the device, whatever the depth."""
    cuda_graphs: Annotated[bool | None, shown(TrainingConfig.cuda_graphs, "True|False")] = None
    """A step block by block asks a GPU for a block's work once and replays it for those like it; --gpu-memory decides
    itself whether there is room for that."""
    loss_chunk_tokens: Annotated[int | None, shown("the loss's own rule", "INT")] = None
    """Tokens that have logits at once; fewer take less memory, and change nothing but rounding."""
    seed: Annotated[int | None, shown(TrainingConfig.seed)] = None
    """Of the weights, the batches and the routing noise."""
    log_every: Annotated[int | None, shown(TrainingConfig.log_every)] = None
    """Steps between entries of metrics.jsonl."""
    eval_every: Annotated[int | None, shown(TrainingConfig.eval_every)] = None
    """Steps between evaluations on held-out text."""
    eval_tokens: Annotated[int | None, shown(TrainingConfig.eval_tokens)] = None
    """Held-out tokens of each evaluation but the last, which takes all."""
    save_every: Annotated[int | None, shown(TrainingConfig.save_every)] = None
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[int | None, shown(TrainingConfig.keep_checkpoints)] = None
    """Newest checkpoints to keep."""
    device: Annotated[str | None, shown(TrainingConfig.device)] = None
    """auto (the GPU where there is one), cpu, cuda, cuda:1, ..."""
    num_threads: Annotated[int | None, shown("torch's", "INT")] = None
    """CPU threads."""


def given(flags: Any) -> dict[str, Any]:
    """The flags that were given, by name and as the configurations have them."""
    found = {field.name: getattr(flags, field.name) for field in fields(flags)}
    found = {name: value for name, value in found.items() if value is not None}
    return found | {name: None for name in MAY_BE_NONE if found.get(name) == 0}
