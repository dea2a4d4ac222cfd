"""Machines that people train on, as a planner needs to know them."""

from dataclasses import dataclass, fields, replace

import psutil
import torch

from resnet_bk.errors import UserError
from resnet_bk.imagined import Machine
from resnet_bk.memory.plan import PROCESS_BYTES
from resnet_bk.planner.calibration import calibration_of
from resnet_bk.training.budget import drivers_bytes, given_back_bytes, has_small_workspaces

GB, GIB = 10**9, 2**30
FIRST_WITH_BF16 = (8, 0)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a machine is, per second: FLOPs of products, bytes, and parameters that AdamW updates on the host.

    ``memory`` is the bandwidth of a copy within the device (bytes read and written), ``bus`` that between host and
    device, one way.
    """

    half_flops: float
    single_flops: float
    memory: float
    bus: float
    host_updates: float


@dataclass(frozen=True, kw_only=True)
class Device:
    """A card and its host. ``context_bytes`` is what the driver takes of the card beside torch's allocator: the context
    and the kernels that are loaded; ``given_back_bytes`` of it are those that a process alone does without if it is
    held to a budget, and ``small_workspaces`` whether cuBLAS's are as small as they are then. ``process_bytes`` is a
    training process on the host without its tensors. ``link`` is what a card sends to others of its host while it
    receives as much, in bytes a second: NVLink's as its maker states it, or else that of the bus. It was not measured
    here.
    """

    name: str
    machine: Machine
    memory_bytes: int
    host_bytes: int | None
    context_bytes: int
    given_back_bytes: int = 0
    small_workspaces: bool = False
    process_bytes: int
    rates: Rates
    link: float

    def held_to_a_budget(self) -> "Device":
        """As a process sees it that ``train --gpu-memory`` holds to a budget."""
        if self.machine.kind != "cuda":
            return self
        left = self.context_bytes - self.given_back_bytes
        return replace(self, context_bytes=left, given_back_bytes=0, small_workspaces=True)

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bfloat16."""
        return self.machine.kind == "cpu" or self.machine.capability >= FIRST_WITH_BF16


# Python, torch, transformers, numba, without CUDA's libraries (benchmarks/process_memory.py).
CPU_PROCESS_BYTES = 700_000_000
# On an H100 0.72 GB as soon as cuBLAS is used, and up to 0.14 GB of kernels and of cuBLAS in the thread of backward
# (benchmarks/results/gpu/frugal.json). What smaller cards take was not measured here: `resnet-bk env --calibrate`
# measures it.
CONTEXT_BYTES = 862_000_000
# What NCCL takes of a card for its buffers, beside torch's allocator: 0.89 GB of each of two H100s, measured by
# benchmarks/sharded.py (benchmarks/results/gpu/sharded.json). Of more than two it was not measured.
NCCL_BYTES = 900_000_000
# Threads that a multiprocessor holds at once, where it is not 2,048. Source: CUDA's programming guide.
THREADS = {(7, 5): 1024, (8, 6): 1536, (8, 9): 1536, (12, 0): 1536}
# AdamW on sixteen cores beside an H100 updated some 1.05 billion parameters a second (the same file, 1b at 16,384
# tokens): that is what their memory gives, at 30 bytes a parameter. Fewer cores are taken to be slower where those of
# the CPU below, all busy, would be.
HOST_UPDATES = 1.05e9


# A machine without a GPU, in rates of a core: two of an AMD EPYC do 150 GFLOPs and copy 20 GB a second.
CORE = Rates(half_flops=60e9, single_flops=75e9, memory=10e9, bus=10e9, host_updates=0.3e9)


def _card(  # one row of a table
    name: str,
    gibibytes: float,
    capability: tuple[int, int],
    half_teraflops: float,
    single_teraflops: float,
    gigabytes_a_second: float,
    bus: float,
    *,
    multiprocessors: int,
    cores: int = 8,
    host_bytes: int | None = None,
    nvlink: float | None = None,
) -> Device:
    """Peak rates as the maker states them (dense), taken at 80%, and memory as the driver gives it."""
    share = 0.8
    return Device(
        name=name,
        machine=Machine(kind="cuda", capability=capability, multiprocessors=multiprocessors),
        memory_bytes=int(gibibytes * GIB),
        host_bytes=host_bytes,
        context_bytes=CONTEXT_BYTES,
        given_back_bytes=given_back_bytes(capability, multiprocessors, THREADS.get(capability, 2048)),
        process_bytes=PROCESS_BYTES,
        rates=Rates(
            half_flops=share * half_teraflops * 1e12,
            single_flops=share * single_teraflops * 1e12,
            memory=share * gigabytes_a_second * 1e9,
            bus=bus * 1e9,
            host_updates=min(HOST_UPDATES, cores * CORE.host_updates),
        ),
        link=share * nvlink * 1e9 if nvlink else bus * 1e9,
    )


