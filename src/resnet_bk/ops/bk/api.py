"""The public BK-Core functions: they check their arguments, choose a backend, and call one operator."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from resnet_bk.imagined import kind_of
from resnet_bk.ops.bk import operators, reference

Backend = Literal["auto", "reference", "torch", "cpu", "triton"]
Gradient = Literal["exact", "blend"]
# Looked up once, since torch.compile cannot follow the search for a package.
HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True, kw_only=True)
class BackendChoice:
    """Which implementation an operator runs on a device, and why."""

    name: str
    reason: str


def available_backends() -> tuple[str, ...]:
    """The backends that this installation has, fastest first; each says by itself which devices it is for."""
    return (*(("triton",) if HAS_TRITON else ()), "cpu", "torch", "reference")


def choose_backend(device: torch.device) -> BackendChoice:
    """What ``backend="auto"`` means on ``device``."""
    kind = kind_of(device)
    if kind == "cpu":
        return BackendChoice(name="cpu", reason="sweeps compiled by numba, vectorised over chains, in threads")
    if kind == "cuda" and HAS_TRITON:
        return BackendChoice(name="triton", reason="one pass over memory, chunks started from a halo that is proven")
    why = "triton is not installed" if kind == "cuda" else "no compiled kernels there"
    return BackendChoice(name="torch", reason=f"blocks side by side in plain torch, slower; on {kind} because {why}")


def bk_core(
    v: Tensor,
    z: complex | Tensor,
    *,
    h0: float | Tensor = -2.0,
    hopping: float | Tensor = 1.0,
    causal: bool = True,
    grad: Gradient = "exact",
    blend: float = 0.5,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Diagonal of the resolvent (H - z)^-1 of tridiagonal Hamiltonians, in O(N).

    H has the diagonal ``h0 + v_i`` and off-diagonal products ``hopping``. The causal form gives
    [(H_{<=i} - z)^-1]_ii, the resolvent of the chain cut at i, which depends on tokens up to i only; the
    bidirectional one gives [(H - z)^-1]_ii, which reads the future.

    Args:
        v: potential, real ``(B, N, H)``: rows, tokens, heads (independent chains).
        z: complex energy E + i eta with eta > 0: a Python number, or a complex ``(H,)`` tensor, whose values are not
            read (that would wait for the device), so parametrise eta to be positive.
        h0: constant part of the diagonal, a float or real ``(H,)``.
        hopping: products b_i c_i >= 0 of the off-diagonals: a float, real ``(H,)``, or real ``(B, N-1, H)`` for each
            bond. With ``initial_state``, ``(B, N, H)``, where the first joins the state to the first token.
        causal: False for the bidirectional form.
        grad: ``"exact"`` for the adjoint, all of dG_jj/dv_i = -G_ji G_ij, with gradients of every input.
            ``"blend"`` for the analytic rule dL/dv_i = -Re[conj(g_i) ((1 - blend) G_ii^2 + blend / G_ii^2)] with g the
            gradient that torch hands to G; z and h0 follow it, ``hopping`` and ``initial_state`` must not require a
            gradient. |1 / G^2| is bounded at 1e6.
        blend: share of the inverse in the analytic rule, from 0 to 1.
        initial_state: complex ``(B, H)``, the final state of the preceding tokens (causal form only).
        output_final_state: also return the state after the last token, which is the last l (causal form only).
        backend: ``"auto"``; ``"cpu"`` or ``"triton"`` (compiled sweeps), ``"torch"`` (every device) or ``"reference"``
            (the definition in complex128).

    Returns:
        G, complex ``(B, N, H)``: complex128 for float64 input, complex64 for every other; and, if asked, the final
        state, complex ``(B, H)``.

    Raises:
        ValueError: a shape, dtype or value does not fit; the message names the mend.
    """
    _check_sequence("v", v)
    if not causal and (initial_state is not None or output_final_state):
        raise ValueError("states belong to the causal form; leave them out or set causal=True")
    complex_dtype = torch.complex128 if v.dtype == torch.float64 else torch.complex64
    state_BH2 = None
    if initial_state is not None:
        _check_state(initial_state, v, complex_state=True)
        state_BH2 = torch.view_as_real(initial_state.to(complex_dtype).resolve_conj())
    pairs_BNH2 = bk_core_pairs(
        v,
        torch.view_as_real(_diagonal_shift(v, z, h0, complex_dtype)),
        hopping=hopping,
        causal=causal,
        grad=grad,
        blend=blend,
        initial_state=state_BH2,
        backend=backend,
    )
    result = torch.view_as_complex(pairs_BNH2)
    if not output_final_state:
        return result
    if v.shape[1]:
        return result, result[:, -1]
    nothing = torch.zeros(v.shape[0], v.shape[2], dtype=complex_dtype, device=v.device)
    return result, nothing if initial_state is None else initial_state.to(complex_dtype)


