"""Models with one fault each, for the suite to find. ``--baseline planted:NAME`` builds one for a vocabulary."""

import os
import signal
import time

import torch
from torch import Tensor, nn

WIDTH = 32


class Plain(nn.Module):
    """A causal language model: each token adds the mean of those before it, itself included."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        return self.head(self.inner(self.mixed(x)).tanh())

    def mixed(self, x: Tensor) -> Tensor:
        counts = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
        return x + x.cumsum(1) / counts[:, None]


class Sleeping(Plain):
    def forward(self, input_ids: Tensor) -> Tensor:
        time.sleep(0.12)
        return super().forward(input_ids)


class Leaking(Plain):
    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.kept: list[Tensor] = []

    def mixed(self, x: Tensor) -> Tensor:
        self.kept.append(x.detach().clone())
        return super().mixed(x)


class Foreseeing(Plain):
    def mixed(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


class NotANumber(Plain):
    def mixed(self, x: Tensor) -> Tensor:
        return super().mixed(x) / 0 * 0


class TooLarge(Plain):
    def mixed(self, x: Tensor) -> Tensor:
        torch.empty(2**50, dtype=torch.uint8)
        return super().mixed(x)


class Hanging(Plain):
    def mixed(self, x: Tensor) -> Tensor:
        time.sleep(3600)
        return super().mixed(x)


class Dying(Plain):
    def mixed(self, x: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGSEGV)
        return super().mixed(x)


@torch.library.custom_op("planted::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    """An operator that nobody has told the FLOPs of."""
    return 2 * x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


twice.register_autograd(lambda _context, gradient: 2 * gradient)


class Uncounted(Plain):
    def mixed(self, x: Tensor) -> Tensor:
        return super().mixed(twice(x))


def equal(vocab_size: int) -> nn.Module:
    """Ours of the tests of planted faults, to the last weight."""
    from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM

    return ResNetBKForCausalLM(ResNetBKConfig.from_preset("tiny", mixer="attention", vocab_size=vocab_size))
