"""Planning for any ``nn.Module``: what a training step of it takes, in the ways that this library can train it."""

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from resnet_bk.frugal.checkpointing import checkpoint_blocks
from resnet_bk.frugal.optimizer import OffloadedAdamW
from resnet_bk.frugal.precision import half_weights
from resnet_bk.imagined import is_imagined
from resnet_bk.memory.plan import Budget
from resnet_bk.memory.strategy import Strategy
from resnet_bk.planner.devices import Device, device_named
from resnet_bk.planner.footprint import Footprint, footprint
from resnet_bk.planner.predict import TIMING, kept_by_malloc
from resnet_bk.planner.trace import TracedPart, trace_step

ModelFunction = Callable[[], nn.Module]
OptimizerFunction = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
LossFunction = Callable[[nn.Module, Any], Tensor]

CPU = torch.device("cpu")
# From the fastest on.
WAYS = (
    Strategy(name="fp32"),
    Strategy(name="mixed precision", half=True),
    Strategy(name="full checkpointing", half=True, checkpointing="full"),
    Strategy(name="offloaded optimizer", half=True, checkpointing="full", offload_optimizer=True, half_weights=True),
)


@dataclass(frozen=True, kw_only=True)
class ModulePrediction:
    """What one way of training takes: see ``Prediction``.

    ``missing_bytes`` is by how much it exceeds the budget, of the two memories the one that misses more: 0 or less if
    it fits, None without a budget.
    """

    strategy: Strategy
    footprint: Footprint
    parts: list[TracedPart]
    gpu_bytes: int
    host_bytes: int
    missing_bytes: int | None

    @property
    def fits(self) -> bool | None:
        """Whether it fits what budget there is; None without a budget."""
        return None if self.missing_bytes is None else self.missing_bytes <= 0


@dataclass(frozen=True, kw_only=True)
class ModulePlan:
    """Parameters, and each way of training from the fastest on."""

    device: Device
    parameters: int
    predictions: list[ModulePrediction]

    @property
    def fastest_that_fits(self) -> ModulePrediction | None:
        """The first that fits the budget, if any does."""
        return next((prediction for prediction in self.predictions if prediction.fits), None)


def plan(
    model_fn: ModelFunction,
    batch: Any,
    optimizer: OptimizerFunction | None = None,
    budget: Budget | None = None,
    *,
    device: Device | str = "auto",
    loss: LossFunction | None = None,
    blocks: Callable[[nn.Module], Sequence[nn.Module]] | None = None,
    half_type: torch.dtype | None = None,
) -> ModulePlan:
    """What training a model will need, before any of it is allocated.

    >>> import torch
    >>> def model():
    ...     return torch.nn.Sequential(torch.nn.Linear(1000, 4000), torch.nn.ReLU(), torch.nn.Linear(4000, 10))
    >>> found = plan(model, torch.empty(64, 1000, device="meta"), device="cpu", loss=lambda model, x: model(x).mean())
    >>> found.parameters
    4044010
    >>> found.predictions[0].footprint.tensor_bytes > 16 * found.parameters
    True

    Args:
        model_fn: makes the model, on the CPU and in float32. It is called with fake tensors: nothing is allocated.
        batch: what the loss takes: a tensor, or any structure of tensors and other things. Only shapes and types count;
            tensors on the device ``meta`` will do.
        optimizer: makes the optimizer of parameters; fused AdamW if None. The way that keeps it on the host always has
            ``OffloadedAdamW``.
        budget: what there is; None asks for no verdict.
        device: a machine, or the name of one: ``auto``, ``cpu``, ``h100`` and so on.
        loss: ``loss(model, batch)``; None calls the model with the batch, which must be a mapping then, and takes
            ``.loss`` of what it returns, as models of transformers have it.
        blocks: the model's blocks, for the ways that compute blocks again; None leaves these ways out, but for models
            of transformers, which know their own.
        half_type: what mixed precision computes in; None for bfloat16, or float16 where there is none.

    Raises:
        ValueError: an argument is of another kind, or what ``model_fn`` or ``loss`` return.
        Whatever ``model_fn`` or ``loss`` raise; an operator without an implementation for fake tensors raises
        ``NotImplementedError`` of torch's.
    """
    _check(model_fn, budget, half_type)
    machine = device_named(device) if isinstance(device, str) else device
    job = Job.of(model_fn, batch, optimizer, device=machine, loss=loss, blocks=blocks, half_type=half_type)
    ways = [way for way in WAYS if way.checkpointing == "none" or job.has_blocks()]
    predictions = [predict_way(job, way, machine, budget or Budget()) for way in ways]
    return ModulePlan(device=machine, parameters=job.parameters(), predictions=predictions)


def _check(model_fn: object, budget: object, half_type: torch.dtype | None) -> None:
    if isinstance(model_fn, nn.Module) or not callable(model_fn):
        raise ValueError("model_fn makes the model: give a function, as lambda: MyModel(), and not a model")
    if not isinstance(budget, Budget | None):
        raise ValueError(f"budget is {budget!r}; give Budget(gpu_bytes=4 * 10**9), or Budget.parse('4GB', None)")
    if half_type not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"half_type is {half_type}; choose torch.bfloat16 or torch.float16")


