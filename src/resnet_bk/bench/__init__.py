"""Measurements, one module a section; ``suite`` runs them and writes report.json. From Python, on any ``nn.Module``:
the classes here."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resnet_bk.bench.comprehensive import (
        ComprehensiveBenchmark,
        ComprehensiveConfig,
        ComprehensiveResult,
        FLOPsCounter,
        MemoryProfiler,
        TimingBenchmark,
    )

__all__ = [
    "ComprehensiveBenchmark",
    "ComprehensiveConfig",
    "ComprehensiveResult",
    "FLOPsCounter",
    "MemoryProfiler",
    "TimingBenchmark",
]


def __getattr__(name: str) -> object:
    """Loads the classes at their first use: the command line imports parts of this package for their names alone."""
    if name in __all__:
        return getattr(import_module("resnet_bk.bench.comprehensive"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
