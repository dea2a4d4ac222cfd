"""Content carried along a chain, a chunk of tokens at a time, as matrix products in plain torch.

    S_i = l_i (S_{i-1} + k_i v_i^T),   o_i = q_i S_i + skip v_i        (S is K x V, l_i > 0)

Inside a chunk of C tokens, with L_i = log l_1 + ... + log l_i from the chunk's first token on, A_j = L_{j-1} the sum
ahead of key j, and S_0 the state that enters the chunk,

    o_i = sum_{j <= i} exp(L_i - A_j) (q_i . k_j) v_j + exp(L_i) q_i S_0 + skip v_i,

and the state that leaves it is exp(L_C) S_0 + sum_j exp(L_C - A_j) k_j v_j^T. Decays are exponentials of differences
inside one chunk, so nothing grows with N and nothing overflows. The states that enter the chunks follow the same
recurrence over chunks, which goes ``GROUP`` of them at a time. All together O(N (C (K + V) + K V)). On a CPU a compiled
loop makes float32's decays between the tokens of a chunk, with an exponential for each token instead of each pair.

The adjoint, with E the gradient of the state that leaves a chunk and o' that of o:

    P_ij = exp(L_i - A_j) (q_i . k_j),   P'_ij = exp(L_i - A_j) (o'_i . v_j)
    q'_i = sum_j P'_ij k_j + exp(L_i) S_0 o'_i
    k'_j = sum_i P'_ij q_i + exp(L_C - A_j) E v_j
    v'_j = sum_i P_ij o'_i + exp(L_C - A_j) E^T k_j + skip o'_j
    skip' = sum_j o'_j . v_j

and log l_t gathers whatever crosses t: pairs j < t <= i, the entering state as read at i >= t, what is written at
j < t and leaves, what passes through the whole chunk, and k'_t . k_t for what is written at t itself. These are sums
over one chunk, never over all tokens, which would be differences of large numbers.

The start of a document at t cuts everything that would cross it; l_t k_t v_t^T is behind the cut.

Source: the chunked form is that of T. Dao and A. Gu, "Transformers are SSMs" (2024), section 6.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_bk.imagined import is_imagined
from resnet_bk.threads import ELEMENTS_WORTH_A_THREAD, even_pieces, in_threads

CHUNK = 64  # tokens
GROUP = 16  # chunks whose states one product joins
SLAB_BYTES = 2**23  # of one C x C matrix for all chains of the chunks at hand: what a cache holds


@dataclass(frozen=True, kw_only=True)
class Decays:
    """Decays inside pieces of C steps, ``(..., C)``: zero across the start of a document.

    ``log_sum`` is L in the widest type of the device and ``ahead`` where what a step writes begins to decay, A;
    ``starts`` counts the starts up to each step, or is None.
    """

    log_sum: Tensor
    ahead: Tensor
    starts: Tensor | None
    dtype: torch.dtype

    def __getitem__(self, pieces: slice | int) -> "Decays":
        starts = None if self.starts is None else self.starts[pieces]
        return Decays(log_sum=self.log_sum[pieces], ahead=self.ahead[pieces], starts=starts, dtype=self.dtype)

    def from_entry(self) -> Tensor:
        """exp(L_i), ``(..., C)``: from the state that enters to step i."""
        decay = self.log_sum.exp().to(self.dtype)
        return decay if self.starts is None else decay * (self.starts == 0)

    def to_exit(self) -> Tensor:
        """exp(L_C - A_j), ``(..., C)``: from step j to the state that leaves."""
        decay = (self.log_sum[..., -1:] - self.ahead).exp().to(self.dtype)
        return decay if self.starts is None else decay * (self.starts == self.starts[..., -1:])

    def between(self) -> Tensor:
        """exp(L_i - A_j) for j <= i and 0 else, ``(..., C, C)``."""
        if self._may_be_compiled():
            return self._between_compiled()
        size = self.log_sum.shape[-1]
        unrelated = torch.ones(size, size, dtype=torch.bool, device=self.log_sum.device).triu_(1)
        if self.starts is not None:
            unrelated = unrelated | (self.starts.unsqueeze(-1) != self.starts.unsqueeze(-2))
        difference = (self.log_sum.unsqueeze(-1) - self.ahead.unsqueeze(-2)).to(self.dtype)
        return difference.masked_fill_(unrelated, -torch.inf).exp_()

    def _may_be_compiled(self) -> bool:
        """Whether these are numbers in a CPU's memory. Whoever keeps account of operators does not matter: what is
        computed again under selective checkpointing has to be the same bit for bit."""
        on_cpu = self.log_sum.device.type == "cpu" and self.dtype == torch.float32
        return on_cpu and type(self.log_sum) is Tensor and not is_imagined()

    def _between_compiled(self) -> Tensor:
        from resnet_bk.ops.carry.decay_kernels import between_kernel

        size = self.log_sum.shape[-1]
        out = torch.empty(*self.log_sum.shape, size, dtype=self.dtype)
        starts = self.log_sum.new_empty(0, size, dtype=torch.int32) if self.starts is None else self.starts
        arrays = [x.reshape(-1, size).numpy() for x in (self.log_sum, self.ahead, starts)]
        kernel: Callable[..., None] = between_kernel
        into = partial(kernel, *arrays, out.view(-1, size, size).numpy())
        pieces = max(1, min(torch.get_num_threads(), out.numel() // ELEMENTS_WORTH_A_THREAD))
        in_threads(into, even_pieces(len(arrays[0]), pieces))
        return out


def carry(
    q_BNHK: Tensor,
    k_BNHK: Tensor,
    v_BNHV: Tensor,
    log_l_BNH: Tensor,
    starts_BN: Tensor | None,
    state_BHKV: Tensor,
    skip_H: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o ``(B, N, H, V)`` and the last state ``(B, H, K, V)``, in the state's type."""
    batch_size, length, heads, _ = q_BNHK.shape
    dtype = state_BHKV.dtype
    decays = _decays(log_l_BNH, starts_BN, dtype)
    q, k, v = (_chunks(x, dtype) for x in (q_BNHK, k_BNHK, v_BNHV))
    entry, final_MKV = _joined(_written(k, v, decays), decays, state_BHKV.flatten(0, 1))
    o = torch.empty_like(v)
    skip = _of_chains(skip_H, batch_size)
    for slab in _slabs(q):
        pairs = (q[slab] @ k[slab].mT).mul_(decays[slab].between())
        from_state = (q[slab] @ entry[slab]).mul_(decays[slab].from_entry().unsqueeze(-1))
        torch.add(pairs @ v[slab], from_state, out=o[slab])
        if skip is not None:
            o[slab].addcmul_(skip, v[slab])
    return _tokens(o, batch_size, length), torch.unflatten(final_MKV, 0, (batch_size, heads))


