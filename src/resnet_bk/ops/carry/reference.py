"""The definition of the carry, twice, in double precision: every pair of tokens, and token by token.

    quadratic   o_i = sum_{j <= i} (q_i . k_j) (prod_{j <= t <= i} l_t) v_j + (prod_{t <= i} l_t) q_i S_0 + skip v_i
    recurrent   S_i = l_i (S_{i-1} + k_i v_i^T),   o_i = q_i S_i + skip v_i

The products are the entries [(H_{<=i} - z)^-1]_ij of the resolvent of the chain cut at i, whose off-diagonals are -1.
Autograd differentiates straight through. The quadratic form is the oracle; the recurrent one, in whatever type it is
given, is how a model decodes.
"""

import torch
from torch import Tensor


def carry_quadratic(
    q_BNHK: Tensor,
    k_BNHK: Tensor,
    v_BNHV: Tensor,
    log_l_BNH: Tensor,
    starts_BN: Tensor | None,
    state_BHKV: Tensor,
    skip_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o ``(B, N, H, V)`` and the last state ``(B, H, K, V)``, real or complex, in double precision.

    For complex arguments q enters conjugated, ``o = Re(conj(q) S)``, and ``log l`` is log|l| + i arg l.
    """
    wide = torch.complex128 if log_l_BNH.is_complex() else torch.float64
    q, k, v, log_l, state = (x.to(wide) for x in (q_BNHK, k_BNHK, v_BNHV, log_l_BNH, state_BHKV))
    k = k * log_l.exp().unsqueeze(-1)
    sums_BHN = log_l.cumsum(1).transpose(1, 2)
    length = sums_BHN.shape[-1]
    document_BN = torch.zeros_like(q[:, :, 0, 0].real) if starts_BN is None else starts_BN.cumsum(1)
    related_BNN = (document_BN[:, :, None] == document_BN[:, None, :]) & torch.ones(
        length, length, dtype=torch.bool, device=q.device
    ).tril()
    entered_BN = document_BN == 0
    differences = sums_BHN[..., :, None] - sums_BHN[..., None, :]
    decay_BHNN = torch.where(related_BNN[:, None], differences, 0).exp() * related_BNN[:, None]
    entry_BNH = torch.where(entered_BN[:, None], sums_BHN, 0).exp().transpose(1, 2) * entered_BN[..., None]
    scores_BHNN = torch.einsum("bnhk,bmhk->bhnm", q.conj(), k) * decay_BHNN
    o_BNHV = torch.einsum("bhnm,bmhv->bnhv", scores_BHNN, v)
    o_BNHV = o_BNHV + torch.einsum("bnhk,bhkv->bnhv", q.conj() * entry_BNH.unsqueeze(-1), state)
    o_BNHV = o_BNHV.real if skip_H is None else o_BNHV.real + skip_H.unsqueeze(-1).to(torch.float64) * v.real
    if length == 0:
        return o_BNHV, state
    final_BHKV = torch.einsum("bhm,bmhk,bmhv->bhkv", decay_BHNN[:, :, -1], k, v)
    return o_BNHV, final_BHKV + entry_BNH[:, -1, :, None, None] * state


def carry_recurrent(
    q_BNHK: Tensor,
    k_BNHK: Tensor,
    v_BNHV: Tensor,
    log_l_BNH: Tensor,
    starts_BN: Tensor | None,
    state_BHKV: Tensor,
    skip_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o ``(B, N, H, V)`` and the last state ``(B, H, K, V)``, in the state's type, token by token."""
    dtype = state_BHKV.dtype
    q_BNHK, k_BNHK, v_BNHV = (x.to(dtype) for x in (q_BNHK, k_BNHK, v_BNHV))
    l_BNH = log_l_BNH.to(dtype).exp()
    k_BNHK = k_BNHK * l_BNH.unsqueeze(-1)
    if starts_BN is not None:
        # What is before is cut; the token's own key has its l all the same.
        l_BNH = torch.where(starts_BN.unsqueeze(-1), 0, l_BNH)
    outputs = []
    for q_BHK, k_BHK, v_BHV, l_BH in zip(*(x.unbind(1) for x in (q_BNHK, k_BNHK, v_BNHV, l_BNH)), strict=True):
        state_BHKV = torch.addcmul(l_BH[..., None, None] * state_BHKV, k_BHK.unsqueeze(-1), v_BHV.unsqueeze(-2))
        outputs.append((q_BHK.unsqueeze(-2) @ state_BHKV).squeeze(-2))
    o_BNHV = torch.stack(outputs, dim=1) if outputs else v_BNHV
    return (o_BNHV if skip_H is None else torch.addcmul(o_BNHV, skip_H.unsqueeze(-1), v_BNHV)), state_BHKV
