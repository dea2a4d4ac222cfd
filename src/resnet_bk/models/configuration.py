"""The model's configuration."""

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import fields
from typing import Any, ClassVar, Literal, Self, get_args

from transformers import PreTrainedConfig

from resnet_bk.models.matching import match_total_parameters, total_parameters
from resnet_bk.models.presets import PRESETS

Mixer = Literal["resolvent", "bk", "attention", "local"]
LocalPositions = Literal["fading", "rotary"]
StateKind = Literal["matrix", "vector"]
Regime = Literal["tunnelling", "scattering"]
GradientRule = Literal["exact", "blend"]
CHOICES = {
    "mixer": Mixer,
    "local_attention_positions": LocalPositions,
    "resolvent_state": StateKind,
    "resolvent_regime": Regime,
    "bk_grad": GradientRule,
}
LONGEST_CONVOLUTION = 64  # tokens; it is meant to be short
LONGEST_WINDOW = 32_768  # tokens; up to twice as many, places are exact in half types
LONGEST_MEMORY = 1e6  # tokens; a gap of 1e-12, far below which float32's smallest numbers come near
MOST_PARAMETERS = 2**60  # their bytes still fit in 64 bits
LARGEST_FLOAT = 1e30  # float32 holds it, with room to compute


class ResNetBKConfig(PreTrainedConfig):
    """What a ResNet-BK language model is made of; a Hugging Face configuration.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of a token's vector.
        num_layers: number of blocks.
        num_experts: experts per block, one of which each token uses.
        intermediate_size: width inside an expert.
        mixer: how tokens mix: ``"resolvent"`` (keys and values carried by the resolvent), ``"bk"`` (the seed's: its
            diagonal as features), ``"attention"`` (the Transformer baseline) or ``"local"`` (attention to the last
            tokens).
        local_attention_every: with the resolvent mixer, every so many-th block has local attention instead; 0 for none.
        local_attention_window: tokens that a token sees there, itself included; up to 32,768.
        local_attention_positions: ``"fading"`` (each head's logits lose something learned for each token between) or
            ``"rotary"`` (keys and queries turn with their position, and fail at distances beyond those of training; a
            window as long as training's texts has none).
        conv_size: tokens that a short causal convolution sees before the mixer does, any mixer; 0 for none.
        num_resolvent_heads: heads of the resolvent mixer, each with its chain; must divide hidden_size.
        resolvent_key_size: width of its keys and queries; None for that of its values, hidden_size by heads.
        resolvent_state: ``"matrix"``, or ``"vector"`` for values that are carried without keys and queries.
        resolvent_regime: ``"tunnelling"`` (real decays, energy below the band) or ``"scattering"`` (complex ones).
        resolvent_longest_memory: tokens that the last head remembers at the start; the first remembers two.
        num_bk_heads: independent chains of the bk mixer.
        num_attention_heads: heads of attention, local or not; must divide hidden_size, where positions are rotary into
            even parts.
        causal: False lets tokens read the future: for encoders and for reproducing the seed, not for a language
            model.
        max_position_embeddings: length of a learned position table; None for no table and no limit.
        tie_word_embeddings: the head reuses the embedding.
        dropout: share of numbers set to 0 in training: of the embeddings, of what each mixer and each mixture of
            experts adds to the residual stream, of attention's weights, and in the resolvent of what tokens write into
            each head, of the queries' coordinates and of what is read. Pieces of a batch draw their own.
        token_dropout: share of tokens that are lost as a whole in training: one learned embedding stands for all of
            them (S. Bowman et al., "Generating sentences from a continuous space", 2016). Where a short text is read
            many times over.
        router_temperature: of the Gumbel-softmax in training.
        router_aux_loss_coef: weight of the load-balancing loss in training; 0 turns it off.
        router_bias_update_rate: how far each expert's bias in the choice moves towards an even load after each
            training step, beside the loss or instead of it; 0 for no bias at all. About 0.001 for long trainings.
        bk_h0: constant part of the Hamiltonian's diagonal.
        bk_hopping: product of the Hamiltonian's off-diagonals, >= 0.
        bk_energy: initial energy E of a single head (more heads are spread over the band).
        bk_eta: initial eta > 0, the resolvent's distance from the real axis.
        bk_grad: ``"exact"``, or ``"blend"`` for the seed's analytic rule.
        bk_blend: share of 1/G^2 in that rule, from 0 to 1.
        rope_theta: base of all rotary positions.
        layer_norm_eps: of every LayerNorm.
        initializer_range: standard deviation of the embeddings at the start.
        use_cache: return the recurrent state for decoding.
    """

    model_type: ClassVar[str] = "resnet_bk"
    attribute_map: ClassVar[dict[str, str]] = {"num_hidden_layers": "num_layers"}
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "hidden_states",
        "cross_entropy",
        "router_aux_loss",
        "expert_load",
    ]

    vocab_size: int = 30_000
    hidden_size: int = 64
    num_layers: int = 4
    num_experts: int = 4
    intermediate_size: int = 128
    mixer: Mixer = "resolvent"
    local_attention_every: int = 4
    local_attention_window: int = 1024
    local_attention_positions: LocalPositions = "fading"
    conv_size: int = 4
    num_resolvent_heads: int = 4
    resolvent_key_size: int | None = None
    resolvent_state: StateKind = "matrix"
    resolvent_regime: Regime = "tunnelling"
    resolvent_longest_memory: float = 2048.0
    num_bk_heads: int = 1
    num_attention_heads: int = 4
    causal: bool = True
    max_position_embeddings: int | None = None
    tie_word_embeddings: bool = False
    dropout: float = 0.0
    token_dropout: float = 0.0
    router_temperature: float = 1.0
    router_aux_loss_coef: float = 0.01
    router_bias_update_rate: float = 0.0
    bk_h0: float = -2.0
    bk_hopping: float = 1.0
    bk_energy: float = 0.0
    bk_eta: float = 1.0
    bk_grad: GradientRule = "exact"
    bk_blend: float = 0.5
    rope_theta: float = 10_000.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        for name, kind in CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(get_args(kind))}")
        positive = ("vocab_size", "hidden_size", "num_layers", "num_experts", "intermediate_size")
        heads = ("num_resolvent_heads", "num_bk_heads", "num_attention_heads")
        for name in (*positive, *heads, "local_attention_window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number of at least 1")
        if self.max_position_embeddings is not None and self.max_position_embeddings < 1:
            raise ValueError(
                f"max_position_embeddings is {self.max_position_embeddings}; give at least 1, or None for no table"
            )
        if self.mixer == "attention" and self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} does not split into {self.num_attention_heads} heads of even width; "
                "change num_attention_heads"
            )
        self._check_local_attention()
        self._check_resolvent()
        for name in ("bk_eta", "router_temperature", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above 0")
        not_negative = ("bk_hopping", "router_aux_loss_coef", "router_bias_update_rate")
        for name in (*not_negative, "layer_norm_eps", "initializer_range"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 or more")
        self._check_shares()
        self._check_largest()

    def _check_shares(self) -> None:
        for name in ("dropout", "token_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share, give a number from 0 to below 1")
        if not 0 <= self.bk_blend <= 1:
            raise ValueError(f"bk_blend is {self.bk_blend}; it is a share, give a number from 0 to 1")

    def _check_local_attention(self) -> None:
        if self.local_attention_every < 0:
            raise ValueError(f"local_attention_every is {self.local_attention_every}; give 0 for none, or more")
        if "local" not in self.mixer_numbers():
            return
        if not self.causal:
            raise ValueError("local attention is causal; with causal=False choose mixer bk or attention")
        if self.local_attention_window > LONGEST_WINDOW:
            raise ValueError(
                f"local_attention_window is {self.local_attention_window}; give at most {LONGEST_WINDOW} tokens"
            )
        is_rotary = self.local_attention_positions == "rotary"
        if self.hidden_size % ((2 if is_rotary else 1) * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} does not split into {self.num_attention_heads} heads"
                f"{' of even width' if is_rotary else ''}; change num_attention_heads, or local_attention_every to 0"
            )

    def _check_resolvent(self) -> None:
        if not (self.conv_size == 0 or 2 <= self.conv_size <= LONGEST_CONVOLUTION):
            raise ValueError(
                f"conv_size is {self.conv_size}; give 2 to {LONGEST_CONVOLUTION} tokens, or 0 for no convolution"
            )
        if self.mixer != "resolvent":
            return
        if not self.causal:
            raise ValueError("the resolvent mixer is causal; with causal=False choose mixer bk or attention")
        if self.hidden_size % self.num_resolvent_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not split into {self.num_resolvent_heads} heads; "
                "change num_resolvent_heads"
            )
        if self.resolvent_key_size is not None and self.resolvent_key_size < 1:
            raise ValueError(
                f"resolvent_key_size is {self.resolvent_key_size}; give at least 1, or None for the values' width"
            )
        if self.resolvent_regime == "scattering":
            if self.resolvent_state == "vector":
                raise ValueError(
                    "a vector state has no phase; with the scattering regime choose resolvent_state matrix"
                )
            if self.key_size % 2:
                raise ValueError(
                    f"keys of the scattering regime are complex: their width {self.key_size} must be even; "
                    "change resolvent_key_size"
                )
        if not 2 < self.resolvent_longest_memory <= LONGEST_MEMORY:
            raise ValueError(
                f"resolvent_longest_memory is {self.resolvent_longest_memory}; give a number of tokens above 2 and up "
                f"to {LONGEST_MEMORY:g}"
            )

    @property
    def layer_mixers(self) -> tuple[Mixer, ...]:
        """The mixer of each block."""
        return tuple(self.mixer_of(index) for index in range(self.num_layers))

    def mixer_of(self, index: int) -> Mixer:
        """The mixer of a block. Local attention comes in the middle of each ``local_attention_every`` blocks."""
        every = self.local_attention_every if self.mixer == "resolvent" else 0
        return "local" if every and index % every == every // 2 else self.mixer

    def mixer_numbers(self, num_layers: int | None = None) -> dict[Mixer, int]:
        """How many of the first ``num_layers`` blocks (None for all) have which mixer, without going through them."""
        layers = self.num_layers if num_layers is None else num_layers
        every = self.local_attention_every if self.mixer == "resolvent" else 0
        local = (layers + every - 1 - every // 2) // every if every else 0
        numbers: dict[Mixer, int] = {self.mixer: layers - local, "local": local}
        if self.mixer == "local":
            numbers = {"local": layers}
        return {mixer: number for mixer, number in numbers.items() if number}

    def ends_of(self, mixer: Mixer) -> tuple[int, int]:
        """The first and the last block that have this mixer, one of :meth:`mixer_numbers`."""
        indices = range(self.num_layers)
        first = next(index for index in indices if self.mixer_of(index) == mixer)
        return first, next(index for index in reversed(indices) if self.mixer_of(index) == mixer)

    def of_mixer(self, mixer: Mixer) -> Self:
        """The same with this mixer in every block."""
        if self.mixer == mixer and set(self.mixer_numbers()) == {mixer}:
            return self
        other = copy(self)
        other.mixer, other.local_attention_every = mixer, 0
        return other

    def alike(self, num_layers: int | None = None) -> list[tuple[Self, int]]:
        """:meth:`mixer_numbers` with a model of each mixer alone."""
        return [(self.of_mixer(mixer), number) for mixer, number in self.mixer_numbers(num_layers).items()]

    @property
    def key_size(self) -> int:
        """Width of the resolvent mixer's keys; 0 with a vector state."""
        if self.resolvent_state == "vector":
            return 0
        return self.resolvent_key_size or self.hidden_size // self.num_resolvent_heads

    @property
    def rotary_size(self) -> int:
        """Coordinates of a key that turn with its position; 0 for a mixer whose keys do not."""
        if self.mixer == "attention":
            return self.hidden_size // self.num_attention_heads
        return self.key_size if self.mixer == "resolvent" and self.key_size % 2 == 0 else 0

    @property
    def local_rotary_size(self) -> int:
        """The same of a key of local attention; 0 where there is none, or where it fades."""
        if self.local_attention_positions == "fading" or "local" not in self.mixer_numbers():
            return 0
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_numbers(self) -> int:
        """Of a position, cosines and sines of all mixers."""
        return self.rotary_size + self.local_rotary_size

    def _check_largest(self) -> None:
        for name in field_names():
            value = getattr(self, name)
            if isinstance(value, float) and not (math.isfinite(value) and abs(value) <= LARGEST_FLOAT):
                raise ValueError(f"{name} is {value}; give a finite number of at most {LARGEST_FLOAT:g}")
        if total_parameters(self) > MOST_PARAMETERS:
            raise ValueError(f"this model would have more than {MOST_PARAMETERS:.0e} parameters; make it smaller")

    def own_fields(self) -> dict[str, Any]:
        """The fields that this class adds to ``PreTrainedConfig``: what ``derive`` takes, JSON-able."""
        return {name: getattr(self, name) for name in field_names()}

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A named size, with some fields changed.

        If ``mixer`` is changed and ``intermediate_size`` is not given, the experts' width is chosen so that the total
        number of parameters stays that of the preset's own mixer with the same overrides: models to compare.

        Raises:
            ValueError: the preset is unknown, or a field is.
        """
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
        return cls.derive(PRESETS[name], **overrides)

    @classmethod
    def derive(cls, base: Mapping[str, Any], **overrides: Any) -> Self:
        """The fields of ``base`` with some changed; a change of mixer as in ``from_preset``."""
        if unknown := set(overrides) - {field.name for field in fields(cls)}:
            raise ValueError(f"there is no configuration field {', '.join(sorted(unknown))}; see ResNetBKConfig")
        config = cls(**{**base, **overrides})
        own_mixer = base.get("mixer", cls.mixer)
        if config.mixer != own_mixer and "intermediate_size" not in overrides:
            # Causal or not, a mixer has the same parameters; the resolvent's is nothing but causal.
            original = cls(**{**base, **overrides, "mixer": own_mixer, "causal": True})
            config.intermediate_size = match_total_parameters(config, total_parameters(original))
        return config


def field_names() -> tuple[str, ...]:
    """Names of the fields that ``ResNetBKConfig`` adds to ``PreTrainedConfig``, in their order."""
    inherited = {"model_type", "attribute_map", "keys_to_ignore_at_inference"}
    return tuple(name for name in ResNetBKConfig.__annotations__ if name not in inherited)
