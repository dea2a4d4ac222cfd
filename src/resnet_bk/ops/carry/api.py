"""The public carry: it checks its arguments, turns keys and queries by the phases of l, and calls one operator."""

from typing import Literal, get_args

import torch
from torch import Tensor

from resnet_bk.imagined import kind_of
from resnet_bk.ops import one_token
from resnet_bk.ops.bk.api import HAS_TRITON, BackendChoice
from resnet_bk.ops.carry import operators, reference
from resnet_bk.ops.carry.operators import WIDEST_KERNEL
from resnet_bk.ops.rotation import rotate

CarryForm = Literal["chunked", "recurrent", "quadratic"]
CarryBackend = Literal["auto", "torch", "triton"]


def choose_carry_backend(
    device: torch.device, dtype: torch.dtype = torch.float32, width: int = WIDEST_KERNEL
) -> BackendChoice:
    """What ``backend="auto"`` means on ``device``, for the chunked form of heads that are ``width`` wide."""
    kind = kind_of(device)
    if kind == "cpu":
        return BackendChoice(name="torch", reason="chunks as batched matrix products of torch's BLAS; decays by numba")
    if kind != "cuda" or not HAS_TRITON:
        why = "triton is not installed" if kind == "cuda" else f"there are no compiled kernels on {kind}"
        return BackendChoice(name="torch", reason=f"chunks as batched matrix products, since {why}")
    if dtype == torch.float64 or width > WIDEST_KERNEL:
        why = "in double precision" if dtype == torch.float64 else f"for heads wider than {WIDEST_KERNEL}"
        return BackendChoice(name="torch", reason=f"chunks as batched matrix products: no kernels {why}")
    return BackendChoice(name="triton", reason="chunks on the tensor cores, their pairs never in memory")


