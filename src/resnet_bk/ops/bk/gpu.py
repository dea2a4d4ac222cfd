"""The sweeps as Triton kernels: one pass over memory, N in parallel, every chunk of tokens started by itself.

A **lane** is one chunk of tokens of one chain; a program sweeps ``LANES`` of them side by side, heads next to each
other and chunks after that. Tokens go through registers eight at a time, where there are heads enough to lie side by
side in memory; of one head alone a lane takes whole lines of memory at once, 32 tokens forward and 16 pairs backward,
and programs are of one warp, so that accesses are coalesced whether H is 64 or 1. The formulas are in ``scan``.

**Where a chunk starts.** The causal ratio before a chunk is not waited for. The kernel walks back from the chunk's
start until tokens further back provably do not matter. Walking back over sites j with r_j = 1 / (a_j - t_{j+1} r_{j+1})
it adds up the ratio that it came for, l <- l + q t r with q <- q t r^2 (q = t = 1 at first), and every state in the
upper half-plane that could enter on the left is mapped into a disc of diameter p / x, where both are at hand:

    p <- p t |r|^2,    x <- eta + t |r|^2 x    (p = 1, x = eta at first)

(p / x = |det M| / |Im(conj(M_10) M_11)| of the Moebius map M; every term of x is positive, so nothing cancels.) The
next ratio changes by at most a relative t p / (x eta), and the walk ends when that is below half a unit in the last
place. How far that is depends on the data, some twenty tokens at eta = 1, and never exceeds the row. The proof is in
docs/mathematics.md.

The adjoint is linear: what comes into a chunk is a series whose terms carry a running product of t conj(l^2), summed
until the product is below half a unit in the last place: then what is left out is that small a part of a gradient.

The tunnelling regime remembers for thousands of tokens, so there each chunk's Moebius map is composed first (positive
entries: nothing cancels), the maps are applied one after the other, and the chunks are swept from what that gives.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from resnet_bk.ops.bk.gpu_kernels import (
    apply_maps_kernel,
    bidirectional_kernel,
    causal_adjoint_kernel,
    causal_kernel,
    tunnel_adjoint_kernel,
    tunnel_adjoint_maps_kernel,
    tunnel_kernel,
    tunnel_maps_kernel,
)

LANES, LANES_OF_ONE_HEAD = 64, 32
LONGEST_CHUNK, SHORTEST_CHUNK = 1024, 16
BIDIRECTIONAL_CHUNK = 16  # in registers, see the kernel
# Chunks are as long as leaves this many lanes for the device to hide its latencies with.
WANTED_LANES = 1 << 17
CARRIED_CHUNK = 128
# Sites read and written at once by the causal sweeps: of many heads; of one, forward, backward, and before a chunk.
WIDTH, WIDTH_OF_ONE_HEAD, ADJOINT_WIDTH_OF_ONE_HEAD, HALO_OF_ONE_HEAD = 8, 32, 16, 16


def causal(v_BNH: Tensor, shift_H2: Tensor, bonds: Tensor, state_BH2: Tensor, *, reverse: bool = False) -> Tensor:
    """l_i for all i, ``(B, N, H, 2)``; ``reverse`` sweeps from the right end."""
    v_BNH = v_BNH.contiguous()
    out_BNH2 = shift_H2.new_empty(*v_BNH.shape, 2)
    program = _Program(v_BNH)
    chunk, num_lanes = program.cut()
    causal_kernel[program.grid(num_lanes)](
        v_BNH,
        shift_H2.contiguous(),
        bonds.contiguous(),
        state_BH2.contiguous(),
        out_BNH2,
        *v_BNH.shape[1:],
        chunk,
        num_lanes,
        _half_a_unit(shift_H2),
        PER_TOKEN=bonds.dim() == 3,
        REVERSE=reverse,
        WIDTH=program.of_one_head(WIDTH_OF_ONE_HEAD),
        HALO=program.of_one_head(HALO_OF_ONE_HEAD),
        **program.options,
    )
    return out_BNH2


def causal_adjoint(
    grad_BNH2: Tensor, l_BNH2: Tensor, bonds: Tensor, state_BH2: Tensor, *, wants_bonds: bool, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of v ``(B, N, H)``, shift ``(H, 2)``, bonds (as given; empty if not wanted), state ``(B, H, 2)``."""
    batch_size, length, heads, _ = l_BNH2.shape
    per_token = bonds.dim() == 3
    v_bar_BNH = l_BNH2.new_empty(batch_size, length, heads)
    program = _Program(v_bar_BNH)
    chunk, num_lanes = program.cut()
    shift_part = l_BNH2.new_empty(batch_size, num_lanes // heads, heads, 2)
    if not wants_bonds:
        bonds_bar = bonds.new_empty(0, *bonds.shape[1:])
    elif per_token:
        # Read from the right, the bond before a row's first site belongs to no site, and stays 0.
        bonds_bar = torch.zeros_like(v_bar_BNH)
    else:
        bonds_bar = l_BNH2.new_empty(batch_size, num_lanes // heads, heads)
    state_bar_BH2 = torch.empty_like(state_BH2, memory_format=torch.contiguous_format)
    causal_adjoint_kernel[program.grid(num_lanes)](
        grad_BNH2.contiguous(),
        l_BNH2.contiguous(),
        bonds.contiguous(),
        state_BH2.contiguous(),
        v_bar_BNH,
        shift_part,
        bonds_bar,
        state_bar_BH2,
        length,
        heads,
        chunk,
        num_lanes,
        _half_a_unit(l_BNH2),
        PER_TOKEN=per_token,
        WANTS_BONDS=wants_bonds,
        REVERSE=reverse,
        WIDTH=program.of_one_head(ADJOINT_WIDTH_OF_ONE_HEAD),
        **program.options,
    )
    shift_bar_H2 = shift_part.sum((0, 1), dtype=torch.float64).to(l_BNH2.dtype)
    if wants_bonds and not per_token:
        bonds_bar = bonds_bar.sum((0, 1), dtype=torch.float64).to(l_BNH2.dtype)
    return v_bar_BNH, shift_bar_H2, bonds_bar, state_bar_BH2


def bidirectional(v_BNH: Tensor, shift_H2: Tensor, bonds: Tensor) -> Tensor:
    """G_ii of the whole chain, ``(B, N, H, 2)``."""
    v_BNH = v_BNH.contiguous()
    out_BNH2 = shift_H2.new_empty(*v_BNH.shape, 2)
    program = _Program(v_BNH)
    num_lanes = triton.cdiv(v_BNH.shape[1], BIDIRECTIONAL_CHUNK) * v_BNH.shape[2]
    bidirectional_kernel[program.grid(num_lanes)](
        v_BNH,
        shift_H2.contiguous(),
        bonds.contiguous(),
        out_BNH2,
        *v_BNH.shape[1:],
        num_lanes,
        _half_a_unit(shift_H2),
        PER_TOKEN=bonds.dim() == 3,
        CHUNK=BIDIRECTIONAL_CHUNK,
        HALO=program.of_one_head(HALO_OF_ONE_HEAD),
        **program.options,
    )
    return out_BNH2


def tunnel(w_BNH: Tensor, state_BH: Tensor) -> Tensor:
    """log l_i = -log1p(w_i + m_{i-1}), ``(B, N, H)`` in the state's type."""
    w_BNH = w_BNH.contiguous()
    out_BNH = state_BH.new_empty(w_BNH.shape)
    launch = _Carried(w_BNH)
    tunnel_maps_kernel[launch.grid](w_BNH, launch.maps, *launch.arguments, LANES=LANES)
    entering = launch.entering(state_BH.contiguous())
    tunnel_kernel[launch.grid](w_BNH, entering, out_BNH, *launch.arguments, LANES=LANES)
    return out_BNH.log1p_().neg_()


def tunnel_adjoint(grad_BNH: Tensor, log_l_BNH: Tensor) -> Tensor:
    """Gradient of w ``(B, N, H)``; its first site is also that of the initial m."""
    grad_BNH, log_l_BNH = grad_BNH.contiguous(), log_l_BNH.contiguous()
    out_BNH = torch.empty_like(log_l_BNH)
    launch = _Carried(log_l_BNH)
    tunnel_adjoint_maps_kernel[launch.grid](grad_BNH, log_l_BNH, launch.maps, *launch.arguments, LANES=LANES)
    entering = launch.entering(torch.zeros_like(log_l_BNH[:, 0]))
    tunnel_adjoint_kernel[launch.grid](grad_BNH, log_l_BNH, entering, out_BNH, *launch.arguments, LANES=LANES)
    return out_BNH


class _Carried:
    """Shapes of a sweep in which each chunk waits for what enters it."""

    def __init__(self, like_BNH: Tensor) -> None:
        batch_size, length, heads = like_BNH.shape
        self.chains, self.heads = batch_size * heads, heads
        self.num_chunks = triton.cdiv(length, CARRIED_CHUNK)
        num_lanes = self.num_chunks * heads
        self.grid = (triton.cdiv(num_lanes, LANES), batch_size)
        self.arguments = (length, heads, CARRIED_CHUNK, num_lanes)
        self.maps = torch.empty(batch_size, num_lanes, 4, dtype=torch.float64, device=like_BNH.device)

    def entering(self, state_BH: Tensor) -> Tensor:
        """What enters each chunk, float64 ``(B, chunks x H)``."""
        entering = torch.empty(self.maps.shape[:2], dtype=torch.float64, device=state_BH.device)
        grid = (triton.cdiv(self.chains, LANES),)
        apply_maps_kernel[grid](self.maps, state_BH, entering, self.heads, self.num_chunks, self.chains, LANES=LANES)
        return entering


class _Program:
    """How the sweeps that find their own start are launched for a tensor ``(B, N, H)``."""

    def __init__(self, like_BNH: Tensor) -> None:
        self.batch_size, self.length, self.heads = like_BNH.shape
        self.lanes = LANES_OF_ONE_HEAD if self.heads == 1 else LANES
        self.options = {"LANES": self.lanes, "num_warps": self.lanes // 32}

    def of_one_head(self, width: int) -> int:
        """Sites at a time: ``width`` if there is one head."""
        return width if self.heads == 1 else WIDTH

    def cut(self) -> tuple[int, int]:
        """Tokens in a chunk, and lanes of a row (chunks x heads)."""
        wanted = triton.next_power_of_2(triton.cdiv(self.batch_size * self.length * self.heads, WANTED_LANES))
        chunk = min(max(wanted, SHORTEST_CHUNK, self.of_one_head(WIDTH_OF_ONE_HEAD)), LONGEST_CHUNK)
        return chunk, triton.cdiv(self.length, chunk) * self.heads

    def grid(self, num_lanes: int) -> tuple[int, int]:
        """For ``num_lanes`` of each row."""
        return triton.cdiv(num_lanes, self.lanes), self.batch_size


def _half_a_unit(like: Tensor) -> float:
    """Half of the spacing of numbers at 1, halved again for safety: 2^-25 in float32."""
    eps: Any = torch.finfo(like.dtype).eps
    return float(eps) / 4
