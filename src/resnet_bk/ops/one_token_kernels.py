"""The numba kernel behind ``one_token``: a matrix is read once, in the order in which it lies in memory."""

import numpy as np
from numba import njit

# Sums in any order, as every BLAS has them; numbers that are not finite stay what they are.
_compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz", "reassoc"})


@_compiled
def linear_kernel(weight_OI, x_I, out_O):
    """out_o = sum_i weight_oi x_i."""
    for row in range(weight_OI.shape[0]):
        total = np.float32(0)
        for column in range(weight_OI.shape[1]):
            total += weight_OI[row, column] * x_I[column]
        out_O[row] = total
