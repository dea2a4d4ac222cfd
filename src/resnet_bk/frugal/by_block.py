"""Gradients of a batch in many pieces, block after block instead of piece after piece.

Where weights live in host memory, going through all blocks for one piece of the batch, and then for the next, takes
every weight to the device, and every gradient away from it, once for each piece. Here all pieces go through a block
before the next one: each weight comes twice a step and each gradient leaves once, however many pieces there are. What
waits meanwhile, in host memory, are the blocks' inputs.

Gradients are those of piece after piece, summed in the same order; only a parameter that both ends of the model share
adds up its parts in another one.

Source: B. Pudipeddi et al., "Training Large Neural Networks with Constant Memory using a New Execution Algorithm"
(2020), for the order.
"""

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from resnet_bk.frugal.waiting import WaitingTensors

Holding = Callable[[nn.Module, nn.Module | None], AbstractContextManager[Any]]


class ModelInParts(Protocol):
    """A model and a batch; ``piece`` numbers the batch's pieces from 0 on."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """What a tensor goes through, one after the other."""

    def stem(self, piece: int) -> Tensor:
        """What the first block takes."""

    def through(self, block: nn.Module, piece: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the next one takes, and a scalar that the loss depends on besides."""

    def loss(self, piece: int, x: Tensor, scalars: list[Tensor]) -> Tensor:
        """The piece's part of the loss, from what the last block gave and all blocks' scalars."""


