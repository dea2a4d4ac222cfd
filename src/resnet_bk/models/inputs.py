"""What a call is given, checked, and what blocks are told of it: padding, packed documents, positions."""

from typing import Any

import torch
from torch import Tensor

from resnet_bk.layers.padding import Padding
from resnet_bk.models.cache import ResNetBKCache

# What callers of transformers' kind say to any model: of no consequence here, if it is what stands beside it.
USUAL_ARGUMENTS: dict[str, tuple[object, ...]] = {
    "return_dict": (None, True),
    "output_attentions": (None, False),
}
# These are, whatever is given: of one kind of token, counted by the Trainer, and known from the cache.
UNUSED_ARGUMENTS = {"token_type_ids", "num_items_in_batch", "cache_position"}


def require_known_arguments(arguments: dict[str, Any]) -> None:
    """That nothing is asked for which would be ignored in silence."""
    for name, value in arguments.items():
        if name in USUAL_ARGUMENTS:
            if value not in USUAL_ARGUMENTS[name]:
                raise ValueError(f"{name}={value} is not offered by this model; leave it out")
        elif name not in UNUSED_ARGUMENTS:
            raise TypeError(f"forward() got an unexpected keyword argument '{name}'")


def require_tokens(name: str, given: Tensor, dimensions: int) -> None:
    """That there are rows of tokens."""
    if given.dim() != dimensions or 0 in given.shape:
        shape = ("batch", "tokens", "hidden_size")[:dimensions]
        raise ValueError(
            f"{name} has shape {tuple(given.shape)}; give ({', '.join(shape)}), of at least one row and one token"
        )


def require_own_cache(cache: object, num_layers: int) -> None:
    """That a cache is of this model's kind and depth."""
    if not isinstance(cache, ResNetBKCache) or len(cache.layers) != num_layers:
        found = f"a {type(cache).__name__}"
        if isinstance(cache, ResNetBKCache):
            found = f"a cache of {len(cache.layers)} blocks"
        raise ValueError(
            f"past_key_values is {found}; give what this model of {num_layers} blocks returned, or "
            "ResNetBKCache(model.config)"
        )


def mask_with_padding(attention_mask: Tensor | None, rows: int, num_keys: int) -> Tensor | None:
    """The mask over all keys, or None if no token of it is padding."""
    if attention_mask is None:
        return None
    if tuple(attention_mask.shape) != (rows, num_keys):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; give ({rows}, {num_keys}), cached tokens included"
        )
    return None if bool(attention_mask.all()) else attention_mask


def numbered_documents(document_ids: Tensor, x_BND: Tensor, past_length: int) -> Tensor:
    """The documents of each row counted from 0: a number that comes again is another document."""
    if document_ids.shape != x_BND.shape[:2] or document_ids.is_floating_point():
        raise ValueError(
            f"document_ids is {document_ids.dtype} of shape {tuple(document_ids.shape)}; "
            f"give integers of shape {tuple(x_BND.shape[:2])}"
        )
    if past_length:
        raise ValueError("document_ids are for whole rows; a cache that has tokens already cannot be told them apart")
    return _starts(document_ids).cumsum(1)


def front_starts(document_ids_BN: Tensor, padding: Padding | None) -> Tensor:
    """Where a document starts behind another, with each row's real tokens in front; nothing starts in the padding."""
    if padding is None:
        return _starts(document_ids_BN)
    return _starts(document_ids_BN.gather(1, padding.order_BN)) & padding.front_real_BN


def _starts(document_ids_BN: Tensor) -> Tensor:
    starts_BN = torch.zeros_like(document_ids_BN, dtype=torch.bool)
    starts_BN[:, 1:] = document_ids_BN[:, 1:] != document_ids_BN[:, :-1]
    return starts_BN


def positions(key_mask_BK: Tensor | None, document_ids_BN: Tensor | None, past_length: int, x_BND: Tensor) -> Tensor:
    """Each token's number among the real tokens of its row, or of its document there."""
    length = x_BND.shape[1]
    if key_mask_BK is None:
        position_ids_BN = before_BN = torch.arange(past_length, past_length + length, device=x_BND.device).unsqueeze(0)
    else:
        real_BK = key_mask_BK.bool().long()
        position_ids_BN = (real_BK.cumsum(1) - 1).clamp(min=0)[:, -length:]
        before_BN = (real_BK.cumsum(1) - real_BK)[:, -length:]  # real ones
    if document_ids_BN is None:
        return position_ids_BN
    first_BN = torch.where(_starts(document_ids_BN), before_BN, 0).cummax(1).values
    return (position_ids_BN - first_BN).clamp(min=0)


def require_positions(position_ids: Tensor, rows: int, length: int) -> None:
    """That a caller's positions are one for each token."""
    if tuple(position_ids.shape) not in {(1, length), (rows, length)}:
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}; give ({rows}, {length}) or (1, {length})"
        )


def require_places(
    position_ids: Tensor, num_tokens: int, limit: int | None, *, are_given: bool, begin_again: bool
) -> None:
    """That a table of ``limit`` places has all positions.

    They are looked at, for which a GPU is waited for, only where a caller gave them, or where there are more tokens
    than places, and padding or documents from which they begin again.
    """
    if limit is None or (num_tokens <= limit and not are_given):
        return
    furthest = int(position_ids.max()) + 1 if are_given or begin_again else num_tokens
    if furthest > limit:
        raise ValueError(
            f"{furthest} tokens are more than this model's position table of {limit}; "
            "use shorter sequences, or a model with max_position_embeddings=None"
        )


def padding(key_mask_BK: Tensor | None, length: int) -> Padding | None:
    """Where the padding of the last ``length`` tokens is, None if none of them is."""
    if key_mask_BK is None or bool(key_mask_BK[:, -length:].all()):
        return None
    return Padding.from_mask(key_mask_BK[:, -length:])


def positions_to_keep(hidden_BND: Tensor, attention_mask: Tensor | None, logits_to_keep: int | Tensor) -> Tensor:
    """Of a number the last so many, where one is each row's last real token; of a tensor those at its places."""
    if isinstance(logits_to_keep, Tensor):
        return hidden_BND[:, logits_to_keep]
    if logits_to_keep < 0:
        raise ValueError(f"logits_to_keep is {logits_to_keep}; give 0 for all positions, a number of them, or a tensor")
    if not logits_to_keep:
        return hidden_BND
    if logits_to_keep == 1 and attention_mask is not None:
        length = hidden_BND.shape[1]
        here = Padding.from_mask(attention_mask[:, -length:])
        ended_B = (here.num_real_B == 0) & attention_mask[:, :-length].any(1)
        if bool(ended_B.any()):
            raise ValueError(
                f"the last token of row {int(ended_B.nonzero()[0])} is in an earlier piece, and so are its logits; pad "
                "on the left, or read the prompt at once (without prefill_chunk_size)"
            )
        return here.last_real(hidden_BND)
    return hidden_BND[:, -logits_to_keep:]
