"""What a mixer is told about the tokens besides their vectors."""

from dataclasses import dataclass

from torch import Tensor

from resnet_bk.layers.padding import Padding

# What a mixer remembers of the tokens so far, batch first; its keys are the mixer's own.
MixerState = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class SequenceContext:
    """Where the tokens stand in their rows: the same for all layers, and so computed once.

    ``rotary`` is cos and sin of the positions' angles, ``(1 or B, N, size / 2)``, None for a mixer that does not turn;
    ``local_rotary`` is local attention's, beside another mixer.
    ``key_mask_BK`` is nonzero for the real ones of all tokens, past and present, None if all are. ``padding`` is the
    same for the present ones. ``document_ids_BN`` tells the documents of packed rows apart: tokens of different ones
    do not mix. ``front_starts_BN`` is where a document starts behind another, bool, with each row's real tokens in
    front. Both are None for one document a row. ``batch_rows`` are the first row and the number of rows of the batch
    that these rows are a piece of, None if they are all of it. ``noise_TE`` is what the router's logits get, if it is
    drawn already: then it is that of one block. Without ``remember`` nobody asks for the state behind
    the tokens, and a mixer to which that costs much may leave it out.
    """

    rotary: tuple[Tensor, Tensor] | None = None
    local_rotary: tuple[Tensor, Tensor] | None = None
    padding: Padding | None = None
    key_mask_BK: Tensor | None = None
    document_ids_BN: Tensor | None = None
    front_starts_BN: Tensor | None = None
    batch_rows: tuple[int, int] | None = None
    noise_TE: Tensor | None = None
    remember: bool = True

    def front_rotary(self) -> tuple[Tensor, Tensor] | None:
        """``rotary`` with each row's real tokens in front."""
        return self._to_front(self.rotary)

    def front_local_rotary(self) -> tuple[Tensor, Tensor] | None:
        """``local_rotary`` with each row's real tokens in front."""
        return self._to_front(self.local_rotary)

    def _to_front(self, tables: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        if self.padding is None or tables is None:
            return tables
        rows = len(self.padding.order_BN)
        cos_BNC, sin_BNC = (self.padding.to_front(table.expand(rows, -1, -1)) for table in tables)
        return cos_BNC, sin_BNC
