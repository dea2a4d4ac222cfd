"""Holding a process to a memory budget: what the driver takes, and what the allocator may."""

import torch

from resnet_bk.training.config import Precision

# What the driver loads kernels into while the first steps run: 176 MB on an H100 (benchmarks/frugal_gpu.py).
KERNELS_BYTES = 200_000_000
# Other programs on the same card are not our context.
LARGEST_CONTEXT = 1_000_000_000


def hold_to_budget(gpu_bytes: int, device: torch.device) -> None:
    """Has torch's allocator refuse what would exceed the budget; the refusal is an out-of-memory error.

    Its segments are such that grow from here on: those of fixed sizes waste more.
    """
    if device.type == "cuda":
        hold_allocator_to(gpu_bytes - drivers_bytes(device), device)


def hold_allocator_to(num_bytes: int, device: torch.device) -> None:
    """Has torch's allocator refuse more than this; its segments grow from here on, whatever was before."""
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    share = num_bytes / torch.cuda.get_device_properties(device).total_memory
    number = torch.cuda.current_device() if device.index is None else device.index  # torch wants one here
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)), number)


def drivers_bytes(device: torch.device) -> int:
    """What the driver takes of a card for this process, kernels yet to be loaded included; 0 without a GPU."""
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
