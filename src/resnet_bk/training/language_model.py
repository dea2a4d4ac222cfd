"""A language model and a step's batches in parts: what ``frugal.by_block`` needs to know of them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resnet_bk.layers import MixtureOfExperts, SequenceContext
from resnet_bk.layers.mixture import Routing
from resnet_bk.models import ResNetBKForCausalLM
from resnet_bk.models.modeling import mean_balancing_loss, run_block
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.micro_step import autocast, moved, seed_micro_step, share_of_step

# Of a batch's number, its first row and the row behind its last.
Piece = tuple[int, tuple[int, int]]


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
