"""A language model's passes through its blocks, recorded once and replayed for all blocks that are alike."""

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from resnet_bk.frugal.optimizer import OffloadedAdamW
from resnet_bk.frugal.recorded import Pass, RecordedPasses
from resnet_bk.layers import SequenceContext
from resnet_bk.memory.limits import is_out_of_memory
from resnet_bk.training.language_model import LanguageModel


class BlockPasses:
    """``frugal.by_block.Passes``. Gradients add up in float32 in one place for all blocks, as large as the largest.

    ``has_failed`` says that there was no memory to record in: from there on passes are computed one by one.
    """

    def __init__(self, optimizer: OffloadedAdamW, device: torch.device) -> None:
        self.has_failed = False
        self._optimizer, self._recorded = optimizer, RecordedPasses(device)
        self._sums: Tensor | None = None
        self._used: dict[str, list[bool]] = {}  # of a kind's parameters, which have gradients
        self._context: SequenceContext | None = None
        self._parts: LanguageModel | None = None

    def begin(self, parts: LanguageModel) -> None:
        """A step's model and pieces."""
        self._parts = parts
        if self._sums is None:
            largest = max(sum(p.numel() for p in _trained(block)) for block in parts.blocks)
            self._sums = torch.empty(largest, dtype=torch.float32, device=parts.device)
        self._sums.zero_()

    def forward(self, block: nn.Module, piece: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the next block takes, and the balancing loss."""
        parts = self._known(piece)

        def body(given: Sequence[Tensor]) -> Sequence[Tensor]:
            x, noise_TE = given
            y, routing = parts.computed(block, x, self._with(noise_TE))
            return y, routing.balancing_loss, routing.expert_load_E

        y, scalar, load_E = self._run("forward", block, body, [x, parts.noise(block, piece, x)])
        parts.note(piece, load_E)
        return y, scalar

    def backward(self, block: nn.Module, piece: int, x: Tensor, gradient: Tensor, scalar_gradient: Tensor) -> Tensor:
        """The gradient of ``x``; those of parameters go to the sums."""
        parts = self._known(piece)
        parameters, sums = _trained(block), self._sums_of(block)

        def body(given: Sequence[Tensor]) -> Sequence[Tensor]:
            x, noise_TE, *of_ends = given
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                y, routing = parts.computed(block, x, self._with(noise_TE))
                ends = zip((y, routing.balancing_loss), of_ends, strict=True)
                results, gradients = zip(*(end for end in ends if end[0].requires_grad), strict=True)
                found = torch.autograd.grad(results, [x, *parameters], gradients, allow_unused=True)
            self._used[_kind(block)] = [more is not None for more in found[1:]]
            for total, more in zip(sums, found[1:], strict=True):
                if more is not None:
                    total.add_(more)
            return [torch.zeros_like(x) if found[0] is None else found[0]]

        given = [x, parts.noise(block, piece, x), gradient, scalar_gradient]
        return self._run("backward", block, body, given)[0]

    @torch.no_grad()
    def end(self, block: nn.Module) -> None:
        """The block's sums are its parameters' gradients, and begin again from 0."""
        assert self._sums is not None
        for parameter, total, used in zip(_trained(block), self._sums_of(block), self._used[_kind(block)], strict=True):
            if not used:
                continue
            if parameter.grad is None:
                parameter.grad = total.clone()
            else:
                parameter.grad.add_(total)
        self._sums.zero_()

    def _run(self, way: str, block: nn.Module, body: Pass, given: list[Tensor]) -> list[Tensor]:
        self._optimizer.synchronize(block)
        if not self.has_failed:
            try:
                return self._recorded.run(self._key(way, block, given[0]), body, given)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the handler, which holds what the failed recording had allocated.
            self.has_failed = True
            self._recorded.forget()
        with torch.no_grad():
            return list(body(given))

    def _key(self, way: str, block: nn.Module, x: Tensor) -> Hashable:
        """A pass depends on where weights and buffers are, and on shapes."""
        tensors = (*block.parameters(), *block.buffers())
        places = tuple(tensor.data_ptr() for tensor in tensors) if x.device.type == "cuda" else ()
        return way, _kind(block), x.shape, x.dtype, places

    def _known(self, piece: int) -> LanguageModel:
        assert self._parts is not None
        if self._context is None:
            # What is recorded reads these tables for ever.
            self._context = self._parts.context(piece)
        return self._parts

    def _with(self, noise_TE: Tensor) -> SequenceContext:
        assert self._context is not None
        return replace(self._context, batch_rows=None, noise_TE=noise_TE)

    def _sums_of(self, block: nn.Module) -> list[Tensor]:
        assert self._sums is not None
        sizes = [parameter.numel() for parameter in _trained(block)]
        pieces = torch.split(self._sums[: sum(sizes)], sizes)
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, _trained(block), strict=True)]


def _trained(block: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in block.parameters() if parameter.requires_grad]


def _kind(block: nn.Module) -> str:
    """Blocks of one model are alike if their mixers are."""
    return type(block.mixer).__name__
