"""What a model remembers while it decodes: a state of constant size, or attention's keys and values."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from resnet_bk.layers.context import MixerState
from resnet_bk.models.configuration import ResNetBKConfig


class RecurrentLayer(CacheLayerMixin):
    """The state of one layer of any mixer but attention: tensors, batch first, whatever the number of tokens."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: MixerState = {}
        self.num_tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first update brings the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a recurrent layer has a state, no keys and values; use advance")

    def advance(self, state: MixerState, num_tokens: int) -> None:
        """Replaces the state after ``num_tokens`` more tokens."""
        self.state = state
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

    def crop(self, max_length: int) -> None:
        """Refused: a state has no earlier ones."""
        raise ValueError("a recurrent state cannot forget tokens; keep a copy of the cache from before them")

    def reset(self) -> None:
        """Forgets everything."""
        self.state, self.num_tokens, self.is_initialized = {}, 0, False

    def offload(self) -> None:
        """Moves the state to host memory."""
        self.state = {name: x.to("cpu", non_blocking=True) for name, x in self.state.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i takes the state of row ``beam_idx[i]`` (beam search)."""
        self.state = _rows(self.state, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times in a row."""
        self.state = {name: x.repeat_interleave(repeats, dim=0) for name, x in self.state.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows at ``indices``."""
        self.state = _rows(self.state, indices)


class AttentionLayer(DynamicLayer):
    """Keys and values of one attention layer; the window of its convolution if it has one, and where the last of packed
    documents begins."""

    def __init__(self) -> None:
        super().__init__()
        self.window: MixerState = {}

    @property
    def state(self) -> MixerState:
        """What the mixer reads; nothing before the first token."""
        return {"keys": self.keys, "values": self.values, **self.window} if self.get_seq_length() else {}

    def advance(self, state: MixerState, num_tokens: int) -> None:
        """Replaces keys, values and window after ``num_tokens`` more tokens."""
        if not self.is_initialized:
            self.lazy_initialization(state["keys"], state["values"])
        self.keys, self.values = state["keys"], state["values"]
        self.window = {name: x for name, x in state.items() if name not in ("keys", "values")}

    def crop(self, max_length: int) -> None:
        """Forgets the last tokens; a convolution cannot, since its window has no earlier ones."""
        if "window" in self.window:
            raise ValueError("a model with a short convolution cannot forget tokens; use one with conv_size=0")
        if self.window:
            raise ValueError("behind packed documents nothing can be forgotten; read the last one by itself")
        super().crop(max_length)

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.window = {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i takes what row ``beam_idx[i]`` remembers (beam search)."""
        super().reorder_cache(beam_idx)
        self.window = _rows(self.window, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times in a row."""
        super().batch_repeat_interleave(repeats)
        self.window = {name: x.repeat_interleave(repeats, dim=0) for name, x in self.window.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows at ``indices``."""
        super().batch_select_indices(indices)
        self.window = _rows(self.window, indices)


class ResNetBKCache(Cache):
    """A cache with one layer per block. Its size does not depend on the number of tokens, but for attention."""

    def __init__(self, config: ResNetBKConfig) -> None:
        layer_class = AttentionLayer if config.mixer == "attention" else RecurrentLayer
        super().__init__(layers=[layer_class() for _ in range(config.num_layers)])

    @property
    def num_bytes(self) -> int:
        """Bytes that the cache holds."""
        return sum(x.nbytes for layer in self.layers for x in layer.state.values())


def _rows(state: MixerState, indices: Tensor) -> MixerState:
    return {name: x.index_select(0, indices.to(x.device)) for name, x in state.items()}
