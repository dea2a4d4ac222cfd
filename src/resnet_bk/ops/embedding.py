"""Vectors of token ids, from a table in a half type, with a gradient that is summed in float32."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding_in_single(ids: Tensor, weight_VD: Tensor) -> Tensor:
    """``weight[ids]`` in float32.

    torch adds up the gradient of a frequent token in the table's own type: in bfloat16 such a sum stands still once it
    is 256 times as large as what comes. Here it is rounded once.
    """
    vectors: Tensor = _Lookup.apply(ids, weight_VD)  # type: ignore[no-untyped-call]
    return vectors


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.like = weight_VD.shape, weight_VD.dtype
        return F.embedding(ids, weight_VD).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        shape, dtype = ctx.like
        sums_VD = torch.zeros(shape, dtype=grad.dtype, device=grad.device)
        return None, sums_VD.index_add_(0, ids.flatten(), grad.flatten(0, -2)).to(dtype)
