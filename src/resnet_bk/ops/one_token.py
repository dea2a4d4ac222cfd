"""A single token, as decoding on a CPU has it: its operators as compiled loops.

What its products cost is reading the matrices: on one or two threads, torch's BLAS reads them at about half the
memory's speed where it does not know the processor, and a loop at nearly all of it (benchmarks/one_token.py). What all
else costs is the calls, a few microseconds each, of operators that have a few thousand numbers to work on: here a whole
operator of a layer is one call.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from resnet_bk.imagined import is_imagined, kind_of
from resnet_bk.ops.bk.api import BackendChoice
from resnet_bk.ops.gap import LARGEST_RATE
from resnet_bk.threads import even_pieces, in_threads

# One thread is nearly as fast as the memory of a small machine; with more of both, BLAS has them all at work.
MOST_THREADS = 2
# Numbers of a matrix: a second thread reads a tenth more at once, which of few of them its start takes away.
WORTH_TWO_THREADS = 1 << 22


def choose_one_token_backend(device: torch.device) -> BackendChoice:
    """How a single float32 token is worked on on ``device``."""
    if kind_of(device) == "cpu" and torch.get_num_threads() <= MOST_THREADS:
        return BackendChoice(name="numba", reason="a matrix is read once, as fast as memory is, by one call")
    return BackendChoice(name="torch", reason="its BLAS")


def is_alone(tokens: int, *tensors: Tensor) -> bool:
    """Whether it is one token of which nobody keeps account: no gradient, no compiler and no mode of torch's."""
    return (
        tokens == 1
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(
            type(x) in (Tensor, torch.nn.Parameter) and x.dtype == torch.float32 and x.is_contiguous() for x in tensors
        )
        and not is_imagined()
        and not is_in_torch_dispatch_mode()
        and not torch.is_autocast_enabled(tensors[0].device.type)
        and choose_one_token_backend(tensors[0].device).name == "numba"
    )


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """``x weight^T``, ``(..., O)``, as ``F.linear`` gives it, whatever the number of tokens ``(..., I)``."""
    if type(x) is not Tensor or x.numel() != x.shape[-1]:
        return F.linear(x, weight_OI)
    x_I = x.reshape(-1).contiguous()
    if not is_alone(1, x_I, weight_OI):
        return F.linear(x, weight_OI)
    from resnet_bk.ops.one_token_kernels import linear_kernel

    out_O = torch.empty(len(weight_OI))
    weight, numbers, out = (tensor.detach().numpy() for tensor in (weight_OI, x_I, out_O))
    threads = torch.get_num_threads() if weight_OI.numel() >= WORTH_TWO_THREADS else 1

    def rows(first: int, last: int) -> None:
        linear_kernel(weight[first:last], numbers, out[first:last])

    in_threads(rows, even_pieces(len(weight_OI), threads))
    return out_O.view(*x.shape[:-1], -1)


def expert(x_1D: Tensor, up_DI: Tensor, down_ID: Tensor) -> Tensor:
    """``gelu(x up) down``, ``(1, D)``, of a token that ``is_alone``."""
    from resnet_bk.ops.one_token_kernels import expert_kernel

    out_1D = torch.empty(1, down_ID.shape[1])
    _call(expert_kernel, (x_1D[0], up_DI, down_ID, out_1D[0]))
    return out_1D


def queries_keys_values(
    x_11C: Tensor, weight_SC: Tensor, window_1WC: Tensor, cos: Tensor, sin: Tensor, num_heads: int, key_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k ``(1, 1, H, K)`` and v ``(1, 1, H, V)`` of a token that ``is_alone``, behind a window."""
    from resnet_bk.ops.one_token_kernels import projections_kernel

    value_size = x_11C.shape[2] // num_heads - 2 * key_size
    q, k, v = (torch.empty(1, 1, num_heads, size) for size in (key_size, key_size, value_size))
    arguments = (x_11C[0, 0], weight_SC, window_1WC[0], cos[0, 0], sin[0, 0], q[0, 0], k[0, 0], v[0, 0])
    _call(projections_kernel, arguments)
    return q, k, v


def tunnel(potential_11H: Tensor, log_rate_H: Tensor, state_1H: Tensor) -> tuple[Tensor, Tensor]:
    """log l ``(1, 1, H)`` and m ``(1, H)`` of the chains of a token that ``is_alone``, at the rates of a potential."""
    from resnet_bk.ops.one_token_kernels import tunnel_kernel

    log_l_11H, after_1H = torch.empty_like(potential_11H), torch.empty_like(state_1H)
    arguments = (potential_11H[0, 0], log_rate_H, state_1H[0], log_l_11H[0, 0], after_1H[0])
    _call(tunnel_kernel, arguments, LARGEST_RATE)
    return log_l_11H, after_1H


def carry(
    q_11HK: Tensor, k_11HK: Tensor, v_11HV: Tensor, log_l_11H: Tensor, state_1HKV: Tensor, skip_H: Tensor
) -> tuple[Tensor, Tensor]:
    """o ``(1, 1, H, V)`` and the new state ``(1, H, K, V)`` of a token that ``is_alone``."""
    from resnet_bk.ops.one_token_kernels import carry_kernel

    o_11HV, after_1HKV = torch.empty_like(v_11HV), torch.empty_like(state_1HKV)
    arguments = (q_11HK[0], k_11HK[0], v_11HV[0], log_l_11H[0], skip_H[None], state_1HKV, o_11HV[0], after_1HKV)
    _call(carry_kernel, [tensor[0] for tensor in arguments])
    return o_11HV, after_1HKV


def attend(
    q_11HK: Tensor, k_11HK: Tensor, v_11HV: Tensor, keys_1PHK: Tensor, values_1PHV: Tensor, rate_H: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Local attention ``(1, 1, H, V)`` of a token that ``is_alone``, behind P others in its window, and their keys and
    values with its own, ``(1, P + 1, H, K)`` and ``(1, P + 1, H, V)``."""
    from resnet_bk.ops.one_token_kernels import window_kernel

    keys_1MHK, values_1MHV = (x.new_empty(1, x.shape[1] + 1, *x.shape[2:]) for x in (keys_1PHK, values_1PHV))
    out_11HV = torch.empty_like(v_11HV, memory_format=torch.contiguous_format)
    token, result = (q_11HK[0, 0], k_11HK[0, 0], v_11HV[0, 0]), (keys_1MHK[0], values_1MHV[0], out_11HV[0, 0])
    _call(window_kernel, (*token, keys_1PHK[0], values_1PHV[0], rate_H, *result))
    return out_11HV, keys_1MHK, values_1MHV


def gated_norm(o_11HV: Tensor, weight_V: Tensor, gate_11D: Tensor, eps: float) -> Tensor:
    """``(1, 1, D)`` of a token that ``is_alone``."""
    from resnet_bk.ops.one_token_kernels import gated_norm_kernel

    out_11D = torch.empty_like(gate_11D)
    arguments = (o_11HV[0, 0], weight_V, gate_11D.view(o_11HV.shape[2:]), out_11D.view(o_11HV.shape[2:]))
    _call(gated_norm_kernel, arguments, eps)
    return out_11D


def _call(kernel: Callable[..., None], tensors: Sequence[Tensor], *numbers: float) -> None:
    kernel(*(tensor.detach().numpy() for tensor in tensors), *numbers)
