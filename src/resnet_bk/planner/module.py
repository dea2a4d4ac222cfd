"""Planning for any ``nn.Module``: what a training step of it takes, in the ways that this library can train it."""

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

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
    """What one way of training takes: see ``Prediction``."""

    strategy: Strategy
    footprint: Footprint
    parts: list[TracedPart]
    gpu_bytes: int
    host_bytes: int
    fits: bool | None


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
        ValueError: an argument is of another kind.
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

    def has_blocks(self) -> bool:
        with torch.device("meta"):
            return bool(self.blocks(self.model_fn()))

    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.model_fn().parameters())

    def prepared(
        self, strategy: Strategy, device: torch.device = CPU
    ) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], object], list[Tensor]]:
        """As ``trace_step`` wants it, called with fake tensors; or really, on ``device``."""
        model = self.model_fn().train()
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
        batch = _on(self.batch, device)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            autocast = torch.autocast(device.type, dtype=self.half_type, enabled=strategy.half, cache_enabled=False)
            with autocast, _masks_as_ever():
                loss = self.loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
            optimizer.step()

        return model, optimizer, step, _tensors_of(batch)


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
    fits = budget.missing(gpu_bytes if on_gpu else found.tensor_bytes, host_bytes) <= 0
    return ModulePrediction(
        strategy=strategy,
        footprint=found,
        parts=trace.parts(),
        gpu_bytes=gpu_bytes,
        host_bytes=host_bytes,
        fits=fits if has_budget else None,
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
    loss: Tensor = model(**batch).loss
    return loss


def _own_blocks(model: nn.Module) -> Sequence[nn.Module]:
    """The layers of a model of transformers: its longest list of modules whose class it names as not to be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    of_blocks = [blocks for blocks in lists if type(blocks[0]).__name__ in names]
    return max((list(blocks) for blocks in of_blocks), key=len, default=[])


def _on(value: Any, device: torch.device) -> Any:
    """The same structure with tensors on the device, of zeros: only shapes and types count."""
    if isinstance(value, Tensor):
        return torch.zeros(value.shape, dtype=value.dtype, device=device)
    if isinstance(value, Mapping):
        known: dict[int, Any] = {}
        return {name: known.setdefault(id(inner), _on(inner, device)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on(inner, device) for inner in value)
    return value


def _tensors_of(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(value) if isinstance(leaf, Tensor)]
