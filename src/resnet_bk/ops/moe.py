"""Top-1 mixture of experts: for each token, only the chosen expert's work is done."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_bk.imagined import is_imagined
from resnet_bk.ops import one_token
from resnet_bk.ops.grouped import grouped_mm, needs_no_operator


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log u) of the shape of ``like``, from torch's generator."""
    return -torch.empty_like(like).exponential_().log()


def chosen_expert(x_TD: Tensor, expert_T: Tensor, up_EDI: Tensor, down_EID: Tensor) -> Tensor:
    """Each token through its expert, gelu(x up_e) down_e, ``(T, D)``.

    Tokens are sorted by expert once, so that each expert's work is two matrix products over its own tokens. Shapes do
    not depend on who chose whom, so that nothing waits for the device to tell. A token's row goes through products of
    rows alone: which tokens came with it changes nothing but, on a CPU, the order of its sums.
    """
    if len(x_TD) == 1 and not torch.is_grad_enabled() and needs_no_operator(x_TD) and not is_imagined():
        expert = int(expert_T)  # decoding: there is nothing to sort
        if one_token.is_alone(1, x_TD, up_EDI, down_EID):
            return one_token.expert(x_TD, up_EDI[expert], down_EID[expert])
        hidden_TI = x_TD @ up_EDI[expert]
        # torch's gelu hands even these few numbers to a library, which takes as long as all else here.
        return (0.5 * hidden_TI * (1 + torch.erf(hidden_TI * 0.5**0.5))) @ down_EID[expert]
    sorted_T, order_T = torch.sort(expert_T, stable=True)
    experts_E = torch.arange(up_EDI.shape[0], device=x_TD.device)
    ends_E = torch.searchsorted(sorted_T, experts_E, right=True, out_int32=True)
    inverse_T = torch.empty_like(order_T).scatter_(0, order_T, torch.arange(len(order_T), device=x_TD.device))
    hidden_TI = _gelu(grouped_mm(_permuted(x_TD, order_T, inverse_T), up_EDI, ends_E))
    return _permuted(grouped_mm(hidden_TI, down_EID, ends_E), inverse_T, order_T)


def load_balancing_loss(probabilities_TE: Tensor, expert_load_E: Tensor) -> Tensor:
    """E sum_e load_e mean_t p_te, a scalar: 1 when experts share the tokens evenly, E when one gets them all.

    Source: W. Fedus et al., "Switch Transformers" (2022), equation 4.
    """
    return probabilities_TE.shape[1] * (probabilities_TE.mean(0) * expert_load_E).sum()


def balanced_bias(bias_E: Tensor, expert_load_E: Tensor, rate: float) -> Tensor:
    """bias + rate sign(mean load - load): an expert with less than its share is chosen a little sooner.

    Source: L. Wang et al., "Auxiliary-loss-free load balancing strategy for mixture-of-experts" (2024), algorithm 1.
    """
    return bias_E + rate * torch.sign(expert_load_E.mean(-1, keepdim=True) - expert_load_E).to(bias_E.dtype)


def straight_through(mixed_TD: Tensor, probability_T1: Tensor) -> Tensor:
    """``mixed_TD`` as it is, with the gradients of ``mixed_TD * (1 + probability_T1 - probability_T1.detach())``."""
    same: Tensor = _StraightThrough.apply(mixed_TD, probability_T1)  # type: ignore[no-untyped-call]
    return same


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed_TD: Tensor, probability_T1: Tensor) -> Tensor:
        ctx.save_for_backward(mixed_TD)
        ctx.dtype = probability_T1.dtype
        return mixed_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor]:
        (mixed_TD,) = ctx.saved_tensors
        return grad_TD, (grad_TD * mixed_TD).sum(-1, keepdim=True, dtype=ctx.dtype)


def _permuted(x_TD: Tensor, order_T: Tensor, inverse_T: Tensor) -> Tensor:
    """Rows in another order, ``x[order]``."""
    if not (x_TD.requires_grad and torch.is_grad_enabled()):
        return x_TD.index_select(0, order_T)
    rows: Tensor = _Permutation.apply(x_TD, order_T, inverse_T)  # type: ignore[no-untyped-call]
    return rows


class _Permutation(torch.autograd.Function):
    """Its gradient is a permutation too; torch's own for an index adds rows to zeros one by one."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_T: Tensor, inverse_T: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_T)
        return x_TD.index_select(0, order_T)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_T,) = ctx.saved_tensors
        return grad_TD.index_select(0, inverse_T), None, None


def _gelu(x_TI: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or not (x_TI.requires_grad and torch.is_grad_enabled()):
        return F.gelu(x_TI)
    result: Tensor = _Gelu.apply(x_TI)  # type: ignore[no-untyped-call]
    return result


class _Gelu(torch.autograd.Function):
    """Its gradient is written over the one that comes in, which nobody else has: a pass over fresh memory saved."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor) -> Tensor:
        ctx.save_for_backward(x_TI)
        return F.gelu(x_TI)

    @staticmethod
    def backward(ctx: Any, grad_TI: Tensor) -> Tensor:
        (x_TI,) = ctx.saved_tensors
        gelu_backward = torch.ops.aten.gelu_backward
        x_bar_TI: Tensor = gelu_backward.grad_input(grad_TI, x_TI, grad_input=grad_TI)
        return x_bar_TI