class Passes(Protocol):
    """Another way for a piece to go through a block than ``ModelInParts.through`` and autograd."""

    def forward(self, block: nn.Module, piece: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """What ``through`` gives."""

    def backward(self, block: nn.Module, piece: int, x: Tensor, gradient: Tensor, scalar_gradient: Tensor) -> Tensor:
        """From the gradients of what ``through`` gives that of ``x``; it adds up those of parameters itself."""

    def end(self, block: nn.Module) -> None:
        """Behind all pieces' ``backward``: adds what it has added up to the parameters' gradients."""


def backward_by_block(
    model: ModelInParts,
    num_pieces: int,
    waiting: WaitingTensors,
    *,
    passes: Passes | None = None,
    holding: Holding | None = None,
    holding_ends: AbstractContextManager[Any] | None = None,
) -> None:
    """Adds the gradients of the sum of the pieces' losses to those that parameters have.

    The first piece meets the random numbers that it would meet on its way through the whole model, as in a step of one
    piece; each further one has numbers of its own. Behind it torch's generators are where the first piece's loss has
    left them.

    Args:
        model: computes in whatever precision it chooses.
        num_pieces: at least 1.
        waiting: where tensors wait; keep it for the next step, as it keeps its memory.
        passes: how pieces go through blocks, if not as autograd has it.
        holding: a context around everything that is done with one block, given the block that is next, too: it has the
            weights be there, and takes the gradients away at its end. It is entered twice for each block.
        holding_ends: the same for what is outside of blocks, around all of backward.

    Raises:
        ValueError: there is no piece.
    """
    if num_pieces < 1:
        raise ValueError(f"num_pieces is {num_pieces}; give at least 1")
    hold = holding or (lambda *_: nullcontext())
    random = _RandomStates(waiting.device)
    try:
        scalars = _forward(model, num_pieces, waiting, random, hold, passes)
        with holding_ends or nullcontext():
            gradients = _backward_from_the_loss(model, num_pieces, waiting, random, scalars)
            _backward_through_blocks(model, num_pieces, waiting, random, hold, gradients, passes)
            _backward_to_the_stem(model, num_pieces, waiting, random)
        random.restore("end")
    finally:
        waiting.end()


@torch.no_grad()
def _forward(
    model: ModelInParts,
    num_pieces: int,
    waiting: WaitingTensors,
    random: "_RandomStates",
    hold: Holding,
    passes: Passes | None,
) -> list[list[Tensor]]:
    """Leaves the input of every block waiting; returns each piece's scalars."""
    blocks = list(model.blocks)
    through = model.through if passes is None else passes.forward
    scalars: list[list[Tensor]] = [[] for _ in range(num_pieces)]
    for piece in range(num_pieces):
        if piece:
            random.branch(("stem", 0), piece)
        random.keep(("stem", piece))
        waiting.put((0, piece), model.stem(piece))
        random.keep((0, piece))
    inputs = waiting.each([[(number, piece)] for number in range(len(blocks)) for piece in range(num_pieces)])
    for number, block in enumerate(blocks):
        with hold(block, blocks[number + 1] if number + 1 < len(blocks) else None):
            for piece in range(num_pieces):
                (x,) = next(inputs)
                random.restore((number, piece))
                x, scalar = through(block, piece, x)
                random.keep((number + 1, piece))
                scalars[piece].append(scalar)
                waiting.put((number + 1, piece), x)
    return scalars


def _backward_from_the_loss(
    model: ModelInParts,
    num_pieces: int,
    waiting: WaitingTensors,
    random: "_RandomStates",
    scalars: list[list[Tensor]],
) -> list[list[Tensor]]:
    """Leaves the gradient of what the last block gave waiting; returns those of the scalars."""
    last = len(model.blocks)
    gradients = []
    for piece, (x,) in enumerate(waiting.each([[(last, piece)] for piece in range(num_pieces)])):
        random.restore((last, piece))
        leaves = [scalar.detach().requires_grad_() for scalar in scalars[piece]]
        loss = model.loss(piece, x.requires_grad_(), leaves)
        if not piece:
            random.keep("end")
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        gradients.append([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves])
        _put_gradient(waiting, last, piece, _gradient_of(x))
    return gradients


def _backward_through_blocks(
    model: ModelInParts,
    num_pieces: int,
    waiting: WaitingTensors,
    random: "_RandomStates",
    hold: Holding,
    scalar_gradients: list[list[Tensor]],
    passes: Passes | None,
) -> None:
    blocks = list(model.blocks)
    order = list(reversed(range(len(blocks))))
    pairs = waiting.each(
        [[(number, piece), ("gradient", number + 1, piece)] for number in order for piece in range(num_pieces)]
    )
    for number in order:
        block = blocks[number]
        with hold(block, blocks[number - 1] if number else None):
            for piece in range(num_pieces):
                x, gradient = next(pairs)
                random.restore((number, piece))
                if passes is not None:
                    scalar_gradient = scalar_gradients[piece][number]
                    _put_gradient(waiting, number, piece, passes.backward(block, piece, x, gradient, scalar_gradient))
                    continue
                y, scalar = model.through(block, piece, x.requires_grad_())
                ends = [(y, gradient), (scalar, scalar_gradients[piece][number])]
                results, gradients = zip(*(end for end in ends if end[0].requires_grad), strict=True)
                torch.autograd.backward(results, gradients)
                _put_gradient(waiting, number, piece, _gradient_of(x))
            if passes is not None:
                passes.end(block)


def _backward_to_the_stem(
    model: ModelInParts, num_pieces: int, waiting: WaitingTensors, random: "_RandomStates"
) -> None:
    for piece, (gradient,) in enumerate(waiting.each([[("gradient", 0, piece)] for piece in range(num_pieces)])):
        random.restore(("stem", piece))
        x = model.stem(piece)
        if x.requires_grad:
            x.backward(gradient)  # type: ignore[no-untyped-call]


def _gradient_of(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


def _put_gradient(waiting: WaitingTensors, number: int, piece: int, gradient: Tensor) -> None:
    # The next block's is no longer needed by then: all blocks share its place.
    waiting.put(("gradient", number, piece), gradient, place=("gradient", piece))


class _RandomStates:
    """What torch's generators, on the host and on the device, were at certain moments."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states: dict[Any, tuple[Tensor, Tensor | None]] = {}

    def keep(self, moment: Any) -> None:
        on_device = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        self._states[moment] = torch.get_rng_state(), on_device

    def branch(self, moment: Any, number: int) -> None:
        """Begins other numbers, which depend on those of a moment and on ``number``."""
        # Read where they are: they are ordinary tensors where a step is only imagined, too.
        states = [
            ctypes.string_at(state.data_ptr(), state.nbytes) for state in self._states[moment] if state is not None
        ]
        drawn = hashlib.sha256(b"".join(states) + number.to_bytes(8)).digest()
        seed = int.from_bytes(drawn[:8]) >> 1
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                torch.cuda.manual_seed(seed)

    def restore(self, moment: Any) -> None:
        on_host, on_device = self._states[moment]
        torch.set_rng_state(on_host)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, self._device)
