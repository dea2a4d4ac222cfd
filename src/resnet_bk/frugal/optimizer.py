"""AdamW on the host: master weights, moments and the update, for weights on a device."""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from resnet_bk.frugal.adamw import AdamWSettings, update
from resnet_bk.frugal.gradients import Courier, HostGradient
from resnet_bk.frugal.homes import written_by
from resnet_bk.frugal.host import host_arena, host_empty
from resnet_bk.frugal.host_slot import HostSlot, host_gradient, take_over
from resnet_bk.frugal.local import like_dtensor, local_tensor

# What a group of torch's AdamW has besides, so that either loads the other's state and then does the same.
AS_TORCHS = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": True,
    "decoupled_weight_decay": True,
}


class OffloadedAdamW(torch.optim.Optimizer):
    """torch's fused AdamW, with everything but the weights themselves in host memory.

    The masters are the weights in float32; the weights on the device are the masters rounded to their type. A gradient
    leaves the device when backward has made it. For float32 weights on a CPU every step equals
    ``torch.optim.AdamW(fused=True)`` bit for bit, and ``clip_grad_norm_``, ``GradScaler``, schedulers, gradient
    accumulation and parameter groups work as with that.

    ``step`` returns when the weights have their new values, but for those inside ``blocks``: they return while the next
    forward pass runs, each block waiting for its own. ``with optimizer.updating_in_backward():`` around the last
    backward pass of a step updates each weight as soon as its gradient is there: faster, but nothing may then change
    gradients between backward and step, neither clipping nor a loss scale.

    ``has_begun`` says whether that has updated any since it was entered last.

    Masters follow a weight that was changed in place from outside (``load_state_dict``, say), at the next step; not one
    that was changed through ``.data``, which torch does not count as a change. Between ``step`` and the next forward
    pass call ``synchronize`` before weights inside ``blocks`` are read or changed by hand (``copy.deepcopy`` reads
    them); their modules' ``state_dict`` and ``load_state_dict`` do it themselves. A frozen parameter gets its master
    and moments when it is first trained. Where another one is made for the same parameters, it takes them over.

    Args:
        params: parameters or groups, on their device (or streamed: the update then goes to their home in host memory).
        lr, betas, eps, weight_decay: of every group that does not say otherwise.
        moments_dtype: ``torch.float32``, or ``torch.bfloat16`` with stochastic rounding: half the memory.
        blocks: modules whose parameters nobody uses but through their forward, in the order in which they run.
        device: where gradients come from, if not where the parameters are now.
        seed: of the stochastic rounding.

    Raises:
        ValueError: a value does not fit.
        RuntimeError: from ``step``, another one has taken the parameters over; or from whoever waits for them, weights
            inside ``blocks`` were changed while their update was on its way.

    Source: J. Ren et al., "ZeRO-Offload" (2021).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        moments_dtype: torch.dtype = torch.float32,
        blocks: Iterable[nn.Module] = (),
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        _check(lr, betas, eps, weight_decay, moments_dtype)
        self._moments_dtype, self._seed = moments_dtype, seed
        self._courier = None if device is None else Courier(torch.device(device))
        self._slots: dict[nn.Parameter, HostSlot] = {}
        self._places: dict[nn.Parameter, tuple[weakref.ref[nn.Module], int]] = {}
        self._in_backward = self.has_begun = False
        self._held: set[nn.Parameter] = set()
        self._squares: list[float] = []
        for turn, block in enumerate(blocks, start=1):
            place = weakref.ref(block), turn
            self._places.update((parameter, place) for parameter in block.parameters())
            before_use = partial(_before_use, weakref.ref(self), place[0])
            block.register_forward_pre_hook(before_use)
            for module in block.modules():
                module.register_state_dict_pre_hook(before_use)  # type: ignore[no-untyped-call]
                module.register_load_state_dict_pre_hook(before_use)  # type: ignore[no-untyped-call]
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **AS_TORCHS})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group's masters and moments are allocated."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_group(group)
        self._begin([parameter for parameter in group["params"] if parameter.requires_grad], group)

    def _begin(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Allocates what belongs to parameters, which are trained from now on."""
        for parameter in parameters:
            if not parameter.is_floating_point() or not local_tensor(parameter).is_contiguous():
                raise ValueError("OffloadedAdamW takes contiguous parameters of floating-point types")
        if parameters and self._courier is None:
            self._courier = Courier(parameters[0].device)
        # Nothing on the device reads these, so that they need not be pinned.
        shapes = [local_tensor(parameter).shape for parameter in parameters]
        masters = host_arena(shapes, torch.float32, pinned=False)
        first, second = (host_arena(shapes, self._moments_dtype, pinned=False) for _ in range(2))
        for parameter, master, exp_avg, exp_avg_sq in zip(parameters, masters, first, second, strict=True):
            take_over(parameter)
            block, turn = self._places.get(parameter, (None, 0))
            self._slots[parameter] = slot = HostSlot(
                parameter=parameter,
                group=group,
                index=len(self._slots),
                master=master.copy_(local_tensor(parameter.detach())),
                exp_avg=exp_avg.zero_(),
                exp_avg_sq=exp_avg_sq.zero_(),
                step=torch.zeros(()),
                version=parameter._version,
                block=block,
                turn=turn,
            )
            is_trained = parameter.requires_grad  # of what is frozen, torch takes no hooks
            parameter.requires_grad_(True)
            parameter.grad_dtype = None  # sums are float32, whatever the weights are
            take = partial(_take, weakref.ref(self))
            slot.hook = parameter.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
            parameter.requires_grad_(is_trained)
            written_by(parameter, slot)

    @contextmanager
    def updating_in_backward(self) -> Iterator[None]:
        """Around a step's last backward pass: each weight is updated as soon as its gradient is there.

        ``step`` must follow; it does what is left.
        """
        self._in_backward, self.has_begun = True, False
        self._squares = []
        try:
            yield
        finally:
            self._in_backward = False

    @contextmanager
    def holding(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Around several backward passes: the gradients of ``parameters`` stay on the device and leave it at the end.

        They are summed there in float32, as they would be on the host, and cross once.
        """
        held = [parameter for parameter in parameters if parameter in self._slots]
        self._held.update(held)
        try:
            yield
        finally:
            self._held.difference_update(held)
        for parameter in held:
            if parameter.grad is not None:
                self._taken(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._begin_thawed()
        slots = [slot for slot in self._slots.values() if slot.parameter.grad is not None]
        if any(slot.is_taken_over for slot in slots):
            raise RuntimeError(
                "another OffloadedAdamW was made for these parameters since, and updates them; use that one, or make "
                "this one anew"
            )
        for slot in slots:
            if host_gradient(slot.parameter) is None:  # assigned by hand
                self._take(slot)
        # The worker takes these in order: first what step waits for, then what the next forward pass needs first.
        for slot in sorted(slots, key=lambda slot: slot.turn):
            self._update(slot)
        for slot in self._slots.values():
            if slot.block is None:
                slot.arrive()
        return loss

    def _begin_thawed(self) -> None:
        for group in self.param_groups:
            thawed = [
                parameter
                for parameter in group["params"]
                if parameter.grad is not None and parameter.requires_grad and parameter not in self._slots
            ]
            if thawed:
                self._begin(thawed, group)

    def norm_in_backward(self) -> float:
        """Norm of the gradients by which ``updating_in_backward`` has updated last; waits for these updates."""
        if self._courier is not None:
            self._courier.wait()
        return math.sqrt(sum(self._squares))

    def synchronize(self, block: nn.Module | None = None) -> None:
        """Returns when the weights of ``block``, or all, have the values of the last step."""
        for slot in self._slots.values():
            if block is None or (slot.block is not None and slot.block() is block):
                slot.arrive()

    @torch.no_grad()
    def master(self, parameter: nn.Parameter) -> Tensor:
        """The float32 weights of a parameter, in host memory; of its local piece, where it is sharded."""
        slot = self._slots[parameter]
        slot.follow()
        return slot.master

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """As torch's AdamW has it, with a ``master`` where the weights are not float32 themselves."""
        for parameter, slot in self._slots.items():
            slot.follow()
            if slot.step:
                self.state[parameter] = slot.state()
        try:
            return super().state_dict()
        finally:
            self.state.clear()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of this class or of torch's AdamW.

        The model's may be loaded before or after it. Masters that are then not the weights, when these are rounded to
        the weights' type, become the weights.

        Raises:
            ValueError: it is the state of another optimizer or of other parameters; nothing has changed then.
        """
        self.synchronize()
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if len(saved) == len(parameters):  # torch says what is wrong otherwise
            _check_saved(state_dict, dict(zip(saved, parameters, strict=True)))
        super().load_state_dict({**state_dict, "state": {}})
        groups = [group for group in self.param_groups for _ in group["params"]]
        for group in self.param_groups:
            _check_group(group)
        for index, parameter, group in zip(saved, parameters, groups, strict=True):
            if index in state_dict["state"] and parameter not in self._slots:
                self._begin([parameter], group)  # it was trained, and is frozen now
            if parameter in self._slots:
                self._slots[parameter].group = group  # torch has replaced them
                self._slots[parameter].load(state_dict["state"].get(index, {}))

    @torch.no_grad()
    def _taken(self, parameter: nn.Parameter) -> None:
        """After each pass that has made a gradient, or added to it."""
        slot = self._slots[parameter]
        if parameter in self._held:
            if parameter.grad is not None and host_gradient(parameter) is None:
                parameter.grad = parameter.grad.float()
        elif host_gradient(parameter) is None:
            self._take(slot)
        elif self._in_backward:
            # Accumulated from earlier passes: this one was the last.
            self._update(slot)
            parameter.grad = None

    def _take(self, slot: HostSlot) -> None:
        """Sends a gradient that is on the device to the host; a ``HostGradient`` takes its place."""
        assert self._courier is not None and slot.parameter.grad is not None
        gradient = local_tensor(slot.parameter.grad)
        if self._in_backward:
            # Nobody will ask for it: it needs no place but the one where it lands.
            slot.parameter.grad = slot.gradient = None
            self._update(slot, gradient)
            return
        if slot.gradient is None:
            slot.gradient = host_empty(*slot.master.shape, dtype=torch.float32, pinned=False)
        self._courier.bring(gradient, slot.gradient.copy_)
        receive = partial(self._add, slot)
        wrapper: Tensor = HostGradient(slot.gradient, gradient.device, receive=receive, wait=self._courier.wait)
        if isinstance(slot.parameter.grad, DTensor):
            wrapper = like_dtensor(wrapper, slot.parameter.grad)
        slot.parameter.grad = wrapper

    def _add(self, slot: HostSlot, gradient: Tensor) -> None:
        assert self._courier is not None and slot.gradient is not None
        self._courier.bring(gradient, slot.gradient.add_)

    def _update(self, slot: HostSlot, gradient: Tensor | None = None) -> None:
        """Has the worker update a parameter: by ``gradient``, which is on the device, or by what is on the host."""
        assert self._courier is not None
        self.has_begun |= self._in_backward
        slot.follow()
        squares = self._squares if self._in_backward else None
        work = partial(self._updated, slot, _settings(slot.group), self._courier.moment(), squares)
        if gradient is not None:
            slot.future = self._courier.bring(gradient, work)
        else:
            assert slot.gradient is not None
            slot.future = self._courier.do(partial(work, slot.gradient))

    def _updated(
        self, slot: HostSlot, settings: AdamWSettings, after: Any, squares: list[float] | None, gradient: Tensor
    ) -> None:
        assert self._courier is not None
        with torch.no_grad():
            if squares is not None:
                squares.append(float(torch.linalg.vector_norm(gradient, dtype=torch.float32)) ** 2)
            seed = (self._seed, slot.index, int(slot.step))
            update(slot.master, gradient, slot.exp_avg, slot.exp_avg_sq, slot.step, settings, seed=seed)
            slot.event = self._courier.send(slot.master, slot.weights(), after)


def _take(reference: "weakref.ref[OffloadedAdamW]", parameter: nn.Parameter) -> None:
    optimizer = reference()
    if optimizer is not None:
        optimizer._taken(parameter)


def _before_use(reference: "weakref.ref[OffloadedAdamW]", block: "weakref.ref[nn.Module]", *_: Any) -> None:
    optimizer = reference()
    if optimizer is not None:
        optimizer.synchronize(block())


def _settings(group: dict[str, Any]) -> AdamWSettings:
    beta1, beta2 = group["betas"]
    return AdamWSettings(
        lr=float(group["lr"]), beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"]
    )


def _check_saved(state_dict: dict[str, Any], parameters: dict[int, nn.Parameter]) -> None:
    for group in state_dict["param_groups"]:
        if lacking := [name for name in ("lr", "betas", "eps", "weight_decay") if name not in group]:
            raise ValueError(f"the state is of another optimizer: it has no {', '.join(lacking)}; give one of AdamW's")
    for index, state in state_dict["state"].items():
        expected = local_tensor(parameters[index]).shape
        for name in ("exp_avg", "exp_avg_sq", "master"):
            if name in state and (found := local_tensor(state[name]).shape) != expected:
                raise ValueError(
                    f"{name} of parameter {index} has shape {tuple(found)} in the state, and the parameter "
                    f"{tuple(expected)}; give the state of the same model"
                )


def _check_group(group: dict[str, Any]) -> None:
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"OffloadedAdamW has no {name}; leave it False")


def _check(lr: float, betas: tuple[float, float], eps: float, weight_decay: float, moments_dtype: torch.dtype) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name} is {value}; give 0 or more")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are {betas}; give two numbers from 0 to below 1")
    if moments_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"moments_dtype is {moments_dtype}; choose torch.float32 or torch.bfloat16")
