"""Holding a process to a memory budget: what the driver takes, and what the allocator may."""

import ctypes
import os

import torch

from resnet_bk.frugal.driver import nvidia_driver
from resnet_bk.training.config import Precision

# What the driver takes while the first steps run, for kernels and graphs: up to 74 MB on an H100
# (benchmarks/results/gpu/frugal.json; rows before commit 5a2483a have 73 MB of torch's streams besides), beside what
# cuBLAS asks it for in each thread that multiplies matrices. One has done so when the context is measured; backward is
# another.
KERNELS_BYTES = 77_000_000
LARGE_CUBLAS_BYTES, SMALL_CUBLAS_BYTES = 2**26, 8_519_680
# What cuBLAS, and torch for it, take on cards before compute capability 9. From there on it is several times as much.
SMALL_WORKSPACES = ":4096:2:16:8"
WORKSPACES = "CUBLAS_WORKSPACE_CONFIG"
# The driver sets a stack aside for each thread that the card can hold at once, of so many bytes unless told otherwise.
# The small ones do for all kernels of a training step on an H100 (benchmarks/results/gpu/frugal.json); for one that
# needs more than there is, the driver enlarges all of them. Source: CUDA's driver API, cuCtxSetLimit.
USUAL_STACK, SMALL_STACK, STACK_LIMIT = 1024, 320, 0
# Other programs on the same card are not our context.
LARGEST_CONTEXT = 1_000_000_000


def hold_to_budget(gpu_bytes: int, device: torch.device, *, alone: bool = True) -> None:
    """Has torch's allocator refuse what would exceed the budget; the refusal is an out-of-memory error.

    Its segments are such that grow from here on: those of fixed sizes waste more. A process that is ``alone`` has the
    driver set aside less for stacks, and cuBLAS take small workspaces, unless the environment says which; in one of
    several, NCCL's kernels need the stacks, and may wait for each other while they are enlarged. It has to come before
    the first product on the device: cuBLAS keeps the workspaces that it has.
    """
    if device.type == "cuda":
        if alone:
            os.environ.setdefault(WORKSPACES, SMALL_WORKSPACES)
            _give_back_stacks(device)
        hold_allocator_to(gpu_bytes - drivers_bytes(device), device)


def hold_allocator_to(num_bytes: int, device: torch.device) -> None:
    """Has torch's allocator refuse more than this; its segments grow from here on, whatever was before."""
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    share = num_bytes / torch.cuda.get_device_properties(device).total_memory
    number = torch.cuda.current_device() if device.index is None else device.index  # torch wants one here
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)), number)


def _give_back_stacks(device: torch.device) -> None:
    """Where it fails, what is taken stays taken and is counted with the context. What a user enlarged stays so too."""
    driver = nvidia_driver()
    if driver is None:
        return
    torch.ones((), device=device)  # a context, of which the limits are
    with torch.cuda.device(device):
        stack = ctypes.c_size_t()
        if driver.cuCtxGetLimit(ctypes.byref(stack), STACK_LIMIT) == 0 and stack.value == USUAL_STACK:
            driver.cuCtxSetLimit(STACK_LIMIT, ctypes.c_size_t(SMALL_STACK))


def given_back_bytes(capability: tuple[int, int], multiprocessors: int, threads_of_each: int) -> int:
    """What a card's driver has for other processes if one, alone, is held to a budget: of stacks, and of cuBLAS."""
    stacks = multiprocessors * threads_of_each * (USUAL_STACK - SMALL_STACK)
    return stacks + 2 * (_cublas_bytes(capability, small=False) - SMALL_CUBLAS_BYTES)


def has_small_workspaces() -> bool:
    """Whether cuBLAS takes those of ``hold_to_budget`` in this process."""
    return os.environ.get(WORKSPACES) == SMALL_WORKSPACES


def _cublas_bytes(capability: tuple[int, int], *, small: bool) -> int:
    return SMALL_CUBLAS_BYTES if small or capability < (9, 0) else LARGE_CUBLAS_BYTES


def drivers_bytes(device: torch.device) -> int:
    """What the driver takes of a card for this process, kernels yet to be loaded included; 0 without a GPU."""
    context = context_bytes(device)
    if not context:
        return 0
    capability = torch.cuda.get_device_capability(device)
    return context + KERNELS_BYTES + _cublas_bytes(capability, small=has_small_workspaces())


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
