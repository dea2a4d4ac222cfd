"""The Hugging Face model: embedding, blocks, final norm, head."""

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from resnet_bk.frugal.precision import HALF_TYPES
from resnet_bk.layers import (
    BKBlock,
    BKMixer,
    CausalAttention,
    LocalAttention,
    MixerBlock,
    MixtureOfExperts,
    ResolventMixer,
    SequenceContext,
    ShortConvolution,
)
from resnet_bk.layers.mixture import Routing
from resnet_bk.layers.rotary import rotary_angles
from resnet_bk.models import inputs
from resnet_bk.models.cache import AttentionLayer, RecurrentLayer, ResNetBKCache
from resnet_bk.models.configuration import Mixer, ResNetBKConfig
from resnet_bk.ops.embedding import embedding_in_single
from resnet_bk.ops.loss import cross_entropy, linear_cross_entropy, shift_targets
from resnet_bk.ops.one_token import linear


@dataclass
class ResNetBKModelOutput(ModelOutput):
    """Output of the model without its head.

    ``last_hidden_state`` is (B, N, D) after the final norm. ``router_aux_loss`` is the mean balancing loss of the
    layers, a scalar; ``expert_load`` is (layers, experts), the share of tokens that each expert got.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: ResNetBKCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    router_aux_loss: Tensor | None = None
    expert_load: Tensor | None = None


@dataclass
class ResNetBKCausalLMOutput(ModelOutput):
    """Output of the language model.

    ``cross_entropy`` is the mean over the targets in nats. ``loss`` is the same in evaluation mode; in training mode
    it adds ``router_aux_loss_coef`` times ``router_aux_loss``. ``logits`` is (B, N, V), or None where ``return_logits``
    has it so: in training the loss is computed without ever having them all.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: ResNetBKCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    cross_entropy: Tensor | None = None
    router_aux_loss: Tensor | None = None
    expert_load: Tensor | None = None


class ResNetBKPreTrainedModel(PreTrainedModel):
    """What both models share: how weights start, and what ``transformers`` may do with them."""

    config_class = ResNetBKConfig
    config: ResNetBKConfig
    base_model_prefix = "model"
    _no_split_modules = ("BKBlock", "MixerBlock")
    # Parameters, by parts of their names, that training never stores in a half type: what decides (the router), recurs
    # (the chains), or scales (norms, filters).
    float32_parameters = (
        "router",
        "potential",
        "log_rate",
        "energy",
        "raw_eta",
        "log_amplitude",
        "skip",
        "convolution",
        "norm",
    )
    # What from_pretrained(dtype=...) leaves in float32: of these, what is computed in it whatever the tokens' type.
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = set(float32_parameters) - {"skip", "convolution", "norm"}
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Embeddings and the head at initializer_range; every other matrix at 1/sqrt(fan in), and those that write
        # to the residual stream smaller by the root of their number, so that its variance is of order 1 at any depth.
        residual = 1 / math.sqrt(2 * self.config.num_layers)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, MixtureOfExperts):
            init.normal_(module.up, std=self.config.hidden_size**-0.5)
            init.normal_(module.down, std=self.config.intermediate_size**-0.5 * residual)
            if module.router_bias is not None:
                init.zeros_(module.router_bias)
        elif isinstance(module, BKMixer):
            init.copy_(module.energy, module.initial_energies())
            init.copy_(module.raw_eta, module.initial_raw_eta())
            init.normal_(module.output.weight, std=module.output.in_features**-0.5 * residual)
        elif isinstance(module, ResolventMixer):
            for name, value in module.initial_chains().items():
                init.copy_(getattr(module, name), value)
            init.ones_(module.skip)
            init.normal_(module.output.weight, std=module.output.in_features**-0.5 * residual)
        elif isinstance(module, CausalAttention | LocalAttention):
            if isinstance(module, LocalAttention) and module.positions == "fading":
                init.copy_(module.log_rate, module.initial_log_rate())
            init.normal_(module.output.weight, std=module.output.in_features**-0.5 * residual)
        elif isinstance(module, ShortConvolution):
            init.copy_(module.weight, module.initial_weight())
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)


