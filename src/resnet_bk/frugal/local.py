"""A process's piece of a tensor that several processes share."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's piece of a sharded tensor; any other tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def like_dtensor(local: Tensor, like: DTensor) -> DTensor:
    """A sharded tensor laid out as another one, with ``local`` as this process's piece."""
    # Not from_local, which makes a view of it: what a HostGradient computes is an ordinary tensor.
    return DTensor(local, like._spec, requires_grad=False)  # type: ignore[no-untyped-call]
