"""The sweeps compiled for the CPU (numba): vectorised over chains, rows and heads shared out among torch's threads.

Every chain is computed by itself and in order, so that results do not depend on the number of threads. Complex numbers
are pairs of reals in the last axis. The formulas are in ``scan``; those of the tunnelling regime, whose memory is
long, are carried in double precision whatever the data.

Kernels are compiled at their first call and kept in numba's cache beside this file (or in the user's cache folder).
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnet_bk.ops.bk.cpu_kernels import (
    causal_adjoint_kernel,
    causal_kernel,
    onto_diagonal_kernel,
    tunnel_adjoint_kernel,
    tunnel_kernel,
)

Array = NDArray[np.floating[Any]]

LANES_WORTH_A_VECTOR = 16
ELEMENTS_WORTH_A_THREAD = 1 << 15


def causal(v_BNH: Tensor, shift_H2: Tensor, bonds: Tensor, state_BH2: Tensor, *, reverse: bool = False) -> Tensor:
    """l_i for all i, ``(B, N, H, 2)``; ``reverse`` sweeps from the right end."""
    v_RNL, restore = _lanes(v_BNH.to(shift_H2.dtype))
    out_RNL = torch.empty(*v_RNL.shape[:2], 2 * v_RNL.shape[2], dtype=v_RNL.dtype)
    _run(
        causal_kernel,
        v_RNL.shape,
        _array(v_RNL),
        _array(_per_lane(shift_H2, v_BNH, v_RNL)),
        *_bond_arrays(bonds, v_BNH, v_RNL),
        _array(state_BH2.reshape(v_RNL.shape[0], v_RNL.shape[2], 2)),
        _array(out_RNL),
        reverse,
    )
    return restore(out_RNL.view(*v_RNL.shape, 2))


def causal_adjoint(
    grad_BNH2: Tensor, l_BNH2: Tensor, bonds: Tensor, state_BH2: Tensor, *, wants_bonds: bool, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of v ``(B, N, H)``, shift ``(H, 2)``, bonds (as given; empty if not wanted), state ``(B, H, 2)``."""
    like_BNH = l_BNH2[..., 0]
    l_RNL, restore = _lanes(l_BNH2)
    grad_RNL, _ = _lanes(grad_BNH2)
    rows, length, lanes = l_RNL.shape[:3]
    v_bar_RNL = torch.empty(rows, length, lanes, dtype=l_RNL.dtype)
    shift_bar_RL = torch.zeros(rows, 2 * lanes, dtype=torch.float64)
    state_bar_RL = torch.empty(rows, 2 * lanes, dtype=l_RNL.dtype)
    per_token = bonds.dim() == 3
    if not wants_bonds:
        bonds_bar_RNL = torch.empty(0, 0, 0, dtype=l_RNL.dtype)
    elif per_token:
        bonds_bar_RNL = torch.zeros(rows, length, lanes, dtype=l_RNL.dtype)
    else:
        bonds_bar_RNL = torch.zeros(rows, 1, lanes, dtype=torch.float64)
    _run(
        causal_adjoint_kernel,
        (rows, length, lanes),
        _array(torch.view_as_complex(grad_RNL)),
        _array(torch.view_as_complex(l_RNL)),
        *_bond_arrays(bonds, like_BNH, l_RNL),
        _array(torch.view_as_complex(state_BH2.reshape(rows, lanes, 2).contiguous())),
        _array(v_bar_RNL),
        _array(shift_bar_RL),
        _array(bonds_bar_RNL),
        _array(state_bar_RL),
        reverse,
    )
    heads = like_BNH.shape[2]
    shift_bar_H2 = shift_bar_RL.view(-1, heads, 2).sum(0).to(l_BNH2.dtype)
    if not wants_bonds:
        bonds_bar = bonds.new_empty(0, *bonds.shape[1:])
    elif per_token:
        bonds_bar = restore(bonds_bar_RNL)
    else:
        bonds_bar = bonds_bar_RNL.view(-1, heads).sum(0).to(l_BNH2.dtype)
    return restore(v_bar_RNL), shift_bar_H2, bonds_bar, state_bar_RL.view(state_BH2.shape)


def bidirectional(v_BNH: Tensor, shift_H2: Tensor, bonds: Tensor) -> Tensor:
    """G_ii of the whole chain, ``(B, N, H, 2)``."""
    v_RNL, restore = _lanes(v_BNH.to(shift_H2.dtype))
    rows, length, lanes = v_RNL.shape
    out_RNL = torch.empty(rows, length, 2 * lanes, dtype=v_RNL.dtype)
    chain = (_array(v_RNL), _array(_per_lane(shift_H2, v_BNH, v_RNL)), *_bond_arrays(bonds, v_BNH, v_RNL))
    nothing = np.zeros((rows, lanes, 2), dtype=chain[0].dtype)
    _run(causal_kernel, v_RNL.shape, *chain, nothing, _array(out_RNL), False)
    _run(onto_diagonal_kernel, v_RNL.shape, *chain, _array(out_RNL))
    return restore(out_RNL.view(*v_RNL.shape, 2))