class ResNetBKModel(ResNetBKPreTrainedModel):
    """Embedding, blocks and final norm: token ids in, hidden states out."""

    def __init__(self, config: ResNetBKConfig) -> None:
        super().__init__(config)
        if not config.causal:
            warnings.warn(
                "causal=False: every token reads the tokens to its right, so a next-token loss of this model is a "
                "leak of its own targets and not skill",
                stacklevel=2,
            )
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size) if config.max_position_embeddings else None
        )
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(_block(config, mixer) for mixer in config.layer_mixers)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # In place of what is lost: zeros at a text's start stay zeros, where norms have an unbounded gradient. It is
        # drawn once and last, so that the same seed starts all else as without it.
        self.lost_token = (
            nn.Embedding(1, config.hidden_size, _weight=torch.empty(1, config.hidden_size))
            if config.token_dropout
            else None
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ResNetBKCache | None = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        batch_rows: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> ResNetBKModelOutput:
        """Hidden states of ``input_ids`` ``(B, N)``.

        ``attention_mask`` ``(B, past + N)`` is 0 for padding, on either side, and covers the cached tokens too.
        ``document_ids`` ``(B, N)`` tells packed documents apart, each a run of equal numbers: nothing passes between
        them, and positions begin again. ``batch_rows`` says that these rows are a piece of a batch, from this row on
        and of so many: in training each token then meets the routing noise that it meets in the whole batch, drawn
        after the same seed.

        Raises:
            ValueError: the inputs do not fit the model; the message names the mend.
        """
        inputs.require_known_arguments(kwargs)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        cache = self._cache(past_key_values, use_cache)
        x_BND, context = self.begin(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_length=0 if cache is None else cache.get_seq_length(),
            inputs_embeds=inputs_embeds,
            document_ids=document_ids,
            batch_rows=batch_rows,
            remember=cache is not None,
        )
        all_hidden_states = [x_BND] if output_hidden_states else []
        routings: list[Routing] = []
        for index, block in enumerate(self.layers):
            layer = None if cache is None else cache.layers[index]
            x_BND, routing = run_block(block, x_BND, context, layer)
            routings.append(routing)
            if output_hidden_states:
                all_hidden_states.append(x_BND)
        return ResNetBKModelOutput(
            last_hidden_state=self.norm(x_BND),
            past_key_values=cache,
            hidden_states=tuple(all_hidden_states) or None,
            router_aux_loss=mean_balancing_loss([routing.balancing_loss for routing in routings]),
            expert_load=torch.stack([routing.expert_load_E for routing in routings]),
        )

    def begin(
        self,
        input_ids: Tensor | None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_length: int = 0,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        batch_rows: tuple[int, int] | None = None,
        remember: bool = False,
    ) -> tuple[Tensor, SequenceContext]:
        """What the first block takes, and what all blocks are told about the tokens; arguments as in ``forward``."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        if inputs_embeds is None:
            assert input_ids is not None
            inputs.require_tokens("input_ids", input_ids, 2)
            x_BND = self._embed(input_ids)
        else:
            inputs.require_tokens("inputs_embeds", inputs_embeds, 3)
            x_BND = inputs_embeds
        if self.training and self.lost_token is not None:
            is_lost_BN1 = torch.rand_like(x_BND[..., :1], dtype=torch.float32) < self.config.token_dropout
            x_BND = torch.where(is_lost_BN1, self.lost_token.weight.to(x_BND.dtype), x_BND)
        rows, length = x_BND.shape[:2]
        key_mask_BK = inputs.mask_with_padding(attention_mask, rows, past_length + length)
        if document_ids is not None:
            document_ids = inputs.numbered_documents(document_ids, x_BND, past_length)
        are_given = position_ids is not None
        if position_ids is not None:
            inputs.require_positions(position_ids, rows, length)
        else:
            position_ids = inputs.positions(key_mask_BK, document_ids, past_length, x_BND)
        if self.embed_positions is not None:
            inputs.require_places(
                position_ids,
                past_length + length,
                self.config.max_position_embeddings,
                are_given=are_given,
                begin_again=key_mask_BK is not None or document_ids is not None,
            )
            x_BND = x_BND + self.embed_positions(position_ids)
        padding = inputs.padding(key_mask_BK, length)
        return self.dropout(x_BND), SequenceContext(
            rotary=self._rotary(position_ids, x_BND.dtype, self.config.rotary_size),
            local_rotary=self._rotary(position_ids, x_BND.dtype, self.config.local_rotary_size),
            padding=padding,
            key_mask_BK=key_mask_BK,
            document_ids_BN=document_ids,
            front_starts_BN=None if document_ids is None else inputs.front_starts(document_ids, padding),
            batch_rows=batch_rows,
            remember=remember,
        )

    def _cache(self, past_key_values: ResNetBKCache | None, use_cache: bool | None) -> ResNetBKCache | None:
        wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
        if not self.config.causal:
            if past_key_values is not None or use_cache:
                raise ValueError("a bidirectional model (causal=False) has no decoding state; pass use_cache=False")
            return None
        if past_key_values is None:
            return ResNetBKCache(self.config) if wanted else None
        inputs.require_own_cache(past_key_values, self.config.num_layers)
        return past_key_values

    def _embed(self, input_ids: Tensor | None) -> Tensor:
        weight = getattr(self.embed_tokens, "weight", None)
        if (
            type(self.embed_tokens) is nn.Embedding
            and isinstance(weight, Tensor)
            and weight.dtype in HALF_TYPES
            and torch.is_autocast_enabled(weight.device.type)
            and input_ids is not None
        ):
            # Autocast keeps the residual stream in float32: also where the table is stored in a half type.
            return embedding_in_single(input_ids, weight)
        vectors: Tensor = self.embed_tokens(input_ids)
        return vectors

    def _rotary(self, position_ids_BN: Tensor, dtype: torch.dtype, size: int) -> tuple[Tensor, Tensor] | None:
        if not size:
            return None
        return rotary_angles(position_ids_BN, size, self.config.rope_theta, torch.promote_types(dtype, torch.float32))


class ResNetBKForCausalLM(ResNetBKPreTrainedModel, GenerationMixin):
    """The language model. With ``mixer="attention"`` it is the Transformer baseline."""

    @property
    def _is_stateful(self) -> bool:
        """Whether nothing that was read can be forgotten: then transformers refuses what would (assisted decoding)."""
        return self.config.mixer != "attention" or bool(self.config.conv_size)

    # The loss is a mean over the batch at hand: transformers' Trainer divides by its accumulation steps itself.
    accepts_loss_kwargs = False
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  # transformers' own form

    def __init__(self, config: ResNetBKConfig) -> None:
        super().__init__(config)
        self.model = ResNetBKModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Of a way to train, not of the model: see ``linear_cross_entropy``.
        self.loss_chunk_tokens: int | None = None
        self.post_init()
        if not config.causal:
            self.generation_config.use_cache = False

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.lm_head and not self.config.tie_word_embeddings:
            init.normal_(module.weight, std=self.config.initializer_range)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Refused: checkpointing is asked for of blocks."""
        raise ValueError(
            "blocks are checkpointed by resnet_bk.frugal.checkpoint_blocks(list(model.model.layers), 'full'), or "
            "'selective'; leave gradient_checkpointing out"
        )

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ResNetBKCache | None = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool | None = None,
        batch_rows: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> ResNetBKCausalLMOutput:
        """Logits, and a loss if targets are given.

        Args:
            input_ids: ``(B, N)``.
            attention_mask: ``(B, past + N)``, 0 for padding on either side.
            document_ids: ``(B, N)``, a run of equal numbers for each of the documents packed into a row. Targets are
                yours: the last token of a document should have none (-100), or the next document's first. What comes
                behind them goes on from each row's last document, if ``position_ids`` count on in it.
            labels: ``(B, N)``, the token at each position; the loss compares position i with label i + 1.
            shift_labels: ``(B, N)``, the target of each position, already shifted. ``-100`` is ignored in both. It is
                among ``kwargs``, as transformers has it: its Trainer asks for all that the signature calls labels.
            logits_to_keep: 0 for all positions, 1 for each row's last real token, k for the last k positions; or a
                tensor of positions.
            return_logits: None for logits except in training mode with targets, where they are by far the largest
                tensor; True for logits then too; False for a loss without logits, a chunk of tokens at a time. A head
                that is more than a matrix (an adapter, say, or one that is sharded by itself) always makes them all.
            batch_rows: as in ``ResNetBKModel``.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        inputs.require_known_arguments(kwargs)
        if labels is not None and shift_labels is not None:
            raise ValueError("give labels or shift_labels, not both")
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            document_ids=document_ids,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            batch_rows=batch_rows,
        )
        targets_BN = shift_targets(labels) if labels is not None else shift_labels
        if targets_BN is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("a loss needs every position; leave logits_to_keep at 0")
        if targets_BN is None and return_logits is False:
            raise ValueError("without targets there is nothing but logits to return; leave return_logits out")
        hidden_BND = inputs.positions_to_keep(output.last_hidden_state, attention_mask, logits_to_keep)
        if return_logits is None:
            return_logits = targets_BN is None or not self.training
        logits_BNV = self._logits(hidden_BND) if return_logits or not _is_matrix(self.lm_head) else None
        nats = loss = None
        if targets_BN is not None:
            nats, loss = self.loss_of(hidden_BND, targets_BN, output.router_aux_loss, logits_BNV=logits_BNV)
        return ResNetBKCausalLMOutput(
            loss=loss,
            logits=logits_BNV if return_logits else None,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            cross_entropy=None if nats is None else nats.detach(),
            router_aux_loss=output.router_aux_loss,
            expert_load=output.expert_load,
        )

    def _logits(self, hidden_BND: Tensor) -> Tensor:
        """By the head; of a token to decode, by reading its matrix once."""
        if hidden_BND.shape[:2] == (1, 1) and _is_matrix(self.lm_head):
            return linear(hidden_BND, self.lm_head.weight)
        logits_BNV: Tensor = self.lm_head(hidden_BND)
        return logits_BNV

    def loss_of(
        self, hidden_BND: Tensor, targets_BN: Tensor, router_aux_loss: Tensor, *, logits_BNV: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats a token and, in training mode, the loss: with the balancing loss's share.

        ``hidden_BND`` is behind the final norm, and targets are shifted. Without ``logits_BNV`` the head must be a
        matrix, and there are never all logits at once.
        """
        nats = (
            linear_cross_entropy(hidden_BND, self.lm_head.weight, targets_BN, chunk_tokens=self.loss_chunk_tokens)
            if logits_BNV is None
            else cross_entropy(logits_BNV, targets_BN)
        )
        return nats, nats + self.config.router_aux_loss_coef * router_aux_loss if self.training else nats

    def balance_experts(self, expert_load: Tensor) -> None:
        """Moves the experts' biases after an optimizer step by its ``expert_load`` (layers x experts).

        Nothing happens without a ``router_bias_update_rate``. ``train_step`` calls it; so must any other loop.
        """
        mixtures = [module for module in self.modules() if isinstance(module, MixtureOfExperts)]
        for moe, expert_load_E in zip(mixtures, expert_load, strict=True):
            moe.balance(expert_load_E)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As ``transformers`` does it, but positions follow the mask, which is right for padding on either side."""
        if kwargs.get("document_ids") is not None:
            raise ValueError("generate goes on from one text a row; give rows without document_ids")
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if prepared.get("attention_mask") is not None:
            prepared["position_ids"] = None
        return prepared

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is of models with keys and values; "
                "this one has a cache of its own: leave it out"
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = ResNetBKCache(self.config)


def _block(config: ResNetBKConfig, mixer: Mixer) -> nn.Module:
    moe = MixtureOfExperts(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_experts=config.num_experts,
        router_temperature=config.router_temperature,
        router_bias_update_rate=config.router_bias_update_rate,
    )
    if mixer == "bk":
        return BKBlock(
            hidden_size=config.hidden_size,
            layer_norm_eps=config.layer_norm_eps,
            mixer=_bk_mixer(config),
            moe=moe,
            dropout=config.dropout,
        )
    return MixerBlock(
        hidden_size=config.hidden_size,
        layer_norm_eps=config.layer_norm_eps,
        mixer={"attention": _attention, "local": _local_attention, "resolvent": _resolvent_mixer}[mixer](config),
        moe=moe,
        dropout=config.dropout,
    )


def _bk_mixer(config: ResNetBKConfig) -> BKMixer:
    return BKMixer(
        hidden_size=config.hidden_size,
        num_heads=config.num_bk_heads,
        h0=config.bk_h0,
        hopping=config.bk_hopping,
        energy=config.bk_energy,
        eta=config.bk_eta,
        causal=config.causal,
        grad=config.bk_grad,
        blend=config.bk_blend,
        conv_size=config.conv_size,
    )


def _attention(config: ResNetBKConfig) -> CausalAttention:
    return CausalAttention(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        causal=config.causal,
        conv_size=config.conv_size,
        dropout=config.dropout,
    )


def _local_attention(config: ResNetBKConfig) -> LocalAttention:
    return LocalAttention(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        window=config.local_attention_window,
        positions=config.local_attention_positions,
        conv_size=config.conv_size,
        dropout=config.dropout,
    )


def _resolvent_mixer(config: ResNetBKConfig) -> ResolventMixer:
    return ResolventMixer(
        hidden_size=config.hidden_size,
        num_heads=config.num_resolvent_heads,
        key_size=config.key_size,
        state=config.resolvent_state,
        regime=config.resolvent_regime,
        longest_memory=config.resolvent_longest_memory,
        conv_size=config.conv_size,
        norm_eps=config.layer_norm_eps,
        dropout=config.dropout,
    )


def _is_matrix(head: Any) -> bool:
    """Whether calling ``head`` is multiplying with its weight and nothing else, hooks included."""
    return (
        type(head) is nn.Linear
        and getattr(head, "bias", None) is None
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or "forward" in vars(head))
    )


def mean_balancing_loss(balancing_losses: list[Tensor]) -> Tensor:
    """Of all layers, a scalar."""
    return torch.stack(balancing_losses).mean()


def run_block(
    block: nn.Module, x_BND: Tensor, context: SequenceContext, layer: RecurrentLayer | AttentionLayer | None = None
) -> tuple[Tensor, Routing]:
    """One block, reading and replacing what its cache layer remembers."""
    x_BND, state, routing = block(x_BND, context, None if layer is None else layer.state)
    if layer is not None:
        layer.advance(state, x_BND.shape[1])
    return x_BND, routing
