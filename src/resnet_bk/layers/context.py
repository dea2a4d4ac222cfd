"""What a mixer is told about the tokens besides their vectors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_bk.layers.padding import Padding

# What a mixer remembers of the tokens so far, batch first; its keys are the mixer's own.
MixerState = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class SequenceContext:
    """Where the tokens stand in their rows.

    ``key_mask_BK`` is nonzero for the real ones of all tokens, past and present, None if all are. ``padding`` is the
    same for the present ones. ``document_ids_BN`` tells the documents of packed rows apart: tokens of different ones
    do not mix. None for one document a row.
    """

    position_ids_BN: Tensor
    padding: Padding | None = None
    key_mask_BK: Tensor | None = None
    document_ids_BN: Tensor | None = None

    def front_positions_BN(self) -> Tensor:
        """The positions with each row's real tokens in front."""
        if self.padding is None:
            return self.position_ids_BN
        return self.position_ids_BN.expand_as(self.padding.order_BN).gather(1, self.padding.order_BN)

    def front_starts_BN(self) -> Tensor | None:
        """Where a document starts behind another, bool, with each row's real tokens in front; None without packing."""
        ids_BN = self.document_ids_BN
        if ids_BN is None:
            return None
        if self.padding is not None:
            ids_BN = ids_BN.gather(1, self.padding.order_BN)
        starts_BN = torch.zeros_like(ids_BN, dtype=torch.bool)
        starts_BN[:, 1:] = ids_BN[:, 1:] != ids_BN[:, :-1]
        return starts_BN
