"""ResNet-BK: a language model in O(N) through the Green's function of a tridiagonal Hamiltonian."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resnet_bk.models import ResNetBKConfig as ResNetBKConfig
    from resnet_bk.models import ResNetBKForCausalLM as ResNetBKForCausalLM

__version__ = version("resnet-bk")
__all__ = ["ResNetBKConfig", "ResNetBKForCausalLM", "__version__"]


def __getattr__(name: str) -> Any:
    # The model pulls in torch and transformers, seconds of imports that `resnet-bk --help` need not wait for.
    if name in ("ResNetBKConfig", "ResNetBKForCausalLM"):
        return getattr(import_module("resnet_bk.models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
