"""What an optimizer on the host keeps for one parameter: its master, its moments and its gradient."""

import weakref
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from resnet_bk.frugal.gradients import HostGradient
from resnet_bk.frugal.homes import weight_home, writer_of
from resnet_bk.frugal.local import like_dtensor, local_tensor


@dataclass(kw_only=True, eq=False)
class HostSlot:
    """What belongs to one parameter, in host memory."""

    parameter: nn.Parameter
    group: dict[str, Any]
    index: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    version: int | None  # of the parameter, when the master was last known to be it
    gradient: Tensor | None = None
    block: "weakref.ref[nn.Module] | None" = None
    turn: int = 0  # of its block among the blocks, from 1 on
    future: Future[None] | None = None
    event: Any = None
    hook: Any = None  # of the parameter's gradient
    is_taken_over: bool = False  # by another optimizer

    def weights(self) -> Tensor:
        """What the master is written to."""
        return local_tensor(weight_home(self.parameter))

    def arrive(self) -> None:
        """Returns when the weights have their new values, for whoever uses them next on the current stream."""
        was_changed = False
        if self.future is not None:
            self.future.result()
            self.future = None
            was_changed = self.parameter._version != self.version
        if self.event is not None:
            torch.cuda.current_stream(self.parameter.device).wait_event(self.event)
            self.event = None
        if was_changed:
            raise RuntimeError(
                "weights were changed in place while their update was on its way, and the change is lost; call "
                "synchronize() of the OffloadedAdamW between its step and such changes"
            )

    def follow(self) -> None:
        """The master becomes the weights where those were changed from outside.

        Not where they are the master's own, rounded: then it knows more.
        """
        self.arrive()
        if self.parameter._version == self.version:
            return
        self._agree()

    def _agree(self) -> None:
        self.version = self.parameter._version
        weights = self.weights().to("cpu")
        if not torch.equal(self.master.to(weights.dtype), weights):
            self.master.copy_(weights)

    def state(self) -> dict[str, Tensor]:
        """Copies, as torch's optimizers name them."""
        state = {"step": self.step, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        if self.parameter.dtype != torch.float32:
            state["master"] = self.master
        return {name: value.clone() for name, value in state.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Takes such a state; none at all is that of a parameter which was never updated."""
        self.step.fill_(float(state.get("step", 0)))
        for name, moment in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            if name in state:
                moment.copy_(local_tensor(state[name]))
            else:
                moment.zero_()
        if "master" in state:
            self.master.copy_(local_tensor(state["master"]))
        # Whether they are the weights shows at the next use: these may be loaded behind it.
        self.version = None


@torch.no_grad()
def take_over(parameter: nn.Parameter) -> None:
    """Ends another optimizer's care for a parameter: its updates are there, and so is the gradient."""
    slot = writer_of(parameter)
    if not isinstance(slot, HostSlot):
        return
    slot.arrive()
    slot.hook.remove()
    slot.is_taken_over = True
    gradient = host_gradient(parameter)
    if gradient is not None:
        gradient.wait()
        plain = gradient.host.to(gradient.device, copy=True)
        parameter.grad = like_dtensor(plain, parameter.grad) if isinstance(parameter.grad, DTensor) else plain


def host_gradient(parameter: nn.Parameter) -> HostGradient | None:
    """The gradient of a parameter, or of its local piece, if it is on the host."""
    if parameter.grad is None:
        return None
    gradient = local_tensor(parameter.grad)
    return gradient if isinstance(gradient, HostGradient) else None
