"""Where blocks' weights are: at home in host memory, and in slots on the device while their block computes."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from resnet_bk.frugal.host import ALIGNMENT, host_empty

_MOVED = (
    "parameters of a streamed block were replaced or moved since (by .to(), .half() or load_state_dict(assign=True), "
    "say); call remove(device) of the StreamedBlocks first, then change them, then stream the blocks again"
)

_homes: Any = WeakTensorKeyDictionary()
_writers: Any = WeakTensorKeyDictionary()


def has_home(parameter: nn.Parameter) -> bool:
    """Whether a parameter's weights have a home in host memory, as they do while it is streamed."""
    return parameter in _homes


def weight_home(parameter: nn.Parameter) -> Tensor:
    """Where a parameter's weights are kept: its view of host memory if it is streamed, ``parameter.data`` otherwise.

    An optimizer that updates weights while their block is on the device must write here: what is written to the
    device's copy is lost.
    """
    home: Tensor | None = _homes.get(parameter)
    return parameter.data if home is None else home


class Writer(Protocol):
    """Who writes a parameter's weights in the background."""

    def arrive(self) -> None:
        """Returns when what is being written is there."""


def written_by(parameter: nn.Parameter, writer: Writer) -> None:
    """Has whoever is about to read a parameter's weights wait for ``writer``, as long as it lives."""
    _writers[parameter] = weakref.ref(writer)


def writer_of(parameter: nn.Parameter) -> Writer | None:
    """Who may be writing a parameter's weights."""
    reference = _writers.get(parameter)
    writer: Writer | None = None if reference is None else reference()
    return writer


class Slot:
    """Room on the device for one block's weights."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.storage = self.memory.untyped_storage()._cdata
        self.holds: int | None = None
        self.versions: tuple[int, ...] = ()
        self.is_ahead = False
        self.tenant: int | None = None
        self._stream: Any = None
        self.copied, self.unused = _events(device)

    def occupy(self, tenant: int) -> None:
        """What the current stream does from here on finds the weights there."""
        self.tenant = tenant
        if self.copied is not None:
            # Remembered, as the slot may be vacated from another thread, with another current stream.
            self._stream = torch.cuda.current_stream(self.memory.device)
            self._stream.wait_event(self.copied)

    def vacate(self) -> None:
        """Returns when the home has been read; the weights stay for what the stream has yet to do."""
        self.tenant = None
        if self.copied is not None:
            self.unused.record(self._stream)
            self.copied.synchronize()

    def forget(self) -> None:
        """What is there must not be used any more."""
        self.holds, self.is_ahead = None, False


@dataclass(eq=False)
class StreamedWeight:
    """A parameter, its home, and where it is in each slot."""

    parameter: nn.Parameter
    home: Tensor
    on_device: list[Tensor] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)


class StreamedBlock:
    """A module and the places of its parameters, in host memory and in the slots."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.weights: list[StreamedWeight] = []
        # Each dtype's home, and where it begins in a slot, in bytes.
        self.homes: list[tuple[Tensor, int]] = []
        self.room = 0
        self._places: dict[torch.dtype, tuple[int, int, list[tuple[nn.Parameter, int]]]] = {}
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in module.parameters():
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for dtype, parameters in by_dtype.items():
            start, end = _aligned(self.room), 0
            places = []
            for parameter in parameters:
                begin = _aligned(end)
                places.append((parameter, begin))
                end = begin + parameter.numel() * dtype.itemsize
            self._places[dtype] = (start, end, places)
            self.room = start + end

    @torch.no_grad()
    def move_in(self, slots: Sequence[Slot], device: torch.device) -> None:
        """Takes the parameters to their homes and the buffers to the device."""
        for dtype, (start, num_bytes, places) in self._places.items():
            flat = host_empty(num_bytes // dtype.itemsize, dtype=dtype)
            self.homes.append((flat, start))
            rooms = [slot.memory[start : start + num_bytes].view(dtype) for slot in slots]
            for parameter, begin in places:
                home = view_like(flat, begin // dtype.itemsize, parameter).copy_(parameter)
                weight = StreamedWeight(
                    parameter, home, [view_like(room, begin // dtype.itemsize, home) for room in rooms]
                )
                self.weights.append(weight)
                _homes[parameter] = home
                _relocate(parameter, home, torch.device("cpu"))
        for buffer in self.module.buffers():
            buffer.data = buffer.data.to(device)

    @torch.no_grad()
    def move_out(self, device: torch.device) -> None:
        """Makes the parameters ordinary tensors on a device."""
        for weight in self.weights:
            for hook in weight.hooks:
                hook.remove()
            _homes.pop(weight.parameter, None)
            # A parameter that was replaced or moved since is not ours any more.
            if _is_at(weight.parameter, weight.home):
                place = torch.empty_strided(
                    weight.home.shape, weight.home.stride(), dtype=weight.home.dtype, device=device
                )
                _relocate(weight.parameter, place.copy_(weight.home), device)
        for buffer in self.module.buffers():
            buffer.data = buffer.data.to(device)
        self.weights, self.homes = [], []

    def versions(self) -> tuple[int, ...]:
        """Changes when somebody writes to the parameters, or to their homes."""
        parameters = [weight.parameter._version for weight in self.weights]
        return (*parameters, *(home._version for home, _ in self.homes))

    def check_at_home(self) -> None:
        """Raises RuntimeError if the parameters are not those that were streamed."""
        now = {id(parameter) for parameter in self.module.parameters()}
        if now != {id(weight.parameter) for weight in self.weights}:
            raise RuntimeError(_MOVED)
        if not all(_is_at(weight.parameter, weight.home) for weight in self.weights):
            raise RuntimeError(_MOVED)

    def copy_to(self, memory: Tensor) -> None:
        """Copies all homes into a slot's memory; on a GPU in the current stream."""
        for home, start in self.homes:
            memory[start : start + home.nbytes].view(home.dtype).copy_(home, non_blocking=True)

    def use(self, slot: int) -> None:
        """Has the parameters be those of a slot, by its number."""
        for weight in self.weights:
            weight.parameter.data = weight.on_device[slot]

    def go_home(self) -> None:
        """Has the parameters be the host's again."""
        for weight in self.weights:
            weight.parameter.data = weight.home


def _events(device: torch.device) -> tuple[Any, Any]:
    if device.type != "cuda":
        return None, None
    return torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def view_like(flat: Tensor, begin: int, like: Tensor) -> Tensor:
    """A view of ``flat`` with the shape of a tensor, and its strides if it has no gaps: kernels choose by them."""
    strides = torch.empty_like(like, device="meta").stride()
    return flat.as_strided(like.shape, strides, flat.storage_offset() + begin)


def _is_at(parameter: nn.Parameter, place: Tensor) -> bool:
    return parameter.data_ptr() == place.data_ptr() and parameter.device == place.device


def _relocate(parameter: nn.Parameter, place: Tensor, device: torch.device) -> None:
    """Has a parameter be ``place``, which holds its weights, and its gradient go to that device too."""
    gradient, parameter.grad = parameter.grad, None
    parameter.data = place
    if gradient is not None:
        parameter.grad = gradient.to(device)
