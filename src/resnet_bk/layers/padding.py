"""Padding: where the real tokens of each row are."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Padding:
    """Which tokens of each row are real, and the order that brings them to its front.

    With the real tokens in front, a causal recurrence never meets padding before or between them, on whichever side
    the padding was.
    """

    real_BN: Tensor
    order_BN: Tensor
    inverse_BN: Tensor
    num_real_B: Tensor

    @classmethod
    def from_mask(cls, attention_mask_BN: Tensor) -> "Padding":
        """From the usual attention mask: nonzero for real tokens."""
        real_BN = attention_mask_BN.bool()
        order_BN = torch.argsort(~real_BN, dim=1, stable=True)
        return cls(
            real_BN=real_BN,
            order_BN=order_BN,
            inverse_BN=torch.argsort(order_BN, dim=1),
            num_real_B=real_BN.sum(1),
        )

    def to_front(self, x_BNC: Tensor) -> Tensor:
        """Rows with their real tokens first, padding last."""
        return x_BNC.gather(1, self.order_BN.unsqueeze(-1).expand_as(x_BNC))

    def restore(self, x_BNC: Tensor) -> Tensor:
        """The inverse of ``to_front``."""
        return x_BNC.gather(1, self.inverse_BN.unsqueeze(-1).expand_as(x_BNC))

    def last_real(self, x_BNC: Tensor) -> Tensor:
        """Each row's last real token, ``(B, 1, C)``; the first token in a row of padding only."""
        front_B = (self.num_real_B - 1).clamp(min=0)
        index_B1 = self.order_BN.gather(1, front_B.unsqueeze(1))
        return x_BNC.gather(1, index_B1.unsqueeze(-1).expand(-1, 1, x_BNC.shape[-1]))

    @property
    def front_real_BN(self) -> Tensor:
        """After ``to_front``: which tokens are real."""
        return self.real_BN.gather(1, self.order_BN)

    @property
    def neighbours_BN(self) -> Tensor:
        """After ``to_front``: whether sites i and i+1 are both real, ``(B, N-1)``."""
        front_BN = self.front_real_BN
        return front_BN[:, :-1] & front_BN[:, 1:]


def state_behind(x_BNX: Tensor, padding: Padding | None, state_BX: Tensor | None, at_first: float) -> Tensor:
    """``x`` at each row's last real token, real ones in front, for the next call: detached, and memory of its own.

    A row of padding only keeps the state before it, ``at_first`` where there is none.
    """
    if padding is None:
        return x_BNX[:, -1].detach().clone()  # a view would keep all tokens alive
    last_B = (padding.num_real_B - 1).clamp(min=0)
    last_BX = x_BNX[torch.arange(len(last_B), device=last_B.device), last_B].detach()
    before_BX = torch.full_like(last_BX, at_first) if state_BX is None else state_BX
    has_one = (padding.num_real_B > 0).view(-1, *(1 for _ in before_BX.shape[1:]))
    return torch.where(has_one, last_BX, before_BX)
