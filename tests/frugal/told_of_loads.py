"""A writer of homes that writes nothing: it is asked to arrive before its block's weights are read."""

from collections.abc import Callable

from torch import nn

from resnet_bk.frugal.homes import written_by


class ToldOfLoads:
    """Calls ``call`` each time that the block's weights are about to be read, as long as it lives."""

    def __init__(self, block: nn.Module, call: Callable[[], object]) -> None:
        self.call = call
        written_by(next(block.parameters()), self)

    def arrive(self) -> None:
        self.call()
