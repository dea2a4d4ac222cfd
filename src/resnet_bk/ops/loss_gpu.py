"""The loss of a chunk of logits as a Triton kernel: they are read twice and written once, in their place."""

import torch
import triton
from torch import Tensor

from resnet_bk.ops.loss_kernels import loss_kernel

LARGEST_BLOCK = 4096


def loss_in_place(logits_CV: Tensor, targets_C1: Tensor, *, want_gradient: bool) -> Tensor:
    """-log softmax(logits) at the targets, ``(C, 1)``; if wanted, softmax - onehot is in ``logits`` afterwards.

    Sums and result are float32, whatever the logits are.
    """
    rows, vocab_size = logits_CV.shape
    nats_C1 = torch.empty(rows, 1, dtype=torch.float32, device=logits_CV.device)
    if rows:
        loss_kernel[(rows,)](
            logits_CV,
            targets_C1.contiguous(),
            nats_C1,
            vocab_size,
            logits_CV.stride(0),
            WANT_GRADIENT=want_gradient,
            BLOCK=min(LARGEST_BLOCK, max(16, triton.next_power_of_2(vocab_size))),
            num_warps=8,
        )
    return nats_C1
