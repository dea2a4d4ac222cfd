"""What a model remembers while it decodes: one complex number per chain, or attention's keys and values."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from resnet_bk.models.configuration import ResNetBKConfig


class ResolventLayer(CacheLayerMixin):
    """The state of one bk layer: the last l of each chain, ``(B, H, 2)``, whatever the number of tokens.

    It lives in ``keys``, where ``transformers`` looks when it reorders, repeats or moves a cache.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = 0

    @property
    def state_BH2(self) -> Tensor | None:
        """The state, or None before the first token."""
        return self.keys

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first update brings the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a resolvent layer has a state, no keys and values; use advance")

    def advance(self, state_BH2: Tensor, num_tokens: int) -> None:
        """Replaces the state after ``num_tokens`` more tokens."""
        self.keys = self.values = state_BH2
        self.device, self.dtype = state_BH2.device, state_BH2.dtype
        self.is_initialized = True
        self.num_tokens += num_tokens

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all tokens."""
        return self.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forgets everything."""
        super().__init__()
        self.num_tokens = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i takes the state of row ``beam_idx[i]`` (beam search)."""
        self._replace_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times in a row."""
        if self.keys is not None:
            self.keys = self.values = self.keys.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows at ``indices``."""
        self._replace_rows(indices)

    def _replace_rows(self, indices: Tensor) -> None:
        if self.keys is not None:
            self.keys = self.values = self.keys.index_select(0, indices.to(self.keys.device))


class ResNetBKCache(Cache):
    """A cache with one layer per block. For the bk mixer its size does not depend on the number of tokens."""

    def __init__(self, config: ResNetBKConfig) -> None:
        layer_class = ResolventLayer if config.mixer == "bk" else DynamicLayer
        super().__init__(layers=[layer_class() for _ in range(config.num_layers)])

    @property
    def num_bytes(self) -> int:
        """Bytes that the cache holds."""
        tensors = {
            tensor.data_ptr(): tensor.nbytes
            for layer in self.layers
            for tensor in (layer.keys, layer.values)
            if isinstance(tensor, torch.Tensor)
        }
        return sum(tensors.values())
