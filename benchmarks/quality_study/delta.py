"""The gated delta rule: a write first takes away what is read under its key.

    S_i = l_i S_{i-1} (I - beta_i k_i k_i^T) + beta_i k_i v_i^T,   o_i = q_i S_i

with keys of unit length; states are K x V and act on rows, so that in code S_i = l_i (S - beta k (k S)) + beta k v.
Source: S. Yang et al., "Gated Delta Networks" (2024), whose WY form is the chunked one here. ``C`` is the tokens of a
chunk, ``G`` the chunks, ``M`` batch times heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def delta_recurrent(q: Tensor, k: Tensor, v: Tensor, log_l: Tensor, beta: Tensor) -> Tensor:
    """The definition, token by token. q, k ``(B, N, H, K)``, v ``(B, N, H, V)``, log_l and beta ``(B, N, H)``."""
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for i in range(q.shape[1]):
        key, decay = k[:, i], log_l[:, i].exp()[..., None, None]
        read = torch.einsum("bhk,bhkv->bhv", key, state) * decay.squeeze(-1)
        write = beta[:, i, :, None] * (v[:, i] - read)
        state = decay * state + key.unsqueeze(-1) * write.unsqueeze(-2)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, i], state))
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(v)


def delta_chunked(q: Tensor, k: Tensor, v: Tensor, log_l: Tensor, beta: Tensor, chunk: int = CHUNK) -> Tensor:
    """The same by matrix products, in float32 at least; shapes as in :func:`delta_recurrent`."""
    (batch_size, length, heads, _), out_dtype = q.shape, v.dtype
    dtype = torch.promote_types(log_l.dtype, torch.float32)
    q, k, v = (_chunks(part.to(dtype), chunk) for part in (q, k, v))
    log_l, beta = (_chunks(part.to(dtype).unsqueeze(-1), chunk) for part in (log_l, beta))
    sums_MGC1 = log_l.cumsum(2)
    # Differences of log-sums first: of later minus earlier, never exp of a large positive number.
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    decay_MGCC = torch.where(lower, sums_MGC1 - sums_MGC1.mT, -torch.inf).exp()
    overlap_MGCC = (beta * k) @ k.mT * decay_MGCC
    system_MGCC = torch.eye(chunk, dtype=dtype, device=q.device) + overlap_MGCC.tril(-1)
    # What each token writes: u minus w times the state before the chunk.
    right = torch.cat([beta * v, beta * k * sums_MGC1.exp()], dim=-1)
    u, w = torch.linalg.solve_triangular(system_MGCC, right, upper=False, unitriangular=True).split(
        [v.shape[-1], k.shape[-1]], dim=-1
    )
    inside_MGCC = q @ k.mT * decay_MGCC
    from_before = q * sums_MGC1.exp()
    to_end = k * (sums_MGC1[:, :, -1:] - sums_MGC1).exp()
    state = q.new_zeros(q.shape[0], q.shape[3], v.shape[3])
    outputs = []
    for g in range(q.shape[1]):
        written = u[:, g] - w[:, g] @ state
        outputs.append(from_before[:, g] @ state + inside_MGCC[:, g] @ written)
        state = sums_MGC1[:, g, -1:].exp() * state + to_end[:, g].mT @ written
    o_MNV = torch.cat(outputs, 1)[:, :length]
    return o_MNV.unflatten(0, (batch_size, heads)).transpose(1, 2).to(out_dtype)


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """``(B, N, H, X)`` to ``(B H, G, C, X)``, zeros behind the last token."""
    x = x.transpose(1, 2).flatten(0, 1)
    x = F.pad(x, (0, 0, 0, -x.shape[1] % chunk))
    return x.unflatten(1, (-1, chunk))
