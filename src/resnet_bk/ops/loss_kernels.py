"""The Triton kernel behind ``loss_gpu``.

It is written in Triton's language, which only looks like Python to a type checker.
"""

import triton.language as tl

from resnet_bk.ops.kernels import kernel


@kernel
def loss_kernel(
    logits_ptr, targets_ptr, nats_ptr, vocab_size, row_stride, WANT_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """One row: -log softmax at the target, and where wanted softmax - onehot in the logits' place."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    target = tl.load(targets_ptr + row)
    columns = tl.arange(0, BLOCK)

    # Largest logit and sum of exponentials in each lane, joined at the end. They start at a finite number, because
    # the difference of two infinities is none.
    largest = tl.full((BLOCK,), -3e38, dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, vocab_size, BLOCK):
        x = tl.load(row_ptr + first + columns, mask=first + columns < vocab_size, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, x)
        total = total * tl.exp(largest - higher) + tl.exp(x - higher)
        largest = higher
    top = tl.max(largest)
    log_sum = top + tl.log(tl.sum(total * tl.exp(largest - top)))
    log_p = tl.load(row_ptr + target).to(tl.float32) - log_sum
    tl.store(nats_ptr + row, -log_p)

    if WANT_GRADIENT:
        # Nobody may overwrite the target's logit before everybody has read it.
        tl.debug_barrier()
        # p - 1 where the target is all but certain, by its series.
        p_less_1 = tl.where(log_p > -1e-2, log_p * (1 + log_p * (0.5 + log_p / 6)), tl.exp(log_p) - 1)
        for first in range(0, vocab_size, BLOCK):
            inside = first + columns < vocab_size
            x = tl.load(row_ptr + first + columns, mask=inside, other=0.0).to(tl.float32)
            g = tl.where(first + columns == target, p_less_1, tl.exp(x - log_sum))
            tl.store(row_ptr + first + columns, g.to(logits_ptr.dtype.element_ty), mask=inside)