@dataclass(frozen=True)
class Job:
    """A model and a batch, and how to train the one on the other: see ``plan``."""

    model_fn: ModelFunction
    batch: Any
    optimizer: OptimizerFunction
    loss: LossFunction
    blocks: Callable[[nn.Module], Sequence[nn.Module]]
    half_type: torch.dtype

    @classmethod
    def of(
        cls,
        model_fn: ModelFunction,
        batch: Any,
        optimizer: OptimizerFunction | None = None,
        *,
        device: Device,
        loss: LossFunction | None = None,
        blocks: Callable[[nn.Module], Sequence[nn.Module]] | None = None,
        half_type: torch.dtype | None = None,
    ) -> "Job":
        """With what is taken where nothing is said."""
        half = half_type or (torch.bfloat16 if device.has_bf16 else torch.float16)
        return cls(model_fn, batch, optimizer or _adamw, loss or _own_loss, blocks or _own_blocks, half)

    def model(self) -> nn.Module:
        made = self.model_fn()
        if not isinstance(made, nn.Module):
            raise ValueError(f"model_fn made a {type(made).__name__}; it has to return an nn.Module")
        return made

    def has_blocks(self) -> bool:
        with torch.device("meta"):
            return bool(self.blocks(self.model()))

    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.model().parameters())

    def prepared(
        self, strategy: Strategy, device: torch.device = CPU
    ) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], object], list[Tensor]]:
        """As ``trace_step`` wants it, called with fake tensors; or really, on ``device``."""
        model = self.model().train()
        optimizer: torch.optim.Optimizer
        if strategy.offload_optimizer:
            optimizer = OffloadedAdamW(list(model.parameters()), device=device)
        if strategy.half_weights:
            half_weights(model, self.half_type)
        if device != CPU:
            model.to(device)
        if strategy.checkpointing != "none":
            checkpoint_blocks(list(self.blocks(model)), "full")
        if not strategy.offload_optimizer:
            optimizer = self.optimizer(list(model.parameters()))
        tensors: dict[int, Tensor] = {}
        batch = _on(self.batch, device, tensors)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            autocast = torch.autocast(device.type, dtype=self.half_type, enabled=strategy.half, cache_enabled=False)
            with autocast, _masks_as_ever():
                loss = _checked_loss(self.loss(model, batch))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
            optimizer.step()

        return model, optimizer, step, list(tensors.values())


def predict_way(job: Job, strategy: Strategy, device: Device, budget: Budget | None = None) -> ModulePrediction:
    """What one way of training takes."""
    budget = budget or Budget()
    trace = trace_step(lambda: job.prepared(strategy), device.machine)
    found, on_gpu = footprint(trace), device.machine.kind == "cuda"
    gpu_bytes = device.context_bytes + int((1 + TIMING) * found.most_reserved_bytes) if on_gpu else 0
    made_here = 0 if strategy.offload_optimizer or not on_gpu else 4 * job.parameters()
    masters_and_gradients = 16 * job.parameters() if strategy.offload_optimizer else 0
    on_cpu = 0 if on_gpu else trace.peak_bytes + kept_by_malloc(trace.peak_bytes)
    host_bytes = device.process_bytes + masters_and_gradients + made_here + on_cpu
    has_budget = budget.gpu_bytes is not None or budget.host_bytes is not None
    missing = budget.missing(gpu_bytes if on_gpu else found.tensor_bytes, host_bytes)
    return ModulePrediction(
        strategy=strategy,
        footprint=found,
        parts=trace.parts(),
        gpu_bytes=gpu_bytes,
        host_bytes=host_bytes,
        missing_bytes=missing if has_budget else None,
    )


@contextmanager
def _masks_as_ever() -> Iterator[None]:
    """Has transformers look at fake tensors' masks as at real ones: for what is traced it makes masks of all pairs."""
    masking: Any = importlib.import_module("transformers.masking_utils")
    before = getattr(masking, "is_tracing", None)
    if before is None or not is_imagined():
        yield
        return
    masking.is_tracing = lambda *_: False
    try:
        yield
    finally:
        masking.is_tracing = before


def _adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True)


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise TypeError("without a loss the batch must be a mapping of the model's arguments; give loss=")
    loss: Tensor | None = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError("what the model returns has no loss; have labels in the batch, or give loss=")
    return loss


def _checked_loss(loss: object) -> Tensor:
    if not isinstance(loss, Tensor):
        raise ValueError(f"the loss is a {type(loss).__name__}; it has to be a tensor of one number")
    if loss.numel() != 1:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}; it has to be one number, as of .mean()")
    return loss


def _own_blocks(model: nn.Module) -> Sequence[nn.Module]:
    """The layers of a model of transformers: its longest list of modules whose class it names as not to be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    of_blocks = [blocks for blocks in lists if type(blocks[0]).__name__ in names]
    return max((list(blocks) for blocks in of_blocks), key=len, default=[])


def _on(value: Any, device: torch.device, known: dict[int, Tensor]) -> Any:
    """The same structure with tensors on the device, of zeros: only shapes and types count. What is the same tensor in
    several places stays so; ``known`` has them all, by the given one's identity."""
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = torch.zeros(value.shape, dtype=value.dtype, device=device)
        return known[id(value)]
    if isinstance(value, Mapping):
        return {name: _on(inner, device, known) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        inner = [_on(each, device, known) for each in value]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)  # the former is a namedtuple
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: _on(getattr(value, each.name), device, known) for each in fields(value)})
    return value
