"""A linear layer of a single token, as decoding on a CPU needs it: what it costs is reading the matrix.

On one or two threads, torch's BLAS reads it at less than half the memory's speed where it does not know the processor;
a compiled loop reads it at nearly all of it (benchmarks/one_token.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from resnet_bk.imagined import is_imagined, kind_of
from resnet_bk.ops.bk.api import BackendChoice

# One thread is nearly as fast as the memory of a small machine; with more of both, BLAS has them all at work.
MOST_THREADS = 2


def choose_one_token_backend(device: torch.device) -> BackendChoice:
    """How a single float32 token is multiplied on ``device``."""
    if kind_of(device) == "cpu" and torch.get_num_threads() <= MOST_THREADS:
        return BackendChoice(name="numba", reason="a matrix is read once, as fast as memory is")
    return BackendChoice(name="torch", reason="its BLAS")


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """``x weight^T``, ``(..., O)``, as ``F.linear`` gives it, whatever the number of tokens ``(..., I)``."""
    if not _is_read_once(x, weight_OI):
        return F.linear(x, weight_OI)
    from resnet_bk.ops.one_token_kernels import linear_kernel

    out_O = torch.empty(len(weight_OI))
    linear_kernel(weight_OI.detach().numpy(), x.reshape(-1).numpy(), out_O.numpy())
    return out_O.view(*x.shape[:-1], -1)


def _is_read_once(x: Tensor, weight: Tensor) -> bool:
    """Whether it is a token of which nobody keeps account: no gradient, no compiler and no mode of torch's."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.numel() == x.shape[-1]
        and x.dtype == weight.dtype == torch.float32
        and weight.is_contiguous()
        and type(x) is Tensor
        and type(weight) in (Tensor, torch.nn.Parameter)
        and not is_imagined()
        and not is_in_torch_dispatch_mode()
        and not torch.is_autocast_enabled(x.device.type)
        and choose_one_token_backend(x.device).name == "numba"
    )
