"""The loss of a language model, without the logits of all tokens at once.

Beside the usual letters, ``C`` is the tokens of a chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_bk.imagined import kind_of
from resnet_bk.ops.bk.api import BackendChoice

IGNORE_INDEX = -100

# A chunk's logits, and what is made of them, take at most this much, unless the head's gradient takes more.
CHUNK_BYTES = 64 * 2**20
# More chunks than this save next to nothing, and torch.compile unrolls every one.
MOST_CHUNKS = 64


def shift_targets(labels_BN: Tensor) -> Tensor:
    """Targets for each position: the next token's label, and nothing for the last. ``(B, N)``."""
    return F.pad(labels_BN[:, 1:], (0, 1), value=IGNORE_INDEX)


def cross_entropy(logits_BNV: Tensor, targets_BN: Tensor) -> Tensor:
    """Mean over the targets that are not ``-100`` of -log p(target), in nats, in float32 at least."""
    _require_targets(logits_BNV, targets_BN)
    logits_TV = logits_BNV.flatten(0, 1)
    if logits_TV.dtype.itemsize < 4:
        logits_TV = logits_TV.float()
    return F.cross_entropy(logits_TV, targets_BN.flatten().long(), ignore_index=IGNORE_INDEX)


def linear_cross_entropy(
    hidden_BND: Tensor, weight_VD: Tensor, targets_BN: Tensor, *, chunk_tokens: int | None = None
) -> Tensor:
    """``cross_entropy(hidden weight^T, targets)``, a scalar, a chunk of tokens at a time.

    Where a gradient is asked for, it is computed with the loss, chunk by chunk, so that no logit is computed twice and
    none is kept: with p = softmax(hidden weight^T) and G = p - onehot(target), the gradients are G weight / count and
    G^T hidden / count. G goes through the products undivided, because G / count would leave float16's range at its
    lower end; the count and the gradient that comes in are applied in float32.

    Products are done in autocast's dtype where it is on, softmax and sums in float32 at least. There is no second
    derivative.

    ``chunk_tokens`` is how many tokens have logits at once, None for the rule of ``chunk_rows``: fewer take less memory
    and more time, and change nothing but rounding.

    Raises:
        ValueError: the targets are not one for each token, or ``chunk_tokens`` is none.

    Source: P.-L. Hsu et al., "Liger Kernel" (2024), for the order of the computation.
    """
    _require_targets(hidden_BND, targets_BN)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; give a number of at least 1, or None")
    hidden_TD, targets_T = hidden_BND.flatten(0, 1), targets_BN.flatten()
    if torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad):
        mean: Tensor = _LossWithGradients.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            hidden_TD, weight_VD, targets_T, hidden_TD.requires_grad, weight_VD.requires_grad, chunk_tokens
        )
        return mean
    sums = _sweep(hidden_TD, weight_VD, targets_T, want_hidden=False, want_weight=False, chunk_tokens=chunk_tokens)
    return sums.loss / sums.count


def _require_targets(of_tokens: Tensor, targets: Tensor) -> None:
    if of_tokens.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and what is made of the tokens {tuple(of_tokens.shape)}; give "
            "one target for each token: where targets are shifted, both have to be cut"
        )


def choose_loss_backend(device: torch.device, dtype: torch.dtype) -> BackendChoice:
    """How ``linear_cross_entropy`` treats a chunk of logits in ``dtype`` on ``device``, and why."""
    kind = kind_of(device)
    if kind != "cuda":
        return BackendChoice(name="torch", reason=f"softmax a chunk of tokens at a time, on {kind}")
    if dtype == torch.float64:
        return BackendChoice(name="torch", reason="softmax a chunk of tokens at a time: float64 is for checks")
    if torch.compiler.is_compiling():
        return BackendChoice(name="torch", reason="softmax a chunk of tokens at a time, for the compiler to fuse")
    return BackendChoice(name="triton", reason="loss and gradient of a chunk of tokens in its logits' place")


