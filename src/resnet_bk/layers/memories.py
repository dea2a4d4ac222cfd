"""How far heads look back at the start."""

import torch
from torch import Tensor


def memories(num_heads: int, shortest: float, longest: float) -> Tensor:
    """Tokens that each head remembers ``(H,)``, spread evenly in their logarithm; of a single head, in the middle."""
    share = torch.linspace(0, 1, num_heads) if num_heads > 1 else torch.full((1,), 0.5)
    return shortest * (longest / shortest) ** share
