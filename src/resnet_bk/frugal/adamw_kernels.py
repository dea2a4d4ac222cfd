"""AdamW with moments in bfloat16 as one loop: what is float32 for a moment never reaches memory.

bfloat16 numbers come as uint16, the upper half of a float32's bits.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# As with the kernels of BK-Core: nothing that would reorder or assume finite numbers.
_compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz"})


@intrinsic
def _as_float(typing_context, bits):  # noqa: ARG001
    """The float32 with these 32 bits."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _as_bits(typing_context, number):  # noqa: ARG001
    """The 32 bits of a float32."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@_compiled
def _widened(half):
    return _as_float(np.uint32(np.uint32(half) << np.uint32(16)))


@_compiled
def _mixed(number, seed):
    """32 random bits for an element, from its number: the finalizer of C. Wellons' "lowbias32" hash (2018).

    Casts everywhere, as the compiler has results in 64 bits, which do not wrap.
    """
    x = np.uint32(np.uint32(number * np.uint32(0x9E3779B1)) ^ seed)
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@_compiled
def _rounded(number, random):
    """Its upper half, one more if the lower one and sixteen random bits carry."""
    return np.uint16(np.uint32(_as_bits(number) + np.uint32(random)) >> np.uint32(16))


@_compiled
def _step(i, number, slope, weights, exp_avg, exp_avg_sq, constants, seed):
    decay, rest1, beta2, rest2, size, root, eps = constants
    first, second = _widened(exp_avg[i]), _widened(exp_avg_sq[i])
    first += rest1 * (slope - first)
    second = beta2 * second + rest2 * slope * slope
    weights[i] = weights[i] * decay - size * first / (np.sqrt(second) / root + eps)
    random = _mixed(number, seed)
    exp_avg[i] = _rounded(first, random & np.uint32(0xFFFF))
    exp_avg_sq[i] = _rounded(second, random >> np.uint32(16))


@_compiled
def single_gradient_kernel(begin, end, gradient, weights, exp_avg, exp_avg_sq, constants, seed):
    """The elements from ``begin`` to ``end``, by a float32 gradient.

    ``constants`` are 1 - lr weight_decay, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1^t), (1 - beta2^t)^(1/2), eps.
    """
    # Pieces gone through from 0 on: an index that may be negative keeps loops from being vectorised.
    gradient, weights = gradient[begin:end], weights[begin:end]
    exp_avg, exp_avg_sq = exp_avg[begin:end], exp_avg_sq[begin:end]
    for i in range(end - begin):
        _step(i, np.uint32(begin + i), gradient[i], weights, exp_avg, exp_avg_sq, constants, seed)


@_compiled
def half_gradient_kernel(begin, end, gradient, weights, exp_avg, exp_avg_sq, constants, seed):
    """The same by a gradient in bfloat16."""
    gradient, weights = gradient[begin:end], weights[begin:end]
    exp_avg, exp_avg_sq = exp_avg[begin:end], exp_avg_sq[begin:end]
    for i in range(end - begin):
        slope = _widened(gradient[i])
        _step(i, np.uint32(begin + i), slope, weights, exp_avg, exp_avg_sq, constants, seed)