def bk_carry(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_l: Tensor,
    *,
    angle: Tensor | None = None,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
    skip: Tensor | None = None,
    output_final_state: bool = False,
    form: CarryForm = "chunked",
    backend: CarryBackend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Content carried by the causal resolvent: linear attention whose decays are ratios l of determinants.

        S_i = l_i (S_{i-1} + k_i v_i^T),   o_i = q_i S_i + skip v_i

    so that q_i S_i = sum_{j <= i} (q_i . k_j) [(H_{<=i} - z)^-1]_ij v_j for the chain cut at i with off-diagonals -1.
    In the tunnelling regime ``log_l`` is that of ``bk_tunnel``. In the scattering regime l is complex, ``log_l`` is
    log|l| and ``angle`` is arg l: coordinates (i, i + K/2) of keys, queries and states are then real and imaginary part
    of one number, and Re(conj(q_i) S_i) is read.

    Args:
        q, k: queries and keys, ``(B, N, H, K)``.
        v: values, ``(B, N, H, V)``. K = 1 with q = k = 1 carries v itself: a vector as state.
        log_l: ``(B, N, H)``, real. Products of l stay bounded, as entries of a resolvent do.
        angle: ``(B, N, H)``, real; K must then be even.
        starts: bool ``(B, N)``, where documents begin: nothing is carried across. ``log_l`` must come from chains that
            are cut there too.
        initial_state: S behind the preceding token, real ``(B, H, K, V)``.
        skip: ``(H,)``, real: each head's share of a token's own v in its output; None for none.
        output_final_state: also return S behind the last token.
        form: ``"chunked"`` (matrix products, O(N)), ``"recurrent"`` (token by token, for decoding) or ``"quadratic"``
            (every pair, in double precision: the reference).
        backend: of the chunked form: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        o, ``(B, N, H, V)`` in v's type; and, if asked, the last S, ``(B, H, K, V)``, in float64 for float64 ``log_l``
        and else in float32, which is also the type of all sums.

    Raises:
        ValueError: a shape, dtype or value does not fit; the message names the mend.
    """
    _check(q, k, v, log_l, angle, starts, initial_state, skip)
    for name, value, choices in (("form", form, CarryForm), ("backend", backend, CarryBackend)):
        if value not in get_args(choices):
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(get_args(choices))}")
    dtype = torch.float64 if log_l.dtype == torch.float64 else torch.float32
    batch_size, length, heads, key_size = q.shape
    if initial_state is None:
        state = torch.zeros(batch_size, heads, key_size, v.shape[-1], dtype=dtype, device=v.device)
    else:
        state = initial_state.to(dtype)
    log_l = log_l.to(dtype)
    skip = None if skip is None else skip.to(dtype)
    last = None
    if angle is not None and length:
        q, k, last = _turned(q, k, angle)
    if length == 0:
        o, final = v, state
    elif form == "quadratic":
        o, final = reference.carry_quadratic(q, k, v, log_l, starts, state, skip)
    elif form == "recurrent":
        o, final = _recurrent(q, k, v, log_l, starts, state, skip)
    else:
        chosen = choose_carry_backend(v.device, dtype, max(key_size, v.shape[-1]))
        name = chosen.name if backend == "auto" else backend
        o, final = operators.carry(q, k, v, log_l, starts, state, skip, name)
    o = o.to(v.dtype)
    if not output_final_state:
        return o
    if last is not None:
        final = _turn(final.mT, last.unsqueeze(-1)).mT
    return o, final.to(dtype)


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_l: Tensor, starts: Tensor | None, state: Tensor, skip: Tensor | None
) -> tuple[Tensor, Tensor]:
    tokens = q.shape[0] * q.shape[1]
    if starts is None and skip is not None and one_token.is_alone(tokens, q, k, v, log_l, state, skip):
        return one_token.carry(q, k, v, log_l, state, skip)
    return reference.carry_recurrent(q, k, v, log_l, starts, state, skip)


def _turned(q: Tensor, k: Tensor, angle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys turned back to the phase of the state before the first token, and the last token's phase.

    With the phase T_i = arg l_1 + ... + arg l_i, Re(conj(q_i) exp(i (T_i - T_{j-1})) k_j) is the real product of
    exp(-i T_i) q_i and exp(-i T_{j-1}) k_j. Phases are summed in double precision, where the device has it, and only
    then reduced: their error does not grow with N.
    """
    widest = angle.dtype if angle.device.type == "mps" else torch.float64
    wide = angle.to(widest)
    phase = wide.cumsum(1)
    before, phase = ((-x).remainder(2 * torch.pi).to(angle.dtype) for x in (phase - wide, phase))
    return _turn(q, phase), _turn(k, before), -phase[:, -1]


def _turn(x: Tensor, angle: Tensor) -> Tensor:
    """Each vector of ``x`` turned by its own angle."""
    return rotate(x, angle.cos().unsqueeze(-1), angle.sin().unsqueeze(-1))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_l: Tensor,
    angle: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    skip: Tensor | None,
) -> None:
    if q.dim() != 4 or q.shape != k.shape:
        raise ValueError(f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; give both (batch, tokens, heads, K)")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v has shape {tuple(v.shape)}; give {(*q.shape[:3], 'V')}, as q and k have it")
    wanted: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("log_l", log_l, tuple(q.shape[:3])),
        ("angle", angle, tuple(q.shape[:3])),
        ("initial_state", initial_state, (q.shape[0], q.shape[2], q.shape[3], v.shape[3])),
        ("skip", skip, (q.shape[2],)),
    ]
    for name, x, shape in wanted:
        if x is not None and (tuple(x.shape) != shape or not x.is_floating_point()):
            raise ValueError(f"{name} is {x.dtype} of shape {tuple(x.shape)}; give a real tensor of shape {shape}")
    if starts is not None and (starts.shape != q.shape[:2] or starts.dtype != torch.bool):
        raise ValueError(
            f"starts is {starts.dtype} of shape {tuple(starts.shape)}; give a bool tensor of shape {tuple(q.shape[:2])}"
        )
    if angle is not None and q.shape[-1] % 2:
        raise ValueError(f"K is {q.shape[-1]}; with an angle keys are complex numbers, give an even K")
