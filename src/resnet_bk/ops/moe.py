"""Top-1 mixture of experts: for each token, only the chosen expert's work is done."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log u) of the shape of ``like``, from torch's generator."""
    return -torch.empty_like(like).exponential_().log()


def chosen_expert(x_TD: Tensor, expert_T: Tensor, up_EDI: Tensor, down_EID: Tensor) -> Tensor:
    """Each token through its expert, gelu(x up_e) down_e, ``(T, D)``.

    Tokens are sorted by expert once, so that each expert's work is two matrix products over its own tokens.
    """
    num_experts = up_EDI.shape[0]
    order_T = torch.argsort(expert_T, stable=True)
    counts = torch.bincount(expert_T, minlength=num_experts).tolist()
    segments = x_TD.index_select(0, order_T).split_with_sizes(counts)
    # unbind, not up_EDI[e]: its gradient is one stack, where indexing would add E full-size zero-padded ones.
    outputs = [
        F.gelu(segment @ up_DI) @ down_ID
        for segment, up_DI, down_ID in zip(segments, up_EDI.unbind(0), down_EID.unbind(0), strict=True)
    ]
    return torch.cat(outputs).index_select(0, torch.argsort(order_T))


def load_balancing_loss(probabilities_TE: Tensor, expert_load_E: Tensor) -> Tensor:
    """E sum_e load_e mean_t p_te, a scalar: 1 when experts share the tokens evenly, E when one gets them all.

    Source: W. Fedus et al., "Switch Transformers" (2022), equation 4.
    """
    return probabilities_TE.shape[1] * (probabilities_TE.mean(0) * expert_load_E).sum()