# Sources: NVIDIA's data sheets for rates (NVLink: half of what they state, which is both ways together); memory as
# `torch.cuda.get_device_properties` tells it, or the nominal size less 3% where nobody here has seen it. Colab's free
# machine: about 15 GB on the card, 12.7 GB and 2 cores on the host.
DEVICES = {
    device.name: device
    for device in (
        _card("colab-t4", 14.74, (7, 5), 65, 8.1, 320, 6, multiprocessors=40, cores=2, host_bytes=int(12.7 * GB)),
        _card("t4", 14.74, (7, 5), 65, 8.1, 320, 11, multiprocessors=40),
        _card("gtx-1080ti", 10.9, (6, 1), 11, 11, 484, 11, multiprocessors=28),
        _card("rtx-2060", 5.8, (7, 5), 26, 6.5, 336, 11, multiprocessors=30),
        _card("rtx-2080ti", 10.75, (7, 5), 54, 13.4, 616, 11, multiprocessors=68),
        _card("rtx-3060", 11.75, (8, 6), 25, 12.7, 360, 22, multiprocessors=28),
        _card("rtx-3070", 7.75, (8, 6), 41, 20.3, 448, 22, multiprocessors=46),
        _card("rtx-3080", 9.75, (8, 6), 60, 29.8, 760, 22, multiprocessors=68),
        _card("rtx-3090", 23.7, (8, 6), 71, 35.6, 936, 22, multiprocessors=82),
        _card("rtx-4060", 7.75, (8, 9), 60, 15.1, 272, 12, multiprocessors=24),
        _card("rtx-4070", 11.7, (8, 9), 117, 29.1, 504, 22, multiprocessors=46),
        _card("rtx-4080", 15.7, (8, 9), 195, 48.7, 717, 22, multiprocessors=76),
        _card("rtx-4090", 23.6, (8, 9), 165, 82.6, 1008, 22, multiprocessors=128),
        _card("rtx-5090", 31.4, (12, 0), 209, 104.8, 1792, 45, multiprocessors=170),
        _card("v100-16gb", 15.77, (7, 0), 125, 15.7, 900, 11, multiprocessors=80),
        _card("v100-32gb", 31.74, (7, 0), 125, 15.7, 900, 11, multiprocessors=80),
        _card("l4", 22.0, (8, 9), 121, 30.3, 300, 22, multiprocessors=58),
        _card("a10g", 22.05, (8, 6), 70, 31.2, 600, 22, multiprocessors=80),
        _card("l40s", 44.4, (8, 9), 362, 91.6, 864, 22, multiprocessors=142, cores=16),
        _card("a100-40gb", 39.4, (8, 0), 312, 19.5, 1555, 22, multiprocessors=108, cores=12, nvlink=300),
        _card("a100-80gb", 79.1, (8, 0), 312, 19.5, 2039, 22, multiprocessors=108, cores=12, nvlink=300),
        _card("h100", 79.18, (9, 0), 989, 67, 3350, 55, multiprocessors=132, cores=16, nvlink=450),
        _card("h200", 139.8, (9, 0), 989, 67, 4800, 55, multiprocessors=132, cores=16, nvlink=450),
    )
}


def device_named(name: str) -> Device:
    """A card of the table, ``cpu``, or ``auto`` for what this machine has.

    Raises:
        UserError: it is none of them.
    """
    if name == "cpu":
        return this_cpu()
    if name == "auto":
        return this_gpu() if torch.cuda.is_available() else this_cpu()
    if name not in DEVICES:
        raise UserError(f"device {name!r} is not known; choose auto, cpu or one of {', '.join(sorted(DEVICES))}")
    return DEVICES[name]


def device_for(device: torch.device) -> Device:
    """What torch's device is, and what the driver has taken of it already for this process."""
    if device.type != "cuda":
        return this_cpu()
    return replace(
        this_gpu(device),
        context_bytes=drivers_bytes(device),
        given_back_bytes=0,
        small_workspaces=has_small_workspaces(),
    )


def name_of(device: torch.device) -> str:
    """By which what was measured on a device of this machine is kept."""
    return "cpu" if device.type != "cuda" else str(torch.cuda.get_device_properties(device).name)


def _calibrated(device: Device) -> Device:
    """With what was measured on this machine, if it was."""
    measured = calibration_of(device.name)
    if measured is None:
        return device
    rates = Rates(**{field.name: getattr(measured, field.name) for field in fields(Rates)})
    # The process that measured had not yet trained.
    process_bytes = max(device.process_bytes, measured.process_bytes)
    return replace(device, rates=rates, context_bytes=measured.context_bytes, process_bytes=process_bytes)


def this_cpu() -> Device:
    """This machine without a GPU: all memory is the host's."""
    cores = torch.get_num_threads()
    memory = psutil.virtual_memory().total
    return _calibrated(
        Device(
            name="cpu",
            machine=Machine(kind="cpu"),
            memory_bytes=memory,
            host_bytes=memory,
            context_bytes=0,
            process_bytes=CPU_PROCESS_BYTES,
            rates=Rates(
                half_flops=cores * CORE.half_flops,
                single_flops=cores * CORE.single_flops,
                memory=cores * CORE.memory,
                bus=cores * CORE.bus,
                host_updates=cores * CORE.host_updates,
            ),
            link=cores * CORE.bus,
        )
    )


def this_gpu(device: torch.device | None = None) -> Device:
    """A card at hand: its memory and capability as the driver tells them, its rates from the nearest in the table."""
    device = device or torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    nearest = _nearest(properties.name, capability, properties.total_memory)
    return _calibrated(
        replace(
            nearest,
            name=name_of(device),
            machine=Machine(kind="cuda", capability=capability, multiprocessors=properties.multi_processor_count),
            memory_bytes=properties.total_memory,
            given_back_bytes=given_back_bytes(
                capability, properties.multi_processor_count, properties.max_threads_per_multi_processor
            ),
            host_bytes=psutil.virtual_memory().total,
        )
    )


def _nearest(name: str, capability: tuple[int, int], memory_bytes: int) -> Device:
    """By name, else by capability and memory."""
    plain = name.lower().replace(" ", "-")
    for key in sorted(DEVICES, key=len, reverse=True):
        if key in plain or key.split("-")[0] in plain.split("-"):
            return DEVICES[key]

    def distance(device: Device) -> tuple[int, int]:
        major, minor = device.machine.capability
        return abs(10 * major + minor - 10 * capability[0] - capability[1]), abs(device.memory_bytes - memory_bytes)

    return min(DEVICES.values(), key=distance)
