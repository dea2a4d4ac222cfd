"""Chunks as Triton kernels: what is between two tokens of a chunk never reaches memory.

Three kernels go forward: what each chunk writes to the state (in parallel), a scan over each chain's chunks that leaves
the state before each one, and every chunk's output. Backward does the first two again, the same two from the other end
with q and o' for k and v, and one kernel that has all gradients of a chunk. States are summed in float32 and read in
the type of the keys; L is summed in float64 and used as two float32 numbers.

One program holds whole heads: widths up to ``operators.WIDEST_KERNEL``. The formulas are in ``chunked``.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from resnet_bk.ops.carry.chunked import CHUNK
from resnet_bk.ops.carry.gpu_kernels import adjoint_kernel, output_kernel, scan_kernel, written_kernel
from resnet_bk.ops.carry.operators import WIDEST_KERNEL

SCAN_BLOCK = 256


def carry(
    q_BNHK: Tensor,
    k_BNHK: Tensor,
    v_BNHV: Tensor,
    log_l_BNH: Tensor,
    starts_BN: Tensor | None,
    state_BHKV: Tensor,
    skip_H: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o ``(B, N, H, V)`` in v's type and the last state ``(B, H, K, V)`` in float32."""
    q, k, v = _same_type(q_BNHK, k_BNHK, v_BNHV)
    shape = _Shape(q, v, log_l_BNH, starts_BN)
    entry, final_BHKV, _ = shape.entry_states(k, v, state_BHKV)
    o_BNHV = v.new_empty(v.shape)
    output_kernel[shape.chunks](
        *_strided(q),
        *_strided(k),
        *_strided(v),
        *shape.decays,
        entry,
        shape.decays[0] if skip_H is None else skip_H.contiguous(),
        o_BNHV,
        *shape.counts,
        HAS_SKIP=skip_H is not None,
        **shape.constants(4),
    )
    return o_BNHV, final_BHKV


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
    """Gradients of q, k, v, log l, the initial state and skip."""
    q, k, v, grad = _same_type(q_BNHK, k_BNHK, v_BNHV, grad_o_BNHV)
    shape = _Shape(q, v, log_l_BNH, starts_BN)
    entry, _, through = shape.entry_states(k, v, state_BHKV)
    leaving, grad_state_BHKV, _ = shape.entry_states(q, grad, grad_final_BHKV, backward=True)
    grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    grad_log_BNH = torch.empty_like(shape.decays[0])
    skip_parts = grad_log_BNH if skip_H is None else grad_log_BNH.new_empty(shape.chains, shape.num_chunks)
    adjoint_kernel[shape.chunks](
        *_strided(grad),
        *_strided(q),
        *_strided(k),
        *_strided(v),
        *shape.decays,
        entry,
        leaving,
        through,
        shape.decays[0] if skip_H is None else skip_H.contiguous(),
        grad_q,
        grad_k,
        grad_v,
        grad_log_BNH,
        skip_parts,
        *shape.counts,
        HAS_SKIP=skip_H is not None,
        **shape.constants(4),
    )
    grad_skip_H = None
    if skip_H is not None:
        grad_skip_H = skip_parts.view(shape.batch_size, shape.heads, shape.num_chunks).sum((0, 2))
    return grad_q, grad_k, grad_v, grad_log_BNH, grad_state_BHKV, grad_skip_H


class _Shape:
    """What all launches of a call share."""

    def __init__(self, q: Tensor, v: Tensor, log_l_BNH: Tensor, starts_BN: Tensor | None) -> None:
        self.batch_size, self.length, self.heads, self.key_size = q.shape
        self.value_size = v.shape[-1]
        if max(self.key_size, self.value_size) > WIDEST_KERNEL or log_l_BNH.dtype == torch.float64:
            raise ValueError(
                f"the triton backend has heads up to {WIDEST_KERNEL} wide in float32 and below, not "
                f"{self.key_size} and {self.value_size} in {log_l_BNH.dtype}; use backend='torch'"
            )
        self.num_chunks = triton.cdiv(self.length, CHUNK)
        self.chains = self.batch_size * self.heads
        self.chunks = (self.chains * self.num_chunks,)
        log_l_BNH = log_l_BNH.contiguous()
        # A tensor that nobody reads stands where there are no starts.
        self.decays = (log_l_BNH, log_l_BNH if starts_BN is None else starts_BN.to(torch.uint8).contiguous())
        self.counts = (self.length, self.num_chunks)
        self.has_starts = starts_BN is not None
        # tf32 alone would leave float32 three digits.
        self.precision = "tf32x3" if q.dtype == torch.float32 else "tf32"

    def constants(self, num_warps: int) -> dict[str, Any]:
        """The kernels' compile-time arguments."""
        return {
            "heads": self.heads,
            "key_size": self.key_size,
            "value_size": self.value_size,
            "HAS_STARTS": self.has_starts,
            "PRECISION": self.precision,
            "C": CHUNK,
            "K": _tile(self.key_size),
            "V": _tile(self.value_size),
            "num_warps": num_warps,
        }

    def entry_states(
        self, x: Tensor, y: Tensor, state_BHKV: Tensor, *, backward: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The state before each chunk in x's type, the one behind the last, and each chunk's decay.

        ``backward`` has the gradient of the state behind each chunk, and of the one before the first.
        """
        size = self.key_size * self.value_size
        written = x.new_empty(self.chains, self.num_chunks, size, dtype=torch.float32)
        through = x.new_empty(self.chains, self.num_chunks, dtype=torch.float32)
        written_kernel[self.chunks](
            *_strided(x),
            *_strided(y),
            *self.decays,
            written,
            through,
            *self.counts,
            heads=self.heads,
            x_size=self.key_size,
            y_size=self.value_size,
            ENTRY=backward,
            HAS_STARTS=self.has_starts,
            PRECISION=self.precision,
            C=CHUNK,
            X=_tile(self.key_size),
            Y=_tile(self.value_size),
        )
        before = torch.empty_like(written, dtype=x.dtype)
        last_BHKV = torch.empty_like(state_BHKV, memory_format=torch.contiguous_format)
        scan_kernel[(self.chains, triton.cdiv(size, SCAN_BLOCK))](
            written,
            through,
            state_BHKV.contiguous(),
            before,
            last_BHKV,
            self.num_chunks,
            size,
            REVERSE=backward,
            BLOCK=SCAN_BLOCK,
            num_warps=2,
        )
        return before, last_BHKV, through


def _tile(size: int) -> int:
    """Width of a tile that holds ``size`` columns: a power of two, at least what a matrix unit takes."""
    return max(16, int(triton.next_power_of_2(size)))


def _same_type(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in the type of the first, columns next to each other."""
    return tuple(
        x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        for x in (y.to(tensors[0].dtype) for y in tensors)
    )


def _strided(x: Tensor) -> tuple[Tensor, int, int, int]:
    return x, x.stride(0), x.stride(1), x.stride(2)
