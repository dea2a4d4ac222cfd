"""What the machine does at best, how its caches are emptied, and what a GPU's driver says of clocks and heat."""

import contextlib
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from resnet_bk.bench.subject import synchronizer
from resnet_bk.schema import GpuSample, Peaks
from resnet_bk.training.config import Precision
from resnet_bk.training.micro_step import AUTOCAST_DTYPES

# Where the system does not tell how large its last cache is; more than an H100's 50 MB and a B200's 126 MB.
CPU_CACHE_BYTES, GPU_CACHE_BYTES = 64 * 2**20, 256 * 2**20
LARGEST_FLUSH = 2**30
PRODUCT_WIDTHS = {"cuda": (4096, 8192), "cpu": (512, 1024, 2048)}
PRODUCT_REPEATS, COPY_REPEATS = 8, 5
LONG_PRODUCT_SECONDS = 0.2  # the next width takes eight times as long
# Of the reasons that the driver gives: nothing to do, and clocks that someone has set.
HARMLESS_REASONS = 0x1 | 0x2
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # older drivers know the second
DRIVER_PATIENCE = 10.0


def measure_peaks(device: torch.device, precision: Precision) -> Peaks:
    """Of matrix products in the precision's type, the width that does best, and of a copy larger than any cache.

    Each is the median of a few runs after one: the quickest would be the clock's mistake where it makes one.
    """
    dtype = AUTOCAST_DTYPES.get(precision, torch.float32)
    best = 0.0
    for width in PRODUCT_WIDTHS["cuda" if device.type == "cuda" else "cpu"]:
        left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
        seconds = _typical(_product(left, right), device, PRODUCT_REPEATS)
        best = max(best, 2 * width**3 / seconds)
        if seconds > LONG_PRODUCT_SECONDS:
            break
    source = torch.ones(2 * cache_bytes(device), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _typical(lambda: target.copy_(source), device, COPY_REPEATS)
    return Peaks(flops=best, copy_bandwidth=2 * source.numel() / seconds)


def cache_bytes(device: torch.device) -> int:
    """At least as much as the last cache before memory holds."""
    if device.type == "cuda":
        return GPU_CACHE_BYTES
    sizes = [CPU_CACHE_BYTES]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text(encoding="ascii").strip().removesuffix("K")) * 1024)
    return min(max(sizes), LARGEST_FLUSH)


class CacheFlush:
    """Puts other bytes where a model's were."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.zeros(2 * cache_bytes(device), dtype=torch.uint8, device=device)
        self._synchronize = synchronizer(device)

    def __call__(self) -> None:
        """Writes more than the last cache holds, and waits for it."""
        self._buffer.add_(1)
        self._synchronize()


class GpuWatch:
    """Samples what ``nvidia-smi`` tells of the GPU; nothing where there is none, or where it does not tell."""

    def __init__(self, device: torch.device) -> None:
        self._identity = _identity(device)
        self._began = time.perf_counter()
        self.samples: list[GpuSample] = []

    def sample(self) -> None:
        """Now. A driver that does not answer leaves no sample."""
        if self._identity is None:
            return
        for reasons in REASONS:
            answer = _ask(self._identity, reasons)
            if answer is not None:
                self.samples += parse_answer(answer, time.perf_counter() - self._began)
                return


def parse_answer(answer: str, seconds: float) -> list[GpuSample]:
    """One sample from a line of clock, temperature, power and reasons for a lower clock; none from anything else."""
    fields = [field.strip() for field in answer.strip().split("\n")[0].split(",")]
    if len(fields) != 4:
        return []
    clock, temperature, power = (_number(field) for field in fields[:3])
    if clock is None or temperature is None:
        return []
    try:
        reasons = int(fields[3], 16)
    except ValueError:
        reasons = 0
    return [
        GpuSample(
            seconds=seconds,
            sm_clock_mhz=clock,
            temperature=temperature,
            power_watts=power,
            throttled=bool(reasons & ~HARMLESS_REASONS),
        )
    ]


def _product(left: torch.Tensor, right: torch.Tensor) -> Callable[[], object]:
    return lambda: left @ right


def _typical(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    synchronize = synchronizer(device)
    samples = []
    for _ in range(1 + repeats):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        samples.append(time.perf_counter() - began)
    return statistics.median(samples[1:])


def _identity(device: torch.device) -> str | None:
    """The GPU as the driver names it; the number that torch gives it would be another where some are hidden."""
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if uuid is None else f"GPU-{uuid}"


def _ask(identity: str, reasons: str) -> str | None:
    query = f"--query-gpu=clocks.sm,temperature.gpu,power.draw,{reasons}"
    command = ["nvidia-smi", f"--id={identity}", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DRIVER_PATIENCE, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 and done.stdout.strip() else None


def _number(field: str) -> float | None:
    try:
        return float(field)
    except ValueError:
        return None
