"""What a machine really does, measured once and kept: rates, the driver's context, the process itself."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from resnet_bk.errors import UserError
from resnet_bk.files import make_directory, read_json, write_json
from resnet_bk.frugal.adamw import AdamWSettings, update
from resnet_bk.frugal.host import host_empty
from resnet_bk.training.budget import drivers_bytes
from resnet_bk.training.data.dataset import cache_directory

FILE, VERSION = "calibration.json", 1
REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Of one device: see ``Rates`` and ``Device``."""

    half_flops: float
    single_flops: float
    memory: float
    bus: float
    host_updates: float
    context_bytes: int
    process_bytes: int


def calibrate(device: torch.device, half: torch.dtype) -> Calibration:
    """Measures; some seconds."""
    on_gpu = device.type == "cuda"
    width, copied = (8192, 2**29) if on_gpu else (1024, 2**27)
    return Calibration(
        half_flops=_product_rate(device, half, width),
        single_flops=_product_rate(device, torch.float32, width),
        memory=_copy_rate(device, copied),
        bus=_bus_rate(device, copied // 2) if on_gpu else _copy_rate(device, copied),
        host_updates=_update_rate(2**24),
        context_bytes=drivers_bytes(device),
        process_bytes=psutil.Process().memory_info().rss,
    )


def save_calibration(name: str, calibration: Calibration) -> Path:
    """Keeps it under the device's name, beside those of other devices; a file that cannot be read gives way."""
    path = _path()
    make_directory(path.parent)
    try:
        devices = _stored()
    except UserError:
        devices = {}
    write_json(path, {"version": VERSION, "devices": devices | {name: asdict(calibration)}})
    return path


def calibration_of(name: str) -> Calibration | None:
    """What was measured on a device of this name; None if nothing was.

    Raises:
        UserError: the file is damaged.
    """
    found = _stored().get(name)
    if found is None:
        return None
    try:
        calibration = Calibration(**found)
        if all(0 < value < math.inf for key, value in asdict(calibration).items() if key != "context_bytes"):
            return calibration
    except TypeError:
        pass
    raise _unusable("damaged")


def _path() -> Path:
    return cache_directory() / FILE


def _unusable(what: str) -> UserError:
    return UserError(f"{_path()} is {what}; run `resnet-bk env --calibrate` again, or remove it")


def _stored() -> dict[str, Any]:
    if not _path().exists():
        return {}
    try:
        document = read_json(_path())
    except UserError:
        raise _unusable("damaged") from None
    if (
        not isinstance(document, dict)
        or document.get("version") != VERSION
        or not isinstance(document.get("devices"), dict)
    ):
        raise _unusable("of another version")
    devices: dict[str, Any] = document["devices"]
    return devices


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of a few runs, after one."""
    samples = []
    for _ in range(REPEATS + 1):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        samples.append(time.perf_counter() - began)
    return statistics.median(samples[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _product_rate(device: torch.device, dtype: torch.dtype, width: int) -> float:
    a = torch.ones(width, width, dtype=dtype, device=device)
    return 2 * width**3 / _seconds(lambda: a @ a, device)


def _copy_rate(device: torch.device, num_bytes: int) -> float:
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _seconds(lambda: target.copy_(source), device)


def _bus_rate(device: torch.device, num_bytes: int) -> float:
    """The slower of both ways."""
    here, there = host_empty(num_bytes, dtype=torch.uint8), torch.empty(num_bytes, dtype=torch.uint8, device=device)
    down = _seconds(lambda: here.copy_(there, non_blocking=True), device)
    up = _seconds(lambda: there.copy_(here, non_blocking=True), device)
    return num_bytes / max(up, down)


def _update_rate(numel: int) -> float:
    weights, gradient, first, second = (torch.zeros(numel) for _ in range(4))
    settings = AdamWSettings(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    step = torch.zeros(())
    seconds = _seconds(lambda: update(weights, gradient, first, second, step, settings), torch.device("cpu"))
    return numel / seconds
