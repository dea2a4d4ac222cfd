"""ResNet-BK: a language model in O(N) through the Green's function of a tridiagonal Hamiltonian.

Importing the package makes the model known to ``transformers``: ``AutoModelForCausalLM`` loads its checkpoints.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resnet_bk.models import ResNetBKConfig as ResNetBKConfig
    from resnet_bk.models import ResNetBKForCausalLM as ResNetBKForCausalLM

__version__ = version("resnet-bk")
__all__ = ["ResNetBKConfig", "ResNetBKForCausalLM", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("ResNetBKConfig", "ResNetBKForCausalLM"):
        return getattr(import_module("resnet_bk.models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_command_line() -> bool:
    """Whether this process is `resnet-bk` or `python -m resnet_bk`, whose --help should not wait for torch."""
    return Path(sys.argv[0]).name == "resnet-bk" or (sys.argv[0] == "-m" and "resnet_bk" in sys.orig_argv)


if not _is_command_line():
    import_module("resnet_bk.models")
