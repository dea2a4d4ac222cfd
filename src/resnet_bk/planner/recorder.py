"""A training step as the tensors that came and went in it, each with where and when it was made."""

import inspect
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from resnet_bk.frugal.local import local_tensor
from resnet_bk.imagined import is_recorded
from resnet_bk.memory.tracking import TensorTracker
from resnet_bk.planner.as_on_cuda import AsOnCuda, workspace_bytes

Phase = Literal["setup", "forward", "backward", "update"]

GRAPHS = -1
BIASED_PRODUCT = torch.ops.aten.addmm.default
LAYER_NORM = torch.ops.aten.native_layer_norm.default
# What reads a number out of a tensor, which an imagined one has not. Nothing that a step allocates depends on it.
SCALER = "torch.amp.grad_scaler"
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a tensor was made: the phase of the step, the module's path and torch's operator.

    ``stream`` is 0 for the one that computes, others are those beside it, as FSDP2 has for what ranks exchange, and
    ``GRAPHS`` stands for the memory of CUDA graphs.
    """

    phase: Phase
    module: str
    operator: Any
    stream: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """Tensor number ``tensor`` has so many bytes more: all of a new one, and minus all of one that goes."""

    tensor: int
    num_bytes: int


class StepRecorder(TensorTracker):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """A tracker that keeps a record of everything, on the device and on the host.

    ``origins`` is indexed by a tensor's number; ``events`` are in order. ``phase`` is set by whoever runs the step;
    forward and backward it tells apart itself. With ``as_on_cuda`` it counts what torch's kernels on a GPU take for
    themselves while they run, and sees to it that modules which are computed again in backward, where torch knows no
    function mode, are so under that mode.
    """

    def __init__(self, as_on_cuda: AsOnCuda | None = None) -> None:
        super().__init__()
        self._as_on_cuda = as_on_cuda
        self._again: list[int] = []  # how deep in modules the function mode was entered again
        self.phase: Phase = "setup"
        self.origins: list[Origin] = []
        self.events: list[Event] = []
        self.host_events: list[Event] = []
        self.copied_away: set[int] = set()
        self.threads_of_biased_products: set[bool] = set()  # True is autograd's
        self._numbers: dict[int, int] = {}
        self._paths: dict[int, str] = {}
        self._entered: list[str] = []
        self._marks: list[tuple[int, str]] = []  # from which of autograd's numbers on which module was running
        self._operator: Any = None  # the outermost: what is inside of ours belongs to them
        self._depth = 0
        self._streams = [torch.cpu.current_stream()]

    @contextmanager
    def naming(self, model: nn.Module) -> Iterator[None]:
        """Meanwhile tensors are known by the module of ``model`` in which they were made."""
        self._paths = {id(module): path for path, module in model.named_modules()}
        with ExitStack() as stack:
            for handle in (register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave)):
                stack.callback(handle.remove)
            yield

    def number_of(self, tensor: torch.Tensor) -> int | None:
        """The number of a tensor that is there."""
        return self._numbers.get(local_tensor(tensor).untyped_storage()._cdata)

    def copies_away(self, tensor: torch.Tensor) -> None:
        """A tensor's copy to the host has begun."""
        number = self.number_of(tensor)
        if number is not None:
            self.copied_away.add(number)

    def _enter(self, module: nn.Module, _args: Any) -> None:
        if self._as_on_cuda is not None and not torch._C._is_torch_function_mode_enabled():
            self._as_on_cuda.__enter__()  # type: ignore[no-untyped-call]
            self._again.append(len(self._entered))
        self._entered.append(self._paths.get(id(module), ""))
        self._mark()

    def _leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if self._entered:
            self._entered.pop()
        if self._as_on_cuda is not None and self._again and self._again[-1] == len(self._entered):
            self._again.pop()
            self._as_on_cuda.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._mark()

    def _mark(self) -> None:
        self._marks.append((torch._C._autograd._get_sequence_nr(), self._entered[-1] if self._entered else ""))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # more than half of all calls
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if result is NotImplemented:
            return result
        if func is BIASED_PRODUCT and args[0].ndim == 1:
            self.threads_of_biased_products.add(torch._C._current_autograd_node() is not None)
        if self._as_on_cuda is not None and (taken := workspace_bytes(func, args, kwargs or {})):
            self._take_for_a_moment(taken)
        return result

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._depth:
            self._operator = func
        self._depth += 1
        try:
            if func in READS:
                return _number_of(args[0].dtype)
            if func is torch.ops.aten.equal.default:
                return True
            result = super()._call(func, args, kwargs)
            return _in_single(result) if func is LAYER_NORM and isinstance(result[1], FakeTensor) else result
        finally:
            self._depth -= 1

    def _count(self, key: int, num_bytes: int, on_host: bool) -> None:
        super()._count(key, num_bytes, on_host)
        if key not in self._numbers:
            self._numbers[key] = len(self.origins)
            self.origins.append(self._origin())
        (self.host_events if on_host else self.events).append(Event(self._numbers[key], num_bytes))

    def _take_for_a_moment(self, num_bytes: int) -> None:
        """As the kernel does, while its results are there already."""
        number = len(self.origins)
        self.origins.append(self._origin())
        self.events += [Event(number, num_bytes), Event(number, -num_bytes)]

    def _freed(self, key: int, _reference: Any) -> None:
        super()._freed(key, _reference)
        self._numbers.pop(key, None)

    def _stream(self) -> int:
        """The number of the stream that torch would allocate on."""
        if is_recorded():
            return GRAPHS
        current = torch.cpu.current_stream()
        for number, stream in enumerate(self._streams):
            if stream is current:
                return number
        self._streams.append(current)
        return len(self._streams) - 1

    def _origin(self) -> Origin:
        phase, module, operator = self._place()
        return Origin(phase, module, operator, self._stream())

    def _place(self) -> tuple[Phase, str, Any]:
        node = torch._C._current_autograd_node()
        if node is None or self.phase != "forward":
            return self.phase, self._entered[-1] if self._entered else "", self._operator
        if self._entered:  # computed again
            return "backward", self._entered[-1], self._operator
        index = bisect_right(self._marks, node._sequence_nr(), key=lambda mark: mark[0]) - 1
        return "backward", self._marks[index][1] if index >= 0 else "", self._operator


def _in_single(result: Any) -> Any:
    """A norm of half-typed rows, whose means and deviations kernels leave in float32, and torch's fakes do not."""
    y, *moments = result
    return (y, *(torch.empty_like(moment, dtype=torch.float32) for moment in moments))


def _number_of(dtype: torch.dtype) -> float | int | bool:
    """What stands for a number that nobody knows: the usual one.

    A truth is that all tokens are there, and of one row; a loss scaler asks whether a gradient has overflown.
    """
    if dtype == torch.bool:
        return True
    if not dtype.is_floating_point:
        return 0
    return 0.0 if _is_asked_by(SCALER) else 1.0


def _is_asked_by(module: str) -> bool:
    """Whether a function of this module is waiting for what happens."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == module:
            return True
        frame = frame.f_back
    return False
