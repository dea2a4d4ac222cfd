"""What is asked of NVIDIA's driver directly, because torch does not."""

import ctypes
import sys
from collections import defaultdict

import torch

# Of one device, at most. Torch's own pools have 32 of each priority.
MOST_STREAMS = 8
NON_BLOCKING = 1

_made: dict[int, list[torch.cuda.Stream]] = defaultdict(list)
_given: dict[int, int] = defaultdict(int)


def nvidia_driver() -> ctypes.CDLL | None:
    """None with ROCm, and where it cannot be loaded."""
    if torch.version.cuda is None:
        return None
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for what goes on beside the computation; None on a CPU.

    The first one that is asked of torch makes a whole pool, for which the driver takes 73 MB of an H100. These are made
    one by one, and handed out again from the ninth on.
    """
    if device.type != "cuda":
        return None
    number = torch.cuda.current_device() if device.index is None else device.index
    made = _made[number]
    if len(made) < MOST_STREAMS:
        made.append(_new_stream(torch.device("cuda", number)))
    _given[number] += 1
    return made[(_given[number] - 1) % MOST_STREAMS]


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    driver, stream = nvidia_driver(), ctypes.c_void_p()
    torch.cuda.synchronize(device)  # a context, of which the stream is
    with torch.cuda.device(device):
        if driver is None or driver.cuStreamCreate(ctypes.byref(stream), NON_BLOCKING) != 0 or stream.value is None:
            return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return torch.cuda.ExternalStream(stream.value, device)  # type: ignore[no-untyped-call]
