"""Training under a memory budget: which strategy, in what pieces, and holding it to that."""

from collections.abc import Collection, Iterator
from dataclasses import replace

import torch

from resnet_bk.errors import UserError
from resnet_bk.memory.parameters import count_parameters
from resnet_bk.memory.plan import Budget, StrategyPlan, plan_strategy
from resnet_bk.memory.strategy import STRATEGIES, Strategy
from resnet_bk.memory.units import format_bytes
from resnet_bk.models import ResNetBKConfig
from resnet_bk.training.config import Precision, TrainingConfig
from resnet_bk.training.strategy import training_fields, training_shape

# What the allocator's segments hold beyond their tensors, as a share of these.
FRAGMENTATION = 0.05
# With fewer tokens at once a GPU waits for its next kernel.
BUSY_TOKENS = 2048
# What the driver loads kernels into while the first steps run: 176 MB on an H100 (benchmarks/frugal_gpu.py).
KERNELS_BYTES = 200_000_000
# Other programs on the same card are not our context.
LARGEST_CONTEXT = 1_000_000_000


def choose_strategy(
    model: ResNetBKConfig,
    training: TrainingConfig,
    budget: Budget,
    device: torch.device,
    *,
    fixed: Collection[str] = (),
) -> TrainingConfig:
    """The fastest strategy that fits the budget, with the largest micro-batches that do.

    Smaller micro-batches cost less time than the next strategy, until a GPU is no longer busy with one. ``fixed`` names
    fields of ``training`` that stay as they are.

    Raises:
        UserError: nothing fits; the message says by how much.
    """
    counts, half_type = count_parameters(model), half_type_of(device)
    usable = usable_budget(budget, device)
    closest: tuple[int, StrategyPlan, int] | None = None
    for strategy, rows in _candidates(training, device, fixed):
        fields = training_fields(strategy, half_type)
        if any(name in fixed and fields[name] != getattr(training, name) for name in fields):
            continue
        shape = training_shape(training, rows)
        plan = plan_strategy(strategy, model, shape, counts, Budget())
        missing = _missing(plan, usable, device)
        if missing <= 0:
            return replace(training, **fields, micro_batch_size=rows if rows < training.batch_size else None)
        if closest is None or missing < closest[0]:
            closest = missing, plan, rows
    if closest is None:
        raise UserError("no strategy has the flags that were given; leave some of them out")
    missing, plan, rows = closest
    sequences = "one sequence" if rows == 1 else f"{rows} sequences"
    raise UserError(
        f"nothing fits: {plan.strategy.name} with {sequences} at a time comes closest and misses by "
        f"{format_bytes(missing)}; take a larger budget, a shorter --sequence-length or a smaller model"
    )


def _missing(plan: StrategyPlan, budget: Budget, device: torch.device) -> int:
    """Bytes by which a plan exceeds the budget; without a GPU there are no libraries and copies of its own."""
    on_device = plan.gpu_bytes if device.type == "cuda" else plan.tensor_bytes
    needs = ((on_device, budget.gpu_bytes), (plan.host_bytes, budget.host_bytes))
    return max((need - room for need, room in needs if room is not None), default=0)


def usable_budget(budget: Budget, device: torch.device) -> Budget:
    """What tensors may take: without what the driver takes for this process, and what segments waste."""
    if budget.gpu_bytes is None:
        return budget
    for_tensors = budget.gpu_bytes - _drivers_bytes(device)
    return replace(budget, gpu_bytes=int(for_tensors / (1 + FRAGMENTATION)))


def hold_to_budget(gpu_bytes: int, device: torch.device) -> None:
    """Has torch's allocator refuse what would exceed the budget; the refusal is an out-of-memory error.

    Its segments are such that grow from here on: those of fixed sizes waste more.
    """
    if device.type == "cuda":
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
        total = torch.cuda.get_device_properties(device).total_memory
        share = (gpu_bytes - _drivers_bytes(device)) / total
        number = torch.cuda.current_device() if device.index is None else device.index  # torch wants one here
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)), number)


def _drivers_bytes(device: torch.device) -> int:
    context = context_bytes(device)
    return context + KERNELS_BYTES if context else 0


def context_bytes(device: torch.device) -> int:
    """What the driver has given to this process besides tensors; 0 without a GPU."""
    if device.type != "cuda":
        return 0
    # The context is made at the first use, and cuBLAS's part of it at the first product.
    ones = torch.ones(64, 64, device=device)
    ones @ ones
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return min(LARGEST_CONTEXT, total - free - torch.cuda.memory_reserved(device))


def half_type_of(device: torch.device) -> Precision:
    """bf16 where the device computes in it, else fp16."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return "bf16"


def _candidates(
    training: TrainingConfig, device: torch.device, fixed: Collection[str]
) -> Iterator[tuple[Strategy, int]]:
    """Strategies with rows of a micro-batch, the fastest first."""
    strategies = list(_strategies(device, in_fp32="precision" in fixed and training.precision == "fp32"))
    sizes = _micro_batches(training, fixed)
    busy = [rows for rows in sizes if rows * training.sequence_length >= BUSY_TOKENS] or sizes[:1]
    for rest in (busy, [rows for rows in sizes if rows not in busy]):
        pairs = [(strategy, rows) for strategy in strategies for rows in rest]
        # Where every micro-batch's gradients cross to the host, the host adds them up for longer than a GPU computes.
        crossing = [pair for pair in pairs if _crosses_often(*pair, training)]
        yield from (pair for pair in pairs if pair not in crossing)
        yield from crossing


def _crosses_often(strategy: Strategy, rows: int, training: TrainingConfig) -> bool:
    return (
        strategy.offload_optimizer and not strategy.goes_by_block and training_shape(training, rows).micro_batches > 1
    )


def _strategies(device: torch.device, *, in_fp32: bool) -> Iterator[Strategy]:
    for strategy in STRATEGIES:
        if device.type == "cuda" and not (strategy.half or in_fp32):
            continue  # slower there, and larger
        chosen = replace(strategy, half=False, half_weights=False) if in_fp32 else strategy
        yield chosen
        if chosen.offload_optimizer:
            yield replace(chosen, name=f"{chosen.name}, moments in bf16", half_moments=True)


def _micro_batches(training: TrainingConfig, fixed: Collection[str]) -> list[int]:
    if "micro_batch_size" in fixed and training.micro_batch_size is not None:
        return [min(training.micro_batch_size, training.batch_size)]
    sizes, pieces = [training.batch_size], 2
    while sizes[-1] > 1:
        for number in (pieces, pieces * 3 // 2):  # 2, 3, 4, 6, 8, 12, ...
            rows = -(-training.batch_size // number)
            if rows < sizes[-1]:
                sizes.append(rows)
        pieces *= 2
    return sizes
