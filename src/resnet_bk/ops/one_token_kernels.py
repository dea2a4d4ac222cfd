"""The numba kernels behind ``one_token``. Matrices are read once, in the order in which they lie in memory."""

import math

import numpy as np
from numba import njit

EPSILON = np.float32(np.finfo(np.float32).eps)
ONE = np.float32(1)
ROOT_OF_HALF = np.float32(math.sqrt(0.5))

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


@_compiled
def product_kernel(x_I, weight_IO, out_O):
    """out_o = sum_i x_i weight_io."""
    out_O[:] = 0
    for row in range(weight_IO.shape[0]):
        x = x_I[row]
        for column in range(weight_IO.shape[1]):
            out_O[column] += x * weight_IO[row, column]


@_compiled
def expert_kernel(x_D, up_DI, down_ID, out_D):
    """gelu(x up) down."""
    hidden_I = np.empty(up_DI.shape[1], np.float32)
    product_kernel(x_D, up_DI, hidden_I)
    for index in range(hidden_I.size):
        hidden = hidden_I[index]
        hidden_I[index] = np.float32(0.5) * hidden * (ONE + math.erf(hidden * ROOT_OF_HALF))
    product_kernel(hidden_I, down_ID, out_D)


@_compiled
def silu(x):
    """x sigmoid(x)."""
    return x / (ONE + math.exp(-x))


@_compiled
def projections_kernel(x_C, weight_SC, window_WC, cos, sin, q_HK, k_HK, v_HV):
    """Convolution, silu, the norm of queries and keys and their rotation; without coordinates in ``cos``, none."""
    heads, key_size = q_HK.shape
    taps, channels = weight_SC.shape
    s_C = np.empty(channels, np.float32)
    for channel in range(channels):
        s_C[channel] = weight_SC[0, channel] * x_C[channel]
    for tap in range(1, taps):
        for channel in range(channels):
            s_C[channel] += weight_SC[tap, channel] * window_WC[taps - 1 - tap, channel]
    for channel in range(channels):
        s_C[channel] = silu(s_C[channel])
    for head in range(heads):
        first = head * (channels // heads)
        _normed_and_turned(s_C[first : first + key_size], cos, sin, q_HK[head])
        _normed_and_turned(s_C[first + key_size : first + 2 * key_size], cos, sin, k_HK[head])
        v_HV[head] = s_C[first + 2 * key_size : first + channels // heads]


@_compiled
def _normed_and_turned(s_K, cos, sin, out_K):
    root, half = _inverse_rms(s_K, EPSILON), cos.size
    for index in range(s_K.size):
        out_K[index] = s_K[index] * root
    for index in range(half):
        first, second = out_K[index], out_K[half + index]
        out_K[index] = first * cos[index] - second * sin[index]
        out_K[half + index] = second * cos[index] + first * sin[index]


@_compiled
def _inverse_rms(x_K, eps):
    total = np.float32(0)
    for index in range(x_K.size):
        total += x_K[index] * x_K[index]
    return ONE / math.sqrt(total / np.float32(x_K.size) + np.float32(eps))


@_compiled
def tunnel_kernel(potential_H, log_rate_H, state_H, log_l_H, after_H, largest_rate):
    """log l = -log1p(w + m), m' = 1 - l, at w = 4 sinh(r / 2)^2 and r = softplus(potential) rate."""
    for head in range(potential_H.size):
        potential = np.float64(potential_H[head])
        softplus = max(potential, 0.0) + math.log1p(math.exp(-abs(potential)))
        half = math.sinh(min(softplus * math.exp(log_rate_H[head]), largest_rate) / 2)
        log_l = -math.log1p(4 * half * half + state_H[head])
        log_l_H[head], after_H[head] = log_l, -math.expm1(log_l)


@_compiled
def carry_kernel(q_HK, k_HK, v_HV, log_l_H, skip_H, state_HKV, o_HV, after_HKV):
    """S' = l (S + k v^T), o = q S' + skip v."""
    heads, key_size, value_size = state_HKV.shape
    for head in range(heads):
        decay = math.exp(log_l_H[head])
        for value in range(value_size):
            o_HV[head, value] = skip_H[head] * v_HV[head, value]
        for key in range(key_size):
            q, k = q_HK[head, key], decay * k_HK[head, key]
            for value in range(value_size):
                state = decay * state_HKV[head, key, value] + k * v_HV[head, value]
                after_HKV[head, key, value] = state
                o_HV[head, value] += q * state


@_compiled
def window_kernel(q_HK, k_HK, v_HV, keys_PHK, values_PHV, rate_H, keys_MHK, values_MHV, out_HV):
    """Local attention of a token behind P others; keys and values with its own are written, M = P + 1, as read."""
    heads, key_size = q_HK.shape
    past = keys_PHK.shape[0]
    weight_HM = np.empty((heads, past + 1), np.float32)
    scale = ONE / np.float32(math.sqrt(key_size))
    for place in range(past + 1):
        row_HK = keys_PHK[place] if place < past else k_HK
        for head in range(heads):
            product = np.float32(0)
            for index in range(key_size):
                key = row_HK[head, index]
                keys_MHK[place, head, index] = key
                product += q_HK[head, index] * key
            weight_HM[head, place] = product * scale + rate_H[head] * np.float32(place - past)
    for head in range(heads):
        largest, total = weight_HM[head].max(), np.float32(0)
        for place in range(past + 1):
            weight = math.exp(weight_HM[head, place] - largest)
            weight_HM[head, place] = weight
            total += weight
        weight_HM[head] /= total
    out_HV[:] = 0
    for place in range(past + 1):
        row_HV = values_PHV[place] if place < past else v_HV
        for head in range(heads):
            weight = weight_HM[head, place]
            for index in range(out_HV.shape[1]):
                value = row_HV[head, index]
                values_MHV[place, head, index] = value
                out_HV[head, index] += weight * value


@_compiled
def gated_norm_kernel(o_HV, weight_V, gate_HV, out_HV, eps):
    """o / rms(o) * weight * silu(gate)."""
    for head in range(o_HV.shape[0]):
        root = _inverse_rms(o_HV[head], eps)
        for value in range(o_HV.shape[1]):
            out_HV[head, value] = o_HV[head, value] * root * weight_V[value] * silu(gate_HV[head, value])
