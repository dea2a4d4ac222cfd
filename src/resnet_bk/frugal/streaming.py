"""Weights that wait in host memory and come to the device one block ahead of their use.

A training step touches the blocks of a deep model one after the other, forth and back. Here all their weights live in
host memory, their *home*, and two slots on the device, each as large as the largest block, take turns: one holds the
block that computes, the other receives the next one meanwhile.

Source: S. Rajbhandari et al., "ZeRO-Infinity" (2021).
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from resnet_bk.frugal.driver import side_stream
from resnet_bk.frugal.host import ALIGNMENT, host_empty, is_host_memory

# A slot's tenant is the backward pass that needs it, by the number of its graph task, or a forward pass, or whoever
# holds its block.
_FORWARD, _HOLDER = -1, -2

_NOT_RECOMPUTED = (
    "backward needs weights of a streamed block that have left the device since its forward: checkpoint the blocks, "
    "each by itself, so that backward computes them again (torch.utils.checkpoint.checkpoint(block, ..., "
    "use_reentrant=False)), or run the model under torch.no_grad()"
)

_MOVED = (
    "parameters of a streamed block were replaced or moved since (by .to(), .half() or load_state_dict(assign=True), "
    "say); call remove(device) of the StreamedBlocks first, then change them, then stream the blocks again"
)

_homes: Any = WeakTensorKeyDictionary()


def weight_home(parameter: nn.Parameter) -> Tensor:
    """Where a parameter's weights are kept: its view of host memory if it is streamed, ``parameter.data`` otherwise.

    An optimizer that updates weights while their block is on the device must write here: what is written to the
    device's copy is lost.
    """
    home: Tensor | None = _homes.get(parameter)
    return parameter.data if home is None else home


def stream_blocks(
    blocks: Sequence[nn.Module], device: torch.device, *, model: nn.Module | None = None
) -> "StreamedBlocks":
    """Moves the blocks' parameters to host memory and has each block fetch them while it runs.

    The blocks are any modules that run one after the other, usually in this order. Buffers go to ``device`` and stay
    there. Nothing else of the model is touched: what is outside the blocks must be on the device already.

    In training each call of a block has to be checkpointed (``torch.utils.checkpoint``), so that backward runs its
    forward again and finds the weights there; the blocks are streamed first and checkpointed then. A backward pass
    without that raises ``RuntimeError``, and so does one with ``create_graph=True``.

    Between passes ``parameter.data`` and ``parameter.grad`` are host tensors, and any optimizer, ``state_dict`` and
    ``load_state_dict`` work on them as they are. A parameter's gradient is in the same host memory in every step. A
    compiled model runs these blocks uncompiled.

    Args:
        blocks: at least one module; each may be skipped or called more than once in a pass.
        device: where the blocks compute. On a CPU the same is done without streams, the slots being ordinary memory.
        model: the module that the blocks are part of; if given, parameters shared with the rest of it are refused.

    Raises:
        ValueError: the blocks cannot be streamed as they are; the message names the mend.
        RuntimeError: the host memory could not be pinned.
    """
    if device.type == "cuda":
        # With its number, as the tensors there have it.
        device = torch.empty(0, device=device).device
    _check_blocks(blocks, model)
    return StreamedBlocks(blocks, device)


class StreamedBlocks:
    """Blocks whose weights come and go; made by ``stream_blocks``.

    Attributes:
        device: where the blocks compute.
        before_load: called with a block before its weights are read from host memory, which can be one block before it
            runs. Whoever writes homes in the background waits here until that block's are complete.

    Whatever happens in a pass, an error or an interrupt too, the blocks are idle when it has ended: parameters are the
    host's, and gradients that had arrived are there.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.device = device
        self.before_load: list[Callable[[nn.Module], None]] = []
        self._blocks = [_Block(block) for block in blocks]
        slot_bytes = max(block.room for block in self._blocks)
        self._slots = [_Slot(slot_bytes, device) for _ in self._blocks[:2]]
        self._recent = self._slots[-1]
        self._copies = side_stream(device)
        if self._copies is not None:
            # The allocator may have handed out memory that the compute stream has yet to finish with, and must not hand
            # it on while a copy into it is under way.
            self._copies.wait_stream(torch.cuda.current_stream(device))
            for slot in self._slots:
                slot.memory.record_stream(self._copies)
        self._gradients = _HostGradients(device)
        self._backwards: set[int] = set()
        self._held: int | None = None
        self._last_forward: int | None = None
        self._came_before: dict[int, int | None] = {}
        try:
            for block in self._blocks:
                block.move_in(self._slots, device)
        except BaseException:
            for block in self._blocks:
                block.move_out(torch.device("cpu"))
            raise
        self._forwards = [_StreamedForward(self, i, block.module.forward) for i, block in enumerate(self._blocks)]
        for block, forward in zip(self._blocks, self._forwards, strict=True):
            block.module.forward = forward

    @property
    def device_bytes(self) -> int:
        """Bytes of weights on the device, whatever the depth."""
        return sum(slot.memory.nbytes for slot in self._slots)

    @property
    def host_bytes(self) -> int:
        """Bytes of weights in host memory, with what aligns them."""
        return sum(home.nbytes for block in self._blocks for home, _ in block.homes)

    @contextmanager
    def holding(self, block: nn.Module, *, then: nn.Module | None = None) -> Iterator[None]:
        """Has one block's weights stay on the device until the end, for any number of passes through this block alone.

        Meanwhile it is an ordinary module there, also for backward; nothing has to be checkpointed. ``then`` is the one
        to be held next, which is fetched ahead. Gradients stay on the device, where they add up, and go to host memory
        at the end, to those that are there.

        Raises:
            RuntimeError: a pass is under way, or a block is held already.
        """
        numbers = {entry.module: number for number, entry in enumerate(self._blocks)}
        self._end_failed_backwards()
        if self._backwards or self._held is not None or any(slot.tenant is not None for slot in self._slots):
            raise RuntimeError("a pass is under way, or a block is held; hold one block at a time, between passes")
        index = numbers[block]
        slot = self._move_in(index, _HOLDER, None if then is None or then is block else numbers[then])
        for weight in self._blocks[index].weights:
            self._gradients.put_aside(weight.parameter)
        self._held = index
        ended_well = False
        try:
            with _uncached_autocast():
                yield
            ended_well = True
        finally:
            self._held = None
            for weight in self._blocks[index].weights:
                self._gradients.take(weight.parameter)
            self._unload(slot, checked=ended_well)
            self._settle()

    def remove(self, device: torch.device) -> None:
        """Makes the blocks ordinary modules again, with parameters, gradients and buffers on ``device``.

        Raises:
            RuntimeError: called from inside a pass.
        """
        self._end_failed_backwards()
        if self._backwards or any(slot.tenant is not None for slot in self._slots):
            raise RuntimeError("a pass is under way; remove streaming when it has ended")
        if self._copies is not None:
            # A block that was fetched ahead, and not used, may still be on its way out of its home.
            self._copies.synchronize()
        for block, forward in zip(self._blocks, self._forwards, strict=True):
            block.move_out(device)
            forward.owner = None
            # Whoever has wrapped it since may still call it.
            if vars(block.module).get("forward") is forward:
                del block.module.forward
        for slot in self._slots:
            slot.forget()
            slot.memory = torch.empty(0, dtype=torch.uint8)

    def _run(self, index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A block's forward with its weights on the device."""
        if self._held is not None:
            if self._held != index:
                raise RuntimeError(f"block {self._held} is held, and block {index} was called; hold the one that runs")
            return self._without_weights(forward(*args, **kwargs))
        task = torch._C._current_graph_task_id()
        recomputes = task != -1 and torch.is_grad_enabled()
        guard = _Guard(self, index)
        slot = None
        ended_well = False
        try:
            slot = self._load(index, task if recomputes else _FORWARD)
            with _uncached_autocast(), guard.watching():
                output = self._without_weights(forward(*args, **kwargs))
            ended_well = True
            return output
        finally:
            guard.runs = False
            # What is recomputed stays until backward has been through the block. A recomputation also ends where
            # it has made all that was needed, by an exception out of the hook that collects it.
            if not (recomputes and (ended_well or guard.outer_stopped)):
                for used in self._slots if slot is None else [slot]:
                    self._unload(used, checked=ended_well)
            self._settle()

    def _load(self, index: int, tenant: int) -> "_Slot":
        """Has the block's parameters be the device's, and begins to fetch the block that comes next."""
        block = self._blocks[index]
        self._end_failed_backwards()
        if tenant != _FORWARD:
            # Backward runs its nodes in the reverse of the order in which forward made them: when it asks for this
            # block, the one before has all its gradients.
            self._watch_backward(tenant)
        for slot in self._slots:
            if slot.holds == index and slot.tenant == tenant != _FORWARD:
                block.use(self._slots.index(slot))
                return slot
        if torch.is_grad_enabled():
            self._install_hooks(block)
        return self._move_in(index, tenant, self._following(index, tenant))

    def _move_in(self, index: int, tenant: int, following: int | None) -> "_Slot":
        """The slot where the block's parameters are from now on; ``following`` is fetched into the other one."""
        block = self._blocks[index]
        for slot in self._slots:
            self._unload(slot, checked=True)
        block.check_at_home()
        slot = self._find(index, tenant) or self._fetch(index, self._other_slot(self._recent))
        for other in self._slots:
            # Fetched ahead, but another block came: by the time of its turn this may be out of date.
            other.is_ahead = False
        self._recent = slot
        slot.occupy(tenant)
        block.use(self._slots.index(slot))
        if following is not None and len(self._slots) > 1 and self._find(following, tenant) is None:
            self._fetch(following, self._other_slot(slot)).is_ahead = True
        return slot

    def _find(self, index: int, tenant: int) -> "_Slot | None":
        """The slot that holds the block as it is at home.

        Backward also takes what the forward pass has left: these are the weights that it was computed with.
        """
        for slot in self._slots:
            may_use = slot.is_ahead or tenant not in (_FORWARD, _HOLDER)
            if slot.holds == index and may_use and slot.versions == self._blocks[index].versions():
                return slot
        return None

    def _fetch(self, index: int, slot: "_Slot") -> "_Slot":
        """Begins to copy the block's home into a slot."""
        block = self._blocks[index]
        slot.forget()
        for wait in self.before_load:
            wait(block.module)
        slot.versions = block.versions()
        if self._copies is None:
            block.copy_to(slot.memory)
        else:
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(slot.unused)
                block.copy_to(slot.memory)
                slot.copied.record(self._copies)
        slot.holds = index
        return slot

    def _other_slot(self, slot: "_Slot") -> "_Slot":
        return next((other for other in self._slots if other is not slot), slot)

    def _following(self, index: int, tenant: int) -> int | None:
        """The block that probably runs next."""
        if tenant != _FORWARD:
            return self._came_before.get(index)
        last, self._last_forward = self._last_forward, index
        self._came_before[index] = last if last is not None and last < index else None
        return index + 1 if index + 1 < len(self._blocks) else None

    def _unload(self, slot: "_Slot", *, checked: bool = False) -> None:
        """Ends the use of a slot: the block's parameters are the host's again."""
        if slot.tenant is None or slot.holds is None:
            return
        block = self._blocks[slot.holds]
        # Once a block is idle nobody reads its home, and everybody may write it. The device is at least one block
        # behind and does not run dry meanwhile.
        slot.vacate()
        block.go_home()
        if checked and slot.versions[: len(block.weights)] != block.versions()[: len(block.weights)]:
            slot.forget()
            raise RuntimeError(
                "parameters of a streamed block were changed in place while on the device, and the change is lost; "
                "write to weight_home(parameter)"
            )

    def _watch_backward(self, task: int) -> None:
        """Has this backward pass, by the number of its graph task, tell when it ends."""
        if task not in self._backwards:
            self._backwards.add(task)
            end = _OnceAtLast(functools.partial(self._backward_ended, task))
            torch.autograd.Variable._execution_engine.queue_callback(end)

    def _end_failed_backwards(self) -> None:
        # With a GPU autograd has threads of its own, where what remains of a failed pass may be dropped a little late.
        if torch._C._current_graph_task_id() == -1:
            for task in list(self._backwards):
                self._backward_ended(task, in_order=False)

    def _backward_ended(self, task: int, *, in_order: bool) -> None:
        try:
            self._backwards.remove(task)
        except KeyError:
            return
        try:
            for slot in self._slots:
                if slot.tenant == task:
                    self._unload(slot, checked=in_order)
        finally:
            if not in_order:
                self._gradients.take_what_is_left(
                    weight.parameter for block in self._blocks for weight in block.weights
                )
            if not self._backwards:
                self._last_forward = None
                for slot in self._slots:
                    if slot.tenant is None:
                        slot.forget()
            self._settle()

    def _settle(self) -> None:
        """Gives gradients their place in ``parameter.grad``, if all parameters are the host's."""
        if not self._backwards and all(slot.tenant is None for slot in self._slots):
            self._gradients.settle()

    def _install_hooks(self, block: "_Block") -> None:
        """Has gradients of the block leave the device as they are made."""
        for weight in block.weights:
            if not weight.parameter.requires_grad:
                continue
            owner = weakref.ref(self)
            if not weight.hooks:
                put_aside = functools.partial(_put_aside, owner, weakref.ref(weight))
                weight.hooks = [weight.parameter.register_hook(put_aside)]  # type: ignore[no-untyped-call]
            # Registered again to be the last: an optimizer's hooks see the gradient on the device.
            for hook in weight.hooks[1:]:
                hook.remove()
            take = functools.partial(_take_gradient, owner)
            weight.hooks[1:] = [weight.parameter.register_post_accumulate_grad_hook(take)]  # type: ignore[no-untyped-call]

    def _slot_of(self, tensor: Tensor) -> "_Slot | None":
        if tensor.layout is not torch.strided:
            return None
        storage = tensor.untyped_storage()._cdata
        return next((slot for slot in self._slots if slot.storage == storage), None)

    def _without_weights(self, output: Any) -> Any:
        """A block's output; what is a weight, or a view of one, is copied, as the slot will be another block's."""
        if not any(isinstance(leaf, Tensor) and self._slot_of(leaf) for leaf in tree_iter(output)):
            return output
        return tree_map_only(Tensor, lambda x: x.clone() if self._slot_of(x) else x, output)


class _StreamedForward:
    """A streamed block's ``forward``, which also runs where somebody wraps it or calls it again in backward."""

    def __init__(self, owner: StreamedBlocks, index: int, inner: Callable[..., Any]) -> None:
        functools.update_wrapper(self, inner)
        self.owner: StreamedBlocks | None = owner
        self.index = index
        self.inner = inner

    @torch.compiler.disable(reason="weights of a streamed block come and go unseen by a compiler")  # type: ignore[untyped-decorator, no-untyped-call]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.owner is None:
            return self.inner(*args, **kwargs)
        return self.owner._run(self.index, self.inner, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # copy.deepcopy comes here too. A copy would share this module's slots and be half in host memory.
        if self.owner is None:
            return super().__reduce_ex__(protocol)
        raise RuntimeError(
            "a model with streamed blocks cannot be copied or pickled; call remove(device) of its StreamedBlocks "
            "first, or build another model and give it this one's state_dict()"
        )


class _Guard:
    """Looks after what autograd keeps of one run of a block.

    Hooks on saved tensors replace those around them. A checkpoint works by such hooks, so these hand everything on to
    the ones that they cover.
    """

    def __init__(self, owner: StreamedBlocks, index: int) -> None:
        self.owner, self.index = owner, index
        self.outer_stopped = False
        self.runs = True
        self._outer: Any = None

    def watching(self) -> AbstractContextManager[None]:
        self._outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        if self._outer is None:
            return tensor.detach()  # the tensor itself could be a result, and keep its own graph alive
        try:
            return self._outer[0](tensor)
        except BaseException:
            self.outer_stopped = True
            raise

    def _unpack(self, packed: Any) -> Tensor:
        tensor: Tensor = packed if self._outer is None else self._outer[1](packed)
        slot = self.owner._slot_of(tensor)
        if slot is not None and (slot.tenant is None or slot.holds != self.index):
            raise RuntimeError(_NOT_RECOMPUTED)
        if slot is not None and not self.runs and torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled():
            # The graph of the derivative keeps the weights where nobody looks after them.
            raise RuntimeError(
                "streamed blocks have no second derivatives; leave out create_graph=True, or call remove(device) of "
                "the StreamedBlocks first"
            )
        return tensor


class _OnceAtLast:
    """Runs an action when autograd calls it at the end of a backward pass, or drops it because of an error."""

    def __init__(self, action: Callable[..., None]) -> None:
        self._action: Callable[..., None] | None = action

    def __call__(self, *, in_order: bool = True) -> None:
        action, self._action = self._action, None
        if action is not None:
            action(in_order=in_order)

    def __del__(self) -> None:
        self(in_order=False)


class _Slot:
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
class _Weight:
    """A parameter, its home, and where it is in each slot."""

    parameter: nn.Parameter
    home: Tensor
    on_device: list[Tensor] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)


class _Block:
    """A module and the places of its parameters, in host memory and in the slots."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.weights: list[_Weight] = []
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
    def move_in(self, slots: Sequence[_Slot], device: torch.device) -> None:
        """Takes the parameters to their homes and the buffers to the device."""
        for dtype, (start, num_bytes, places) in self._places.items():
            flat = host_empty(num_bytes // dtype.itemsize, dtype=dtype)
            self.homes.append((flat, start))
            rooms = [slot.memory[start : start + num_bytes].view(dtype) for slot in slots]
            for parameter, begin in places:
                home = _view_like(flat, begin // dtype.itemsize, parameter).copy_(parameter)
                weight = _Weight(parameter, home, [_view_like(room, begin // dtype.itemsize, home) for room in rooms])
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
        for home, start in self.homes:
            memory[start : start + home.nbytes].view(home.dtype).copy_(home, non_blocking=True)

    def use(self, slot: int) -> None:
        """Has the parameters be those of a slot, by its number."""
        for weight in self.weights:
            weight.parameter.data = weight.on_device[slot]

    def go_home(self) -> None:
        for weight in self.weights:
            weight.parameter.data = weight.home


class _HostGradients:
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
            place = self._memory[parameter] = _view_like(flat, 0, parameter)
        return place

    def _landing_for(self, gradient: Tensor) -> Tensor:
        landing = self._landing.get(gradient.dtype)
        if landing is None or landing.numel() < gradient.numel():
            landing = self._landing[gradient.dtype] = host_empty(gradient.numel(), dtype=gradient.dtype)
        return landing[: gradient.numel()].view(gradient.shape)


def _put_aside(owner: "weakref.ref[StreamedBlocks]", weight: "weakref.ref[_Weight]", _gradient: Tensor) -> None:
    streamed, streamed_weight = owner(), weight()
    task = torch._C._current_graph_task_id()
    if streamed is not None and streamed_weight is not None and task != -1 and streamed._held is None:
        streamed._watch_backward(task)
        streamed._gradients.put_aside(streamed_weight.parameter)


def _take_gradient(owner: "weakref.ref[StreamedBlocks]", parameter: nn.Parameter) -> None:
    streamed = owner()
    if streamed is not None and streamed._held is None:
        streamed._gradients.take(parameter)


@contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Autocast keeps the casts of a weight by its identity: of weights that come and go they would be out of date."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _events(device: torch.device) -> tuple[Any, Any]:
    if device.type != "cuda":
        return None, None
    return torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _view_like(flat: Tensor, begin: int, like: Tensor) -> Tensor:
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


def _check_blocks(blocks: Sequence[nn.Module], model: nn.Module | None) -> None:
    if not blocks:
        raise ValueError("there is no block to stream; give at least one module")
    owners: dict[int, int] = {}
    memory: dict[int, nn.Parameter] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            _check_parameter(f"{name} of block {index}", parameter)
        if "forward" in vars(block):
            raise ValueError(
                f"the forward of block {index} has been replaced already; stream the blocks first, then checkpoint or "
                "wrap them, once"
            )
        for name, parameter in block.named_parameters():
            if owners.setdefault(id(parameter), index) != index:
                raise ValueError(
                    f"{name} belongs to blocks {owners[id(parameter)]} and {index}, and only one block is on the "
                    "device at a time; untie it, or put both into one block"
                )
            if parameter.numel() and memory.setdefault(parameter.data_ptr(), parameter) is not parameter:
                raise ValueError(
                    f"{name} of block {index} shares its memory with another parameter; make both the same "
                    "nn.Parameter in one block, or clone one"
                )
    if model is not None:
        _check_outside(blocks, model, owners)


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if parameter in _homes:
        raise ValueError(f"{name} is streamed already; call remove(device) of its StreamedBlocks first")
    if type(parameter.data) is not Tensor or parameter.layout is not torch.strided or parameter.is_meta:
        raise ValueError(f"{name} is not an ordinary dense tensor with values; only those can be streamed")


def _check_outside(blocks: Sequence[nn.Module], model: nn.Module, owners: dict[int, int]) -> None:
    inside = {id(module) for block in blocks for module in block.modules()}
    for path, module in model.named_modules(prefix="model"):
        if id(module) in inside:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in owners:
                raise ValueError(
                    f"{path}.{name} is also a parameter of block {owners[id(parameter)]}, which may be in host memory "
                    "when it is used outside; untie it, or leave that block out"
                )