def bk_core_pairs(
    v: Tensor,
    shift: Tensor,
    *,
    hopping: float | Tensor = 1.0,
    causal: bool = True,
    grad: Gradient = "exact",
    blend: float = 0.5,
    initial_state: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """``bk_core`` with complex numbers as pairs of reals: what layers use, since compilers generate no complex code.

    Args:
        v: as in ``bk_core``, ``(B, N, H)``.
        shift: h0 - z, real ``(H, 2)``: (h0 - E, -eta) of each head.
        initial_state: real ``(B, H, 2)``.
        hopping, causal, grad, blend, backend: as in ``bk_core``.

    Returns:
        (Re G, Im G), ``(B, N, H, 2)``, float64 for float64 ``v`` and float32 for every other.

    Raises:
        ValueError: a shape, dtype or value does not fit; the message names the mend.
    """
    _check_sequence("v", v)
    _check_choices(grad=grad, backend=backend)
    if not 0 <= blend <= 1:
        raise ValueError(f"blend is {blend}; it is a share, give a number from 0 to 1")
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    batch_size, length, heads = v.shape
    if shift.shape != (heads, 2) or not shift.is_floating_point():
        raise ValueError(f"shift is {_describe(shift)}; give a real tensor of shape ({heads}, 2): h0 - E and -eta")
    shift = shift.to(dtype)
    bonds = _bonds(v, hopping, dtype, has_state=initial_state is not None)
    if initial_state is None:
        state = torch.zeros(batch_size, heads, 2, dtype=dtype, device=v.device)
    else:
        state = initial_state.to(dtype)
    if grad == "blend":
        _check_blend_inputs(bonds, state)
    if length == 0:
        return v.to(dtype).unsqueeze(-1) + shift
    share = float(blend) if grad == "blend" else None
    if backend == "reference":
        return _reference(v, shift, bonds, state, causal, share)
    name = choose_backend(v.device).name if backend == "auto" else backend
    if causal:
        pairs: Tensor = operators.bk_causal(v, shift, bonds, state, share, name)
    else:
        pairs = operators.bk_bidirectional(v, shift, bonds, share, name)
    return pairs


def bk_tunnel(
    w: Tensor,
    *,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log l of the causal chain in the tunnelling regime: real energy below the band, bonds 1.

    With u_i = h0 + v_i - E >= 2 everything is real and 0 < l_i <= 1, without any eta. The argument is the gap
    w = u - 2, never u, which loses a small w to rounding: with m = 1 - l,

        log l_i = -log1p(w_i + m_{i-1}),   m_i = (w_i + m_{i-1}) / (1 + w_i + m_{i-1}).

    For constant w, l tends to exp(-kappa) with cosh kappa = 1 + w/2: a memory of about w^(-1/2) tokens.

    Args:
        w: gap, real ``(B, N, H)``, w >= 0 (not checked: reading values would wait for the device).
        starts: bool ``(B, N)``, where documents begin: the chain is cut there, and m before it is 1.
        initial_state: m = 1 - l of the preceding token, real ``(B, H)``; before a first token m is 1. The state is m
            and not l because 1 - l loses a small m to rounding.
        output_final_state: also return m after the last token.
        backend: as in ``bk_core``; the reference has the determinants in float64.

    Returns:
        log l, real ``(B, N, H)``: float64 for float64 input, float32 for every other; and, if asked, the final m,
        real ``(B, H)``.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the mend.
    """
    _check_sequence("w", w)
    _check_choices(grad="exact", backend=backend)
    dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
    batch_size, length, heads = w.shape
    if initial_state is None:
        state = torch.ones(batch_size, heads, dtype=dtype, device=w.device)
    else:
        _check_state(initial_state, w, complex_state=False)
        state = initial_state.to(dtype)
    if starts is not None:
        if starts.shape != w.shape[:2] or starts.dtype != torch.bool:
            raise ValueError(f"starts is {_describe(starts)}; give a bool tensor of shape {tuple(w.shape[:2])}")
        log_l = _tunnel_of_documents(w.to(dtype), starts, state, backend)
    else:
        log_l = _tunnel(w, state, backend)
    if not output_final_state:
        return log_l
    return log_l, -torch.expm1(log_l[:, -1]) if length else state


def _tunnel(w: Tensor, state: Tensor, backend: Backend) -> Tensor:
    if w.shape[1] == 0:
        return w.to(state.dtype)
    if backend == "reference":
        return reference.bk_tunnel_reference(w, state).to(state.dtype)
    if backend == "auto" and w.shape[1] == 1 and not torch.is_grad_enabled():
        return -torch.log1p(w.to(state.dtype) + state.unsqueeze(1))  # decoding: the operator's dispatch takes longer
    log_l: Tensor = operators.bk_tunnel(w, state, choose_backend(w.device).name if backend == "auto" else backend)
    return log_l


def _tunnel_of_documents(w: Tensor, starts: Tensor, state: Tensor, backend: Backend) -> Tensor:
    """The chain cut at ``starts``, in one sweep.

    A gap beyond rounding in the last token of a document leaves m = 1 behind it, which is a cut. That token's own l
    then follows from its real gap and the m before it, which the sweep has right.
    """
    last_BN1 = torch.zeros_like(starts)
    last_BN1[:, :-1] = starts[:, 1:]
    last_BN1 = last_BN1.unsqueeze(-1)
    log_l = _tunnel(torch.where(last_BN1, 4 / torch.finfo(w.dtype).eps, w), state, backend)
    m_before = torch.cat([state.unsqueeze(1), -torch.expm1(log_l[:, :-1])], dim=1)[:, : w.shape[1]]
    return torch.where(last_BN1, -torch.log1p(w + m_before), log_l)


def _reference(
    v_BNH: Tensor, shift_H2: Tensor, bonds: Tensor, state_BH2: Tensor, causal: bool, blend: float | None
) -> Tensor:
    if blend is not None:
        raise ValueError("the reference differentiates its own definition; use grad='exact' or another backend")
    shift_H, state_BH = torch.view_as_complex(shift_H2), torch.view_as_complex(state_BH2)
    if causal:
        result = reference.bk_causal_reference(v_BNH, shift_H, bonds, state_BH)
    else:
        result = reference.bk_bidirectional_reference(v_BNH, shift_H, bonds)
    return torch.view_as_real(result.to(shift_H.dtype))


def _diagonal_shift(v: Tensor, z: complex | Tensor, h0: float | Tensor, dtype: torch.dtype) -> Tensor:
    """h0 - z for each head, contiguous ``(H,)``."""
    heads = v.shape[2]
    if isinstance(z, Tensor):
        if not z.is_complex() or z.shape not in ((heads,), ()):
            raise ValueError(f"z is {_describe(z)}; give a Python complex or a complex tensor of shape ({heads},)")
        energy = z.to(device=v.device, dtype=dtype)
    else:
        if complex(z).imag <= 0:
            raise ValueError(f"Im z is {complex(z).imag}; the resolvent needs Im z > 0, for example z=1j")
        energy = torch.tensor(complex(z), dtype=dtype, device=v.device)
    if isinstance(h0, Tensor) and (h0.is_complex() or h0.shape not in ((heads,), ())):
        raise ValueError(f"h0 is {_describe(h0)}; give a float or a real tensor of shape ({heads},)")
    base = h0.to(v.device) if isinstance(h0, Tensor) else float(h0)
    return (base - energy).to(dtype).expand(heads).contiguous()


def _bonds(v: Tensor, hopping: float | Tensor, dtype: torch.dtype, *, has_state: bool) -> Tensor:
    """Bonds as the operators take them: ``(H,)``, or the one to the left of each site, ``(B, N, H)``."""
    batch_size, length, heads = v.shape
    if not isinstance(hopping, Tensor):
        if not float(hopping) >= 0:
            raise ValueError(f"hopping is {hopping}; products b c of the off-diagonals must be >= 0")
        return torch.full((heads,), float(hopping), dtype=dtype, device=v.device)
    if hopping.is_complex():
        raise ValueError(f"hopping is {_describe(hopping)}; it must be real")
    if hopping.shape in ((heads,), ()):
        return hopping.to(device=v.device, dtype=dtype).expand(heads).contiguous()
    inner = (batch_size, max(length - 1, 0), heads)
    if has_state and hopping.shape == v.shape:
        return hopping.to(dtype).contiguous()
    if hopping.shape != inner or has_state:
        wanted = f"{tuple(v.shape)}, the first bond joining the state" if has_state else f"{inner}"
        raise ValueError(f"hopping has shape {tuple(hopping.shape)}; give a float, ({heads},) or {wanted}")
    before_first = torch.zeros(batch_size, min(length, 1), heads, dtype=dtype, device=v.device)
    return torch.cat([before_first, hopping.to(dtype)], dim=1)


def _check_sequence(name: str, x: Tensor) -> None:
    if x.dim() != 3:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; give (batch, tokens, heads)")
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}; give a real floating-point tensor")


def _check_choices(*, grad: str, backend: str) -> None:
    if grad not in ("exact", "blend"):
        raise ValueError(f"grad is {grad!r}; choose 'exact' or 'blend'")
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; choose one of {', '.join(get_args(Backend))}")


def _check_state(state: Tensor, v: Tensor, *, complex_state: bool) -> None:
    wanted = (v.shape[0], v.shape[2])
    if state.shape != wanted or state.is_complex() != complex_state:
        kind = "complex" if complex_state else "real"
        raise ValueError(f"initial_state is {_describe(state)}; give a {kind} tensor of shape {wanted}")


def _check_blend_inputs(bonds: Tensor, state: Tensor) -> None:
    if torch.is_grad_enabled() and (bonds.requires_grad or state.requires_grad):
        raise ValueError("grad='blend' has no gradient for hopping or initial_state; detach them or use 'exact'")


def _describe(x: Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}"
