"""Weights that wait in host memory and come to the device one block ahead of their use.

A training step touches the blocks of a deep model one after the other, forth and back. Here all their weights live in
host memory, their *home*, and two slots on the device, each as large as the largest block, take turns: one holds the
block that computes, the other receives the next one meanwhile.

Source: S. Rajbhandari et al., "ZeRO-Infinity" (2021).
"""

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only

from resnet_bk.frugal.driver import side_stream
from resnet_bk.frugal.home_gradients import HomeGradients
from resnet_bk.frugal.homes import Slot, StreamedBlock, StreamedWeight, has_home, writer_of

# A slot's tenant is the backward pass that needs it, by the number of its graph task, or a forward pass, or whoever
# holds its block.
_FORWARD, _HOLDER = -1, -2

_NOT_RECOMPUTED = (
    "backward needs weights of a streamed block that have left the device since its forward: checkpoint the blocks, "
    "each by itself, so that backward computes them again (torch.utils.checkpoint.checkpoint(block, ..., "
    "use_reentrant=False)), or run the model under torch.no_grad()"
)


def stream_blocks(
    blocks: Sequence[nn.Module], device: torch.device | str, *, model: nn.Module | None = None
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
    device = torch.device(device)
    if device.type == "cuda":
        # With its number, as the tensors there have it.
        device = torch.empty(0, device=device).device
    _check_blocks(blocks, model)
    return StreamedBlocks(blocks, device)


class StreamedBlocks:
    """Blocks whose weights come and go; made by ``stream_blocks``.

    Attributes:
        device: where the blocks compute.

    A block's weights are read from host memory when it runs, or one block before; whoever writes them in the background
    is waited for then (``homes.written_by``, as ``OffloadedAdamW`` does it).

    Whatever happens in a pass, an error or an interrupt too, the blocks are idle when it has ended: parameters are the
    host's, and gradients that had arrived are there.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.device = device
        self._blocks = [StreamedBlock(block) for block in blocks]
        slot_bytes = max(block.room for block in self._blocks)
        self._slots = [Slot(slot_bytes, device) for _ in self._blocks[:2]]
        self._recent = self._slots[-1]
        self._copies = side_stream(device)
        if self._copies is not None:
            # The allocator may have handed out memory that the compute stream has yet to finish with, and must not hand
            # it on while a copy into it is under way.
            self._copies.wait_stream(torch.cuda.current_stream(device))
            for slot in self._slots:
                slot.memory.record_stream(self._copies)
        self._gradients = HomeGradients(device)
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

    def _load(self, index: int, tenant: int) -> Slot:
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

    def _move_in(self, index: int, tenant: int, following: int | None) -> Slot:
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

    def _find(self, index: int, tenant: int) -> Slot | None:
        """The slot that holds the block as it is at home.

        Backward also takes what the forward pass has left: these are the weights that it was computed with.
        """
        for slot in self._slots:
            may_use = slot.is_ahead or tenant not in (_FORWARD, _HOLDER)
            if slot.holds == index and may_use and slot.versions == self._blocks[index].versions():
                return slot
        return None

    def _fetch(self, index: int, slot: Slot) -> Slot:
        """Begins to copy the block's home into a slot."""
        block = self._blocks[index]
        slot.forget()
        for weight in block.weights:
            writer = writer_of(weight.parameter)
            if writer is not None:
                writer.arrive()
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

    def _other_slot(self, slot: Slot) -> Slot:
        return next((other for other in self._slots if other is not slot), slot)

    def _following(self, index: int, tenant: int) -> int | None:
        """The block that probably runs next."""
        if tenant != _FORWARD:
            return self._came_before.get(index)
        last, self._last_forward = self._last_forward, index
        self._came_before[index] = last if last is not None and last < index else None
        return index + 1 if index + 1 < len(self._blocks) else None

    def _unload(self, slot: Slot, *, checked: bool = False) -> None:
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

    def _install_hooks(self, block: StreamedBlock) -> None:
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

    def _slot_of(self, tensor: Tensor) -> Slot | None:
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


def _put_aside(owner: "weakref.ref[StreamedBlocks]", weight: "weakref.ref[StreamedWeight]", _gradient: Tensor) -> None:
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
    if has_home(parameter):
        raise ValueError(f"{name} is streamed already; call remove(device) of its StreamedBlocks first")
    if type(parameter.data) is not Tensor or parameter.layout is not torch.strided or parameter.is_meta:
        raise ValueError(f"{name} is not an ordinary dense tensor with values; only those can be streamed")


def _check_outside(blocks: Sequence[nn.Module], model: nn.Module, owners: dict[int, int]) -> None:
    roots = {id(block) for block in blocks}

    def outside(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        yield path, module
        for name, child in module.named_children():
            if id(child) not in roots:
                yield from outside(f"{path}.{name}", child)

    # Not named_modules, which comes to a module once: one that is outside may be inside of a block, too.
    for path, module in outside("model", model):
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in owners:
                raise ValueError(
                    f"{path}.{name} is also a parameter of block {owners[id(parameter)]}, which may be in host memory "
                    "when it is used outside; untie it, or leave that block out"
                )
