"""A step's gradients block after block: what ``frugal.by_block`` needs to know of a language model and its batches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from resnet_bk.frugal.by_block import backward_by_block
from resnet_bk.frugal.optimizer import OffloadedAdamW
from resnet_bk.frugal.streaming import StreamedBlocks
from resnet_bk.frugal.waiting import WaitingTensors
from resnet_bk.layers import SequenceContext
from resnet_bk.models import ResNetBKForCausalLM
from resnet_bk.models.modeling import mean_balancing_loss, run_block
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.micro_step import autocast, moved, seed_micro_step, share_of_step

# Of a batch's number, its first row and the row behind its last.
Piece = tuple[int, tuple[int, int]]


class ByBlock:
    """What such a step needs beside the model, and keeps for the next one."""

    def __init__(self, optimizer: OffloadedAdamW, streamed: StreamedBlocks | None, device: torch.device) -> None:
        """``streamed`` are the model's blocks, if their weights are in host memory."""
        self.optimizer, self.streamed = optimizer, streamed
        self.waiting = WaitingTensors(device)

    def gradients(
        self,
        model: ResNetBKForCausalLM,
        scaler: torch.amp.GradScaler,
        batches: Sequence[tuple[Tensor, Tensor]],
        pieces: Sequence[Piece],
        config: TrainingConfig,
        step: int,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and expert load of the step, whose gradients are computed."""
        parts = _LanguageModel(model, scaler, batches, pieces, config, step, device)
        inside = {id(parameter) for block in parts.blocks for parameter in block.parameters()}
        ends = [parameter for parameter in model.parameters() if id(parameter) not in inside]
        backward_by_block(
            parts,
            len(pieces),
            self.waiting,
            holding=self._holding,
            holding_ends=self.optimizer.holding(ends),
        )
        return torch.stack(parts.nats).sum(0), torch.stack(parts.loads()).sum(0)

    @contextmanager
    def _holding(self, block: nn.Module, then: nn.Module | None) -> Iterator[None]:
        streamed = nullcontext() if self.streamed is None else self.streamed.holding(block, then=then)
        with streamed, self.optimizer.holding(block.parameters()):
            yield


class _LanguageModel:
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

    def through(self, block: nn.Module, piece: int, x: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(self.device, self.config.precision):
            x, routing = run_block(block, x, self._contexts[piece])
        if not torch.is_grad_enabled():
            self._loads[piece].append(routing.expert_load_E)
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