def chunk_rows(tokens: int, vocab_size: int, hidden_size: int, *, bytes_per_logit: int) -> int:
    """Tokens whose logits are there at once.

    At least ``hidden_size`` of them, which makes logits and the head's gradient equally large: with fewer, adding to
    that gradient costs more memory traffic than the products that it saves.
    """
    return max(1, CHUNK_BYTES // (bytes_per_logit * vocab_size), hidden_size, -(-tokens // MOST_CHUNKS))


def bytes_per_logit(backend: str, dtype: torch.dtype) -> int:
    """At the worst moment: in torch probabilities beside their logits, in dtype and in what sums are done in."""
    sum_size = max(4, dtype.itemsize)
    return dtype.itemsize if backend == "triton" else 2 * sum_size + (dtype.itemsize if dtype.itemsize < 4 else 0)


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """Sum of the losses, number of targets, and the gradients of the sum that were wanted."""

    loss: Tensor
    count: Tensor
    hidden_bar_TD: Tensor | None
    weight_bar_VD: Tensor | None


class _LossWithGradients(torch.autograd.Function):
    """The mean loss; the gradients of the sum are computed with it, and backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        want_hidden: bool,
        want_weight: bool,
        chunk_tokens: int | None,
    ) -> Tensor:
        sums = _sweep(
            hidden_TD,
            weight_VD,
            targets_T,
            want_hidden=want_hidden,
            want_weight=want_weight,
            chunk_tokens=chunk_tokens,
        )
        ctx.save_for_backward(sums.hidden_bar_TD, sums.weight_bar_VD, sums.count)
        ctx.dtypes = hidden_TD.dtype, weight_VD.dtype
        return sums.loss / sums.count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # With create_graph these gradients would pass as constants.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("linear_cross_entropy has no second derivative; use cross_entropy of whole logits")
        hidden_bar_TD, weight_bar_VD, count = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        # Without any target the loss is 0 / 0 and its gradients are zeros, as torch has it.
        scale = grad / count.clamp(min=1)
        if hidden_bar_TD is not None:
            hidden_bar_TD = (hidden_bar_TD.to(scale.dtype) * scale).to(hidden_dtype)
        if weight_bar_VD is not None:
            # The largest tensor here: no copy of it, unless it may be asked for again.
            scaled_VD = weight_bar_VD * scale if _may_come_again() else weight_bar_VD.mul_(scale)
            weight_bar_VD = scaled_VD.to(weight_dtype)
        return hidden_bar_TD, weight_bar_VD, None, None, None, None


def _may_come_again() -> bool:
    """Whether this backward keeps its graph (``retain_graph=True``), so that what it saved must stay as it is."""
    return torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()


def _sweep(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    want_hidden: bool,
    want_weight: bool,
    chunk_tokens: int | None,
) -> _Sums:
    tokens, device = hidden_TD.shape[0], hidden_TD.device
    dtype = _product_dtype(hidden_TD, weight_VD)
    sum_dtype = torch.promote_types(dtype, torch.float32)
    backend = choose_loss_backend(device, dtype).name
    rows = chunk_tokens or chunk_rows(tokens, *weight_VD.shape, bytes_per_logit=bytes_per_logit(backend, dtype))
    chunk_loss = _chunk_in_place if backend == "triton" else _chunk
    ignored_T1 = (targets_T == IGNORE_INDEX).unsqueeze(1)
    targets_T1 = targets_T.unsqueeze(1).masked_fill(ignored_T1, 0)
    loss = torch.zeros((), dtype=sum_dtype, device=device)
    hidden_bar_TD = torch.empty(hidden_TD.shape, dtype=dtype, device=device) if want_hidden else None
    weight_bar_VD = None
    want_gradient = want_hidden or want_weight
    with torch.autocast(device.type, enabled=False):
        weight_VD = weight_VD.to(dtype)
        for start in range(0, tokens, rows):
            chunk = slice(start, min(start + rows, tokens))
            hidden_CD, ignored_C1 = hidden_TD[chunk].to(dtype), ignored_T1[chunk]
            nats_C1, g_CV = chunk_loss(hidden_CD, weight_VD, targets_T1[chunk], want_gradient=want_gradient)
            loss = loss + nats_C1.masked_fill(ignored_C1, 0).sum()
            # Ignored tokens have no gradient: wiped not in G but in what is narrower.
            if hidden_bar_TD is not None:
                hidden_bar_TD[chunk] = (g_CV @ weight_VD).masked_fill_(ignored_C1, 0)
            if want_weight:
                weight_bar_VD = _add_product(weight_bar_VD, g_CV, hidden_CD.masked_fill(ignored_C1, 0), sum_dtype)
            del g_CV  # before the next chunk has its own
    if want_weight and weight_bar_VD is None:
        weight_bar_VD = torch.zeros(weight_VD.shape, dtype=sum_dtype, device=device)
    return _Sums(
        loss=loss,
        count=(~ignored_T1).sum().to(sum_dtype),
        hidden_bar_TD=hidden_bar_TD,
        weight_bar_VD=weight_bar_VD,
    )


def _chunk(hidden_CD: Tensor, weight_VD: Tensor, targets_C1: Tensor, *, want_gradient: bool) -> tuple[Tensor, Tensor]:
    """-log p(target) ``(C, 1)``, and G = p - onehot(target) ``(C, V)`` in the products' dtype; without, anything."""
    sum_dtype = torch.promote_types(hidden_CD.dtype, torch.float32)
    logits_CV = hidden_CD @ weight_VD.t()
    if not want_gradient:
        return -F.log_softmax(logits_CV, dim=1, dtype=sum_dtype).gather(1, targets_C1), hidden_CD
    p_CV = F.softmax(logits_CV, dim=1, dtype=sum_dtype)
    # The logarithm of the largest p, which is never near 0, and how far the target's logit lies below: one exponential
    # of each logit gives both loss and gradient.
    below_C1 = logits_CV.amax(1, keepdim=True).to(sum_dtype) - logits_CV.gather(1, targets_C1)
    nats_C1 = below_C1 - p_CV.amax(1, keepdim=True).log()
    # p - 1 as expm1(log p), which is exact where the target is all but certain.
    g_CV = p_CV.scatter_(1, targets_C1, torch.expm1(-nats_C1))
    return nats_C1, g_CV.to(hidden_CD.dtype)


def _chunk_in_place(
    hidden_CD: Tensor, weight_VD: Tensor, targets_C1: Tensor, *, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The same by the kernel, which is imported at its first use: its compiler is slow to load, and not everywhere."""
    from resnet_bk.ops.loss_gpu import loss_in_place

    logits_CV = hidden_CD @ weight_VD.t()
    return loss_in_place(logits_CV, targets_C1, want_gradient=want_gradient), logits_CV


def _add_product(sum_VD: Tensor | None, g_CV: Tensor, hidden_CD: Tensor, sum_dtype: torch.dtype) -> Tensor:
    """``sum + G^T hidden``, in place. The sum is float32 at least, so that chunks add nothing to the rounding."""
    if g_CV.dtype == sum_dtype:
        return g_CV.t() @ hidden_CD if sum_VD is None else sum_VD.addmm_(g_CV.t(), hidden_CD)
    if kind_of(g_CV.device) == "cuda":
        if sum_VD is not None and not torch.compiler.is_compiling():  # Dynamo does not take it, and fuses what follows
            return torch.addmm(sum_VD, g_CV.t(), hidden_CD, out_dtype=sum_dtype, out=sum_VD)
        product_VD = torch.mm(g_CV.t(), hidden_CD, out_dtype=sum_dtype)
    elif g_CV.dtype == torch.float16:
        # The sum over a chunk can be more than float16's 65504, and no loss scale would help: it is not in G yet.
        product_VD = g_CV.t().to(sum_dtype) @ hidden_CD.to(sum_dtype)
    else:
        product_VD = g_CV.t() @ hidden_CD
    return product_VD.to(sum_dtype) if sum_VD is None else sum_VD.add_(product_VD)


def _product_dtype(hidden_TD: Tensor, weight_VD: Tensor) -> torch.dtype:
    """What ``F.linear`` would multiply in."""
    device = hidden_TD.device.type
    if torch.is_autocast_enabled(device) and hidden_TD.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden_TD.dtype, weight_VD.dtype)
