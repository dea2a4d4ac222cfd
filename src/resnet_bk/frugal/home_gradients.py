"""Gradients of streamed blocks, which go to host memory as backward makes them and add up there."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from resnet_bk.frugal.driver import side_stream
from resnet_bk.frugal.homes import view_like, weight_home
from resnet_bk.frugal.host import host_empty, is_host_memory


class HomeGradients:
    """Takes gradients to host memory as backward makes them, and adds them up there.

    A parameter's gradient is in the same memory in every step.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = side_stream(device)
        self._aside: dict[nn.Parameter, Tensor] = {}
        self._memory: Any = WeakTensorKeyDictionary()
        self._landing: dict[torch.dtype, Tensor] = {}
        self._arriving: tuple[Any, Tensor, Tensor] | None = None

    def put_aside(self, parameter: nn.Parameter) -> None:
        """Before a gradient comes, which is the device's and cannot be added to one on the host."""
        if type(parameter.grad) is Tensor:
            self._aside[parameter], parameter.grad = parameter.grad, None

    @torch.no_grad()
    def take(self, parameter: nn.Parameter) -> None:
        """Takes a gradient that has come; what an optimizer has put in its place is left there."""
        gradient = parameter.grad
        if type(gradient) is not Tensor:
            return
        total = self._aside.pop(parameter, None)
        if total is None:
            total = self._copied(gradient, self._place(parameter, gradient))
        else:
            self._add(total, gradient)
        # All that needed this weight has been computed: it can go home before its block does, which it must, as a
        # parameter and its gradient are on one device.
        parameter.grad = None
        parameter.data = weight_home(parameter)
        parameter.grad = total

    def take_what_is_left(self, parameters: Iterable[nn.Parameter]) -> None:
        """After an error: somebody's hook may have raised before ours."""
        for parameter in parameters:
            if parameter.grad is not None and not is_host_memory(parameter.grad):
                self.take(parameter)

    def settle(self) -> None:
        """Returns when every gradient is complete, all parameters being the host's."""
        self._wait()
        while self._aside:
            # autograd.grad has asked for this one as a value.
            parameter, gradient = self._aside.popitem()
            parameter.grad = gradient

    def _add(self, total: Tensor, gradient: Tensor) -> None:
        if self._stream is None or gradient.device.type != "cuda":
            self._wait()
            total.add_(gradient)
            return
        self._add_what_arrived()
        landed = self._copied(gradient, self._landing_for(gradient))
        self._arriving = (self._stream.record_event(), total, landed)

    def _add_what_arrived(self) -> None:
        # One gradient behind, so that the copy of each goes on while backward computes the next.
        if self._arriving is not None:
            arrived, total, landed = self._arriving
            self._arriving = None
            # The sum may itself have been on its way to the host: its copy was earlier in the same stream.
            arrived.synchronize()
            total.add_(landed)

    def _wait(self) -> None:
        self._add_what_arrived()
        if self._stream is not None:
            self._stream.synchronize()

    def _copied(self, gradient: Tensor, place: Tensor) -> Tensor:
        """``place``, to which the gradient has been copied, or will have been when the stream gets there."""
        if self._stream is None or gradient.device.type != "cuda":
            return place.copy_(gradient)
        self._stream.wait_stream(torch.cuda.current_stream(gradient.device))
        with torch.cuda.stream(self._stream):
            place.copy_(gradient, non_blocking=True)
        # The allocator may give the memory to somebody else only behind this copy.
        gradient.record_stream(self._stream)
        return place

    def _place(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        place: Tensor | None = self._memory.get(parameter)
        if place is None or place.dtype != gradient.dtype or place.shape != gradient.shape:
            flat = host_empty(gradient.numel(), dtype=gradient.dtype)
            # An optimizer may go through weights and gradients side by side, whatever the strides.
            place = self._memory[parameter] = view_like(flat, 0, parameter)
        return place

    def _landing_for(self, gradient: Tensor) -> Tensor:
        landing = self._landing.get(gradient.dtype)
        if landing is None or landing.numel() < gradient.numel():
            landing = self._landing[gradient.dtype] = host_empty(gradient.numel(), dtype=gradient.dtype)
        return landing[: gradient.numel()].view(gradient.shape)
