"""Bytes as people write them: GB is 10^9 and GiB 2^30; what we print is decimal."""

import math
import re

from resnet_bk.errors import UserError

UNITS = {
    "": 1,
    **{"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40},
}
MOST = 10**18


def parse_bytes(text: str) -> int:
    """Bytes of ``"12GB"``, ``"11.9 GiB"``, ``"500MB"`` or a plain number of bytes.

    Raises:
        UserError: it cannot be read, is not above 0, or is more than an exabyte.
    """
    match = re.fullmatch(r"\s*([+-]?[\d.]+(?:e[+-]?\d+)?)\s*([a-z]*)\s*", text, flags=re.IGNORECASE)
    unit = UNITS.get(match[2].upper()) if match else None
    try:
        value = float(match[1]) if match else math.nan
    except ValueError:
        value = math.nan
    if unit is None or math.isnan(value):
        raise UserError(f"{text!r} is no amount of memory; write it like 12GB, 11.9GiB or 500MB")
    if value <= 0 or value * unit < 1:
        raise UserError(f"{text!r} is no memory at all; give an amount above 0, like 12GB")
    if value * unit > MOST:
        raise UserError(f"{text!r} is more than an exabyte; check the unit (MB, GB, GiB)")
    return int(value * unit)


def format_bytes(num_bytes: float) -> str:
    """Three or four digits in MB or GB (decimal), or kB and B below."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(num_bytes) >= size:
            return (
                f"{num_bytes / size:,.2f} {unit}" if abs(num_bytes) < 100 * size else f"{num_bytes / size:,.0f} {unit}"
            )
    return f"{num_bytes:.0f} B"
