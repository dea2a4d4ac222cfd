"""A step's gradients block after block: what ``frugal.by_block`` needs to know of a language model and its batches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from resnet_bk.frugal.by_block import backward_by_block
from resnet_bk.frugal.optimizer import OffloadedAdamW
from resnet_bk.frugal.streaming import StreamedBlocks
from resnet_bk.frugal.waiting import WaitingTensors
from resnet_bk.layers import MixtureOfExperts, SequenceContext
from resnet_bk.layers.mixture import Routing
from resnet_bk.models import ResNetBKForCausalLM
from resnet_bk.models.modeling import mean_balancing_loss, run_block
from resnet_bk.training.block_passes import BlockPasses
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.micro_step import autocast, moved, seed_micro_step, share_of_step

# Of a batch's number, its first row and the row behind its last.
Piece = tuple[int, tuple[int, int]]


class ByBlock:
    """What such a step needs beside the model, and keeps for the next one."""

    def __init__(self, optimizer: OffloadedAdamW, streamed: StreamedBlocks | None, device: torch.device) -> None:
        """``streamed`` are the model's blocks, if their weights are in host memory."""
        self.optimizer, self.streamed = optimizer, streamed
        self.on_unrecorded: Callable[[str], None] | None = None  # hears, once, why passes are not recorded
        self.waiting = WaitingTensors(device)
        self._passes: BlockPasses | None = None
        self._why_not: str | None = None

    def gradients(
        self,
        model: ResNetBKForCausalLM,
        scaler: torch.amp.GradScaler,
        batches: Sequence[tuple[Tensor, Tensor]],
        pieces: Sequence[Piece],
        config: TrainingConfig,
        step: int,
        device: torch.device,
        *,
        recorded: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and expert load of the step, whose gradients are computed.

        With ``recorded`` passes, which may be as soon as a step on as many rows has gone through, kernels are those
        that were recorded the first time.
        """
        parts = LanguageModel(model, scaler, batches, pieces, config, step, device)
        inside = {id(parameter) for block in parts.blocks for parameter in block.parameters()}
        ends = [parameter for parameter in model.parameters() if id(parameter) not in inside]
        # What was recorded is of no use to smaller micro-batches, which may be here for want of its memory.
        self._passes = passes = self._passes_of(parts) if recorded else None
        backward_by_block(
            parts,
            len(pieces),
            self.waiting,
            passes=passes,
            holding=self._holding,
            holding_ends=self.optimizer.holding(ends),
        )
        if passes is not None and passes.has_failed:
            self._go_on_without("memory did not suffice")
        return torch.stack(parts.nats).sum(0), torch.stack(parts.loads()).sum(0)

    def _passes_of(self, parts: "LanguageModel") -> BlockPasses | None:
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


class LanguageModel:
    """The model as stem, blocks and loss, over the pieces of a step."""

    def __init__(
        self,
        model: ResNetBKForCausalLM,
        scaler: torch.amp.GradScaler,
        batches: Sequence[tuple[Tensor, Tensor]],
        pieces: Sequence[Piece],
        config: TrainingConfig,
        step: int,
        device: torch.device,
    ) -> None:
        self.model, self.scaler, self.batches, self.pieces = model, scaler, batches, pieces
        self.config, self.step, self.device = config, step, device
        self.blocks = list(model.model.layers)
        self.nats: list[Tensor] = []
        self._contexts: dict[int, SequenceContext] = {}
        self._loads: list[list[Tensor]] = [[] for _ in pieces]

    def stem(self, piece: int) -> Tensor:
        number, (start, stop) = self.pieces[piece]
        input_ids = moved(self.batches[number][0][start:stop], self.device)
        seed_micro_step(self.config.seed, self.step, number)
        with autocast(self.device, self.config.precision):
            x_BND, self._contexts[piece] = self.model.model.begin(
                input_ids, batch_rows=(start, len(self.batches[number][0]))
            )
        return x_BND

    def not_recordable(self) -> str | None:
        """Why passes are not alike, if not: of as many rows each, with nothing random but the router's noise."""
        if self.model.config.dropout:
            return "each pass has a dropout of its own"
        if len({stop - start for _, (start, stop) in self.pieces}) > 1:
            return "micro-batches are of two sizes"
        return None

    def context(self, piece: int) -> SequenceContext:
        """Where the piece's tokens stand."""
        return self._contexts[piece]

    def noise(self, block: nn.Module, piece: int, x: Tensor) -> Tensor:
        """What ``through`` would draw for the block's router."""
        moe: MixtureOfExperts = block.moe  # type: ignore[assignment]
        return moe.noise(x, self._contexts[piece].batch_rows)

    def computed(self, block: nn.Module, x: Tensor, context: SequenceContext) -> tuple[Tensor, Routing]:
        """What a block makes of tokens that stand so, in the configuration's precision."""
        with autocast(self.device, self.config.precision):
            return run_block(block, x, context)

    def note(self, piece: int, load_E: Tensor) -> None:
        """How a piece's tokens were shared among the next block's experts."""
        self._loads[piece].append(load_E)

    def through(self, block: nn.Module, piece: int, x: Tensor) -> tuple[Tensor, Tensor]:
        x, routing = self.computed(block, x, self._contexts[piece])
        if not torch.is_grad_enabled():
            self.note(piece, routing.expert_load_E)
        return x, routing.balancing_loss

    def loss(self, piece: int, x: Tensor, scalars: list[Tensor]) -> Tensor:
        number, (start, stop) = self.pieces[piece]
        targets_BN = moved(self.batches[number][1][start:stop], self.device)
        with autocast(self.device, self.config.precision):
            nats, loss = self.model.loss_of(self.model.model.norm(x), targets_BN, mean_balancing_loss(scalars))
        share = self._share(piece)
        self.nats.append(share * nats.detach())
        scaled: Tensor = self.scaler.scale(share * loss)
        return scaled

    def loads(self) -> list[Tensor]:
        """Each piece's share of (layers, experts)."""
        return [self._share(piece) * torch.stack(loads) for piece, loads in enumerate(self._loads)]

    def _share(self, piece: int) -> float:
        number, (start, stop) = self.pieces[piece]
        return share_of_step(start, stop, len(self.batches[number][0]), self.config.gradient_accumulation_steps)