def carry_adjoint(
    grad_o_BNHV: Tensor,
    grad_final_BHKV: Tensor,
    q_BNHK: Tensor,
    k_BNHK: Tensor,
    v_BNHV: Tensor,
    log_l_BNH: Tensor,
    starts_BN: Tensor | None,
    state_BHKV: Tensor,
    skip_H: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, log l, the initial state and skip, in the state's type. The states are computed again."""
    batch_size, length, heads, _ = q_BNHK.shape
    dtype = state_BHKV.dtype
    decays = _decays(log_l_BNH, starts_BN, dtype)
    q, k, v, grad_o = (_chunks(x, dtype) for x in (q_BNHK, k_BNHK, v_BNHV, grad_o_BNHV))
    entry, _ = _joined(_written(k, v, decays), decays, state_BHKV.flatten(0, 1))
    read = (q * decays.from_entry().unsqueeze(-1)).mT @ grad_o
    leaving, grad_state_MKV = _joined(read, decays, grad_final_BHKV.to(dtype).flatten(0, 1), backward=True)

    through_GM = (entry * leaving).sum((-2, -1)) * decays.from_entry()[..., -1]
    at_or_after_CC = torch.ones(CHUNK, CHUNK, dtype=dtype, device=q.device).tril()
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grad_log = torch.empty_like(q[..., 0])
    skip = _of_chains(skip_H, batch_size)
    grad_skip_M = grad_log.new_zeros(q.shape[1])
    for slab in _slabs(q):
        q_, k_, v_, grad_, between = q[slab], k[slab], v[slab], grad_o[slab], decays[slab].between()
        to_exit = decays[slab].to_exit().unsqueeze(-1)
        pairs = (q_ @ k_.mT).mul_(between)
        products = grad_ @ v_.mT
        grad_pairs = between.mul_(products)
        from_state = (grad_ @ entry[slab].mT).mul_(decays[slab].from_entry().unsqueeze(-1))
        to_state = (v_ @ leaving[slab].mT).mul_(to_exit)
        torch.add(grad_pairs @ k_, from_state, out=grad_q[slab])
        torch.add(grad_pairs.mT @ q_, to_state, out=grad_k[slab])
        torch.add(pairs.mT @ grad_, (k_ @ leaving[slab]).mul_(to_exit), out=grad_v[slab])
        if skip is not None:
            grad_v[slab].addcmul_(skip, grad_)
            grad_skip_M += products.diagonal(dim1=-2, dim2=-1).sum((0, -1))
        crossing = products.mul_(pairs)  # the gradient of L_i - A_j
        diagonal = crossing.diagonal(dim1=-2, dim2=-1)
        alone = diagonal.clone()
        diagonal.zero_()
        later, columns = crossing.sum(-1).add_((from_state * q_).sum(-1)), crossing.sum(-2)
        earlier = (to_state * k_).sum(-1)
        there = columns + alone + earlier  # k'_t . k_t
        grad_log[slab] = there.add_(through_GM[slab].unsqueeze(-1)).add_(later.sub_(columns) @ at_or_after_CC)
        grad_log[slab] += earlier @ (1 - at_or_after_CC)
    q_bar, k_bar, v_bar, log_bar = (_tokens(x, batch_size, length) for x in (grad_q, grad_k, grad_v, grad_log))
    state_bar = torch.unflatten(grad_state_MKV, 0, (batch_size, heads))
    skip_bar = None if skip is None else grad_skip_M.view(batch_size, heads).sum(0)
    return q_bar, k_bar, v_bar, log_bar, state_bar, skip_bar


def _written(k: Tensor, v: Tensor, decays: Decays) -> Tensor:
    """What each chunk adds to the state that leaves it, ``(G, M, K, V)``."""
    return (k * decays.to_exit().unsqueeze(-1)).mT @ v


def _joined(
    written_GMKV: Tensor, decays: Decays, state_MKV: Tensor, *, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """The state before each chunk, ``(G, M, K, V)``, and the one behind the last; ``backward`` goes from the last."""
    num_chunks, _, *size = written_GMKV.shape
    log_GM, starts_GM = decays.log_sum[..., -1], None if decays.starts is None else decays.starts[..., -1]
    if backward:
        written_GMKV, log_GM = written_GMKV.flip(0), log_GM.flip(0)
        starts_GM = None if starts_GM is None else starts_GM.flip(0)
    written = written_GMKV.flatten(2)
    before = torch.empty_like(written)
    state = state_MKV.flatten(1)
    for first in range(0, num_chunks, GROUP):
        group = slice(first, first + GROUP)
        log_sum = log_GM[group].T.cumsum(-1)
        over_chunks = Decays(
            log_sum=log_sum,
            ahead=log_sum,  # what is written has decayed to its chunk's exit
            starts=None if starts_GM is None else starts_GM[group].T.cumsum(-1),
            dtype=decays.dtype,
        )
        carried = over_chunks.from_entry().unsqueeze(-1) * state.unsqueeze(1)
        behind = torch.baddbmm(carried, over_chunks.between(), written[group].transpose(0, 1)).transpose(0, 1)
        before[first] = state
        before[first + 1 : first + GROUP] = behind[:-1]
        state = behind[-1]
    before_GMKV = torch.unflatten(before, -1, size)
    return before_GMKV.flip(0) if backward else before_GMKV, torch.unflatten(state, -1, size).contiguous()


def _decays(log_l_BNH: Tensor, starts_BN: Tensor | None, dtype: torch.dtype) -> Decays:
    # Sums of 64 logarithms in double precision, where the device has it: a difference of two then rounds but once.
    widest = dtype if log_l_BNH.device.type == "mps" else torch.float64
    starts = None
    if starts_BN is not None:
        starts = _chunks(starts_BN.to(torch.int32)[:, :, None].expand(-1, -1, log_l_BNH.shape[2]), torch.int32).cumsum(
            -1, dtype=torch.int32
        )
    log_sum = _chunks(log_l_BNH, widest).cumsum(-1)
    return Decays(log_sum=log_sum, ahead=F.pad(log_sum[..., :-1], (1, 0)), starts=starts, dtype=dtype)


def _of_chains(skip_H: Tensor | None, batch_size: int) -> Tensor | None:
    """``(M, 1, 1)``."""
    return None if skip_H is None else skip_H.repeat(batch_size)[:, None, None]


def _chunks(x_BNH: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, N, H, ...)`` as ``(G, B H, C, ...)``, the last chunk filled with zeros: no decay, nothing written."""
    batch_size, length, heads, *size = x_BNH.shape
    num_chunks = -(-length // CHUNK)
    chunks = torch.zeros if num_chunks * CHUNK > length else torch.empty
    out = chunks(num_chunks, batch_size, heads, CHUNK, *size, dtype=dtype, device=x_BNH.device)
    whole = length // CHUNK
    # (G, B, C, H, ...), seen as the tokens lie.
    seen = out.movedim(3, 2)
    seen[:whole] = torch.unflatten(x_BNH[:, : whole * CHUNK], 1, (whole, CHUNK)).transpose(0, 1)
    if whole < num_chunks:
        seen[whole, :, : length - whole * CHUNK] = x_BNH[:, whole * CHUNK :]
    return out.flatten(1, 2)


def _tokens(x_GMC: Tensor, batch_size: int, length: int) -> Tensor:
    """The inverse of ``_chunks``, contiguous."""
    num_chunks = x_GMC.shape[0]
    chunks = torch.unflatten(x_GMC, 1, (batch_size, -1)).transpose(0, 1).movedim(3, 2)  # (B, G, C, H, ...)
    return chunks.reshape(batch_size, num_chunks * CHUNK, *chunks.shape[3:])[:, :length].contiguous()


def _slabs(x_GMC: Tensor) -> Iterator[slice]:
    per_chunk = x_GMC.shape[1] * CHUNK * CHUNK * x_GMC.element_size()
    step = max(1, SLAB_BYTES // max(1, per_chunk))
    for first in range(0, x_GMC.shape[0], step):
        yield slice(first, first + step)
