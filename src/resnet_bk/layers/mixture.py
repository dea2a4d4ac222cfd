"""A top-1 mixture of experts with Gumbel-softmax routing."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_bk.layers.linear import Linear
from resnet_bk.layers.norm import type_of_products
from resnet_bk.ops.moe import balanced_bias, chosen_expert, gumbel_noise, load_balancing_loss, straight_through
from resnet_bk.ops.single import linear_in_single


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How a mixture routed its tokens: the balancing loss (scalar) and each expert's share of them, ``(E,)``."""

    balancing_loss: Tensor
    expert_load_E: Tensor


class MixtureOfExperts(nn.Module):
    """D -> I -> D experts, one per token, chosen by a router in float32.

    While training, Gumbel noise is added to the router's logits and the choice is the largest of
    softmax((logits + noise) / temperature). The output is the chosen expert's, unscaled; its gradient reaches the
    router straight through the chosen probability. (The full straight-through estimator would run every expert on
    every token to get the others' gradients.) In evaluation there is no noise.

    With a ``router_bias_update_rate`` there is a bias for each expert, a buffer, that is added where the choice is made
    and nowhere else: no gradient and no probability knows of it. ``balance`` moves it after each optimizer step.

    Where a batch is shared by several ranks, ``reduce_load`` adds up over them what it is given, each expert's tokens
    and all tokens: loads are then the whole batch's.
    """

    router_bias: Tensor | None

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        router_temperature: float,
        router_bias_update_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.router_temperature = router_temperature
        self.router_bias_update_rate = router_bias_update_rate
        self.reduce_load: Callable[[Tensor], Tensor] | None = None
        self.register_buffer("router_bias", torch.zeros(num_experts) if router_bias_update_rate else None)
        self.router = Linear(hidden_size, num_experts)
        self.up = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.down = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))

    def forward(
        self,
        x_BND: Tensor,
        real_BN: Tensor | None,
        batch_rows: tuple[int, int] | None = None,
        noise_TE: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """Each token through its expert; ``real_BN`` False keeps padding out of the routing statistics.

        With ``batch_rows`` (first row, rows of the batch) the noise is the batch's, and these rows' part of it is used:
        in whatever pieces a batch is processed, each token meets the same. ``noise_TE`` is what ``noise`` drew before.
        """
        x_TD = x_BND.flatten(0, 1)
        logits_TE = linear_in_single(x_TD, self.router.weight)
        noisy_TE = logits_TE
        if self.training:
            noisy_TE = logits_TE + (_noise(logits_TE, len(x_BND), batch_rows) if noise_TE is None else noise_TE)
        expert_T = self._choice(noisy_TE)
        compute_dtype = type_of_products(x_TD)
        mixed_TD = chosen_expert(
            x_TD.to(compute_dtype), expert_T, self.up.to(compute_dtype), self.down.to(compute_dtype)
        )
        if self.training:
            probability_T = F.softmax(noisy_TE / self.router_temperature, dim=-1)
            probability_T1 = probability_T.gather(1, expert_T.unsqueeze(1))
            mixed_TD = straight_through(mixed_TD, probability_T1)
        return mixed_TD.view_as(x_BND), self._routing(logits_TE, expert_T, real_BN)

    def noise(self, x_BND: Tensor, batch_rows: tuple[int, int] | None) -> Tensor:
        """What ``forward`` would add to the logits of these tokens in training, drawn now: ``(B N, experts)``."""
        dtype = torch.promote_types(x_BND.dtype, torch.float32)
        logits_TE = x_BND.new_empty(x_BND.shape[:2].numel(), self.num_experts, dtype=dtype)
        return _noise(logits_TE, len(x_BND), batch_rows)

    @torch.no_grad()
    def balance(self, expert_load_E: Tensor) -> None:
        """Makes experts with less than their share of the last step's tokens a little likelier; off without a rate."""
        if self.router_bias is not None:
            self.router_bias.copy_(balanced_bias(self.router_bias, expert_load_E, self.router_bias_update_rate))

    def _choice(self, noisy_TE: Tensor) -> Tensor:
        return (noisy_TE if self.router_bias is None else noisy_TE + self.router_bias).argmax(-1)

    def _routing(self, logits_TE: Tensor, expert_T: Tensor, real_BN: Tensor | None) -> Routing:
        weight_T = torch.ones_like(logits_TE[:, 0]) if real_BN is None else real_BN.flatten().to(logits_TE.dtype)
        count = weight_T.sum().clamp(min=1)
        tokens_E = torch.zeros_like(logits_TE[0]).index_add(0, expert_T, weight_T)
        load_E = tokens_E / count if self.reduce_load is None else _shared_load(self.reduce_load, tokens_E, count)
        probabilities_TE = F.softmax(logits_TE, dim=-1) * (weight_T * (weight_T.numel() / count)).unsqueeze(1)
        return Routing(balancing_loss=load_balancing_loss(probabilities_TE, load_E), expert_load_E=load_E.detach())


def _noise(logits_TE: Tensor, num_rows: int, batch_rows: tuple[int, int] | None) -> Tensor:
    if batch_rows is None:
        return gumbel_noise(logits_TE)
    first_row, rows_of_batch = batch_rows
    noise_BNE = gumbel_noise(logits_TE.new_empty(rows_of_batch, len(logits_TE) // num_rows, logits_TE.shape[1]))
    return noise_BNE[first_row : first_row + num_rows].flatten(0, 1)


def _shared_load(add_up: Callable[[Tensor], Tensor], tokens_E: Tensor, count: Tensor) -> Tensor:
    """From the ranks' tokens and not their loads: whole numbers add up to the same in any order."""
    totals = add_up(torch.cat([tokens_E, count.unsqueeze(0)]))
    return totals[:-1] / totals[-1]
