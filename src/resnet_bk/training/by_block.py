"""A step's gradients block after block, with the optimizer and the weights where the strategy has them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from resnet_bk.frugal.by_block import backward_by_block
from resnet_bk.frugal.optimizer import OffloadedAdamW
from resnet_bk.frugal.streaming import StreamedBlocks
from resnet_bk.frugal.waiting import WaitingTensors
from resnet_bk.training.block_passes import BlockPasses
from resnet_bk.training.language_model import LanguageModel


class ByBlock:
    """What such a step needs beside the model, and keeps for the next one."""

    def __init__(self, optimizer: OffloadedAdamW, streamed: StreamedBlocks | None, device: torch.device) -> None:
        """``streamed`` are the model's blocks, if their weights are in host memory."""
        self.optimizer, self.streamed = optimizer, streamed
        self.on_unrecorded: Callable[[str], None] | None = None  # hears, once, why passes are not recorded
        self.waiting = WaitingTensors(device)
        self._passes: BlockPasses | None = None
        self._why_not: str | None = None

    def gradients(self, parts: LanguageModel, *, recorded: bool = False) -> tuple[Tensor, Tensor]:
        """Cross-entropy and expert load of the step, whose gradients are computed.

        With ``recorded`` passes, which may be as soon as a step on as many rows has gone through, kernels are those
        that were recorded the first time.
        """
        inside = {id(parameter) for block in parts.blocks for parameter in block.parameters()}
        ends = [parameter for parameter in parts.model.parameters() if id(parameter) not in inside]
        # What was recorded is of no use to smaller micro-batches, which may be here for want of its memory.
        self._passes = passes = self._passes_of(parts) if recorded else None
        backward_by_block(
            parts,
            len(parts.pieces),
            self.waiting,
            passes=passes,
            holding=self._holding,
            holding_ends=self.optimizer.holding(ends),
        )
        if passes is not None and passes.has_failed:
            self._go_on_without("memory did not suffice")
        return torch.stack(parts.nats).sum(0), torch.stack(parts.loads()).sum(0)

    def _passes_of(self, parts: LanguageModel) -> BlockPasses | None:
        if self._why_not is None and (why_not := parts.not_recordable()):
            self._go_on_without(why_not)
        if self._why_not is not None:
            return None
        passes = self._passes or BlockPasses(self.optimizer, parts.device)
        passes.begin(parts)
        return passes

    def _go_on_without(self, why_not: str) -> None:
        self._why_not, self._passes = why_not, None
        if self.on_unrecorded is not None:
            self.on_unrecorded(why_not)

    @contextmanager
    def _holding(self, block: nn.Module, then: nn.Module | None) -> Iterator[None]:
        streamed = nullcontext() if self.streamed is None else self.streamed.holding(block, then=then)
        with streamed, self.optimizer.holding(block.parameters()):
            yield