def tunnel(w_BNH: Tensor, state_BH: Tensor) -> Tensor:
    """log l_i = -log1p(s_i), ``(B, N, H)`` in the state's type."""
    w_RNL, restore = _lanes(w_BNH.to(state_BH.dtype))
    s_RNL = torch.empty_like(w_RNL)
    state = _array(state_BH.reshape(w_RNL.shape[0], w_RNL.shape[2]))
    _run(tunnel_kernel, w_RNL.shape, _array(w_RNL), state, _array(s_RNL))
    return restore(s_RNL.log1p_().neg_())


def tunnel_adjoint(grad_BNH: Tensor, log_l_BNH: Tensor) -> Tensor:
    """Gradient of w ``(B, N, H)``; its first site is also that of the initial m."""
    grad_RNL, restore = _lanes(grad_BNH)
    m_RNL, _ = _lanes(-torch.expm1(log_l_BNH))
    out_RNL = torch.empty_like(m_RNL)
    _run(tunnel_adjoint_kernel, m_RNL.shape, _array(grad_RNL), _array(m_RNL), _array(out_RNL))
    return restore(out_RNL)


def _lanes(x_BN: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Rows and lanes to sweep over, contiguous, and the way back.

    With few heads, rows become lanes of one row, ``(1, N, B x H, ...)``: a vector register then holds many rows.
    """
    batch_size, length, heads = x_BN.shape[:3]
    if heads >= LANES_WORTH_A_VECTOR or batch_size == 1:
        return x_BN.contiguous(), lambda y: y
    rest = x_BN.shape[3:]
    lanes = x_BN.transpose(0, 1).reshape(1, length, batch_size * heads, *rest)

    def restore(y: Tensor) -> Tensor:
        return y.view(length, batch_size, heads, *y.shape[3:]).transpose(0, 1).contiguous()

    return lanes.contiguous(), restore


def _per_lane(per_head: Tensor, like_BNH: Tensor, lanes_RNL: Tensor) -> Tensor:
    repeats = lanes_RNL.shape[2] // like_BNH.shape[2]
    return per_head.repeat(repeats, *[1] * (per_head.dim() - 1))


def _bond_arrays(bonds: Tensor, like_BNH: Tensor, lanes_RNL: Tensor) -> tuple[Array, int, int]:
    """Bonds as (1 or rows, 1 or N, lanes), and by what row and token are multiplied to find theirs."""
    if bonds.dim() == 1:
        return _array(_per_lane(bonds, like_BNH, lanes_RNL).view(1, 1, -1)), 0, 0
    return _array(_lanes(bonds)[0]), 1, 1


def _array(x: Tensor) -> Array:
    array: Array = x.detach().contiguous().numpy()
    return array


def _run(kernel: Callable[..., Any], shape: tuple[int, ...] | torch.Size, *arguments: Any) -> None:
    """Calls a kernel for all rows and lanes, in as many pieces as there are threads and the work is worth."""
    rows, length, lanes = shape[:3]
    pieces = min(torch.get_num_threads(), max(1, rows * length * lanes // ELEMENTS_WORTH_A_THREAD))
    ranges = _shares(rows, lanes, pieces)
    if len(ranges) == 1:
        kernel(*arguments, *ranges[0])
        return
    tasks = [_pool(os.getpid(), len(ranges) - 1).submit(kernel, *arguments, *piece) for piece in ranges[1:]]
    kernel(*arguments, *ranges[0])
    for task in tasks:
        task.result()


def _shares(rows: int, lanes: int, pieces: int) -> list[tuple[int, int, int, int]]:
    """(row begin, row end, lane begin, lane end) of each piece: whole rows where there are enough, else lanes."""
    if rows >= pieces:
        cuts = [rows * piece // pieces for piece in range(pieces + 1)]
        return [(begin, end, 0, lanes) for begin, end in pairwise(cuts)]
    vectors = max(1, lanes // LANES_WORTH_A_VECTOR)
    pieces = min(pieces, vectors)
    cuts = [vectors * piece // pieces * LANES_WORTH_A_VECTOR for piece in range(pieces)] + [lanes]
    return [(0, rows, begin, end) for begin, end in pairwise(cuts)]


@lru_cache(maxsize=4)
def _pool(_process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked child has none of its parent's, so it asks with another number."""
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="resnet-bk")
