"""The numba kernel of decays between the steps of a piece."""

import math

import numpy as np
from numba import njit

# Far below float32's range, and far above where double precision becomes slow.
NOTHING = 1e-60

_compiled = njit(nogil=True, cache=True, error_model="numpy")


@_compiled
def between_kernel(log_sum_RC, ahead_RC, starts_RC, out_RCC, first, last):
    """exp(L_i - A_j) for j <= i and 0 else, of the rows from ``first`` to ``last``.

    Each step's decays are those of the step before times its own, in double precision: one exponential a step, where
    differences need one for each pair. ``starts_RC`` has no rows where no document begins.
    """
    size = log_sum_RC.shape[1]
    decays = np.zeros(size)
    for row in range(first, last):
        for i in range(size):
            if i > 0:
                own = math.exp(log_sum_RC[row, i] - log_sum_RC[row, i - 1])
                if starts_RC.shape[0] > 0 and starts_RC[row, i] != starts_RC[row, i - 1]:
                    own = 0.0
                for j in range(i):
                    decay = decays[j] * own
                    decays[j] = 0.0 if decay < NOTHING else decay  # what is no number stays so
            decays[i] = math.exp(log_sum_RC[row, i] - ahead_RC[row, i])
            for j in range(i + 1):
                out_RCC[row, i, j] = decays[j]
            for j in range(i + 1, size):
                out_RCC[row, i, j] = 0.0
