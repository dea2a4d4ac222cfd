"""Vectors in numba kernels against numpy, of every width and type, and sweeps whose lanes take several widths."""

import numpy as np
import pytest
import torch
from numba import njit
from numba.core.errors import TypingError

from resnet_bk.atomics import nobody
from resnet_bk.ops.bk import cpu, scan
from resnet_bk.ops.bk.cpu_kernels import KEPT_NEAR, STREAMED_FROM, Share, causal_adjoint_kernel, causal_kernel
from resnet_bk.ops.bk.cpu_vectors import (
    at,
    fence,
    fetch,
    load,
    load_complex,
    load_complex_from_the_end,
    load_from_the_end,
    multiply_add,
    splat,
    store,
    store_complex,
    stream,
    stream_complex,
)

WIDTHS = [1, 4, 16, 64]
TYPES = [np.float32, np.float64]


def numbers(count, dtype, seed):
    return np.random.default_rng(seed).normal(size=count).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("lanes", WIDTHS)
def test_arithmetic_is_numpys_lane_by_lane(lanes, dtype):
    @njit
    def compute(a, b, c, out, index):
        fetch(at(a, (index,)), lanes)
        x, y, z = load(at(a, (index,)), lanes), load_from_the_end(at(b, (index,)), lanes), load(at(c, (index,)), lanes)
        store(at(out, (index,)), multiply_add(splat(a.dtype.type(3), lanes), x, -(y + z) * x) + (y - z) / x)

    a, b, c = (numbers(lanes + 5, dtype, seed) for seed in range(3))
    out = np.zeros_like(a)
    compute(a, b, c, out, 2)
    inside = slice(2, 2 + lanes)
    np.testing.assert_allclose(out[inside], (3 * a - (b + c) * a + (b - c) / a)[inside], rtol=200 * np.finfo(dtype).eps)
    assert not out[:2].any() and not out[2 + lanes :].any()


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
@pytest.mark.parametrize("lanes", WIDTHS)
@pytest.mark.parametrize("loaded", [load_complex, load_complex_from_the_end])
def test_complex_numbers_come_apart_and_together(loaded, lanes, dtype):
    @njit
    def turned(x, out, index):
        re, im = loaded(at(x, (index,)), lanes)
        store_complex(at(out, (index,)), im, re)

    kind = np.float32 if dtype == np.complex64 else np.float64
    x = (numbers(lanes + 3, kind, 0) + 1j * numbers(lanes + 3, kind, 1)).astype(dtype)
    out = np.zeros_like(x)
    turned(x, out, 1)
    inside = slice(1, 1 + lanes)
    np.testing.assert_array_equal(out[inside], (x.imag + 1j * x.real).astype(dtype)[inside])
    assert not out[0] and not out[1 + lanes :].any()


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_streamed_is_there(dtype):
    @njit
    def copy(x, out, pairs):
        for index in range(0, x.size, 16):
            part = load(at(x, (index,)), 16)
            stream(at(out, (index,)), part)
            stream_complex(at(pairs, (index,)), part, -part)
        fence()

    x = numbers(1600, dtype, 0)
    out, pairs = aligned(1600, dtype), aligned(1600, np.result_type(dtype, np.complex64))
    copy(x, out, pairs)
    np.testing.assert_array_equal(out, x)
    np.testing.assert_array_equal(pairs, x - 1j * x)


def aligned(count, dtype):
    """Zeros from a multiple of 64 bytes on."""
    room = np.zeros(count + 64, dtype)
    begin = -room.ctypes.data % 64 // room.itemsize
    return room[begin : begin + count]


def test_a_place_is_numpys_whatever_the_strides():
    @njit
    def number_at(x, i, j):
        return at(x, (i, j))

    @njit
    def put(x, i, j, out):
        store(at(out, (0,)), load(number_at(x, i, j), 1))

    x, out = numbers(60, np.float64, 0).reshape(6, 10), np.zeros(1)
    for view in (x, x.T, x[::2, 1:], x[:, ::-1], np.broadcast_to(x[:1], (4, 10)).copy()):
        for i, j in ((0, 0), (2, 3)):
            put(view, i, j, out)
            assert out[0] == view[i, j]
    put(x[2:], -1, 4, out)
    assert out[0] == x[1, 4]


def test_other_arrays_and_widths_are_refused():
    @njit
    def of_real(x):
        store(at(x, (0,)), load(at(x, (0,)), 4))

    with pytest.raises(TypingError, match="a number of Float"):
        of_real(np.zeros(8, np.complex64))

    @njit
    def of_an_array(x):
        store(at(x, (0,)), load(x, 4))

    with pytest.raises(TypingError, match="a pointer"):
        of_an_array(np.zeros(8))

    @njit
    def of_another_dimension(x):
        store(at(x, (0, 0)), load(at(x, (0, 0)), 4))

    with pytest.raises(TypingError, match="do not say where"):
        of_another_dimension(np.zeros(8))

    @njit
    def of_any_width(x, lanes):
        store(at(x, (0,)), load(at(x, (0,)), lanes))

    with pytest.raises(TypingError, match="a constant"):
        of_any_width(np.zeros(8), 4)

    @njit
    def of_another_type(x, y):
        store(at(y, (0,)), load(at(x, (0,)), 4))

    with pytest.raises(TypingError, match="the pointer's numbers"):
        of_another_type(np.zeros(8), np.zeros(8, np.float32))


@pytest.mark.parametrize("bonds", ["constant", "of each token"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sweeps_of_lanes_in_several_widths_are_the_definition(dtype, reverse, bonds):
    """85 lanes are one vector of 64, of 16, of 4 and of 1."""
    shape = batch_size, _, heads = 2, 300, 85
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    v, grad = normal(*shape), normal(*shape, 2)
    shift = torch.stack([normal(heads), -1.0 - normal(heads).abs()], -1)
    t = normal(heads) if bonds == "constant" else normal(*shape)
    # A sweep from the right end has no state before it.
    state = (0.0 if reverse else 0.3) * normal(batch_size, heads, 2)

    def swept(module, dtype):
        given = [part.to(dtype) for part in (v, shift, t, state)]
        ratios = module.causal(*given, reverse=reverse)
        adjoints = module.causal_adjoint(grad.to(dtype), ratios, given[2], given[3], wants_bonds=True, reverse=reverse)
        # Nor has it a gradient of one.
        return [ratios, *adjoints[: 3 if reverse else 4]]

    limit = 1e-12 if dtype == torch.float64 else 1e-4
    for found, expected in zip(swept(cpu, dtype), swept(scan, torch.float64), strict=True):
        assert found.dtype == dtype
        assert (found - expected).norm() <= limit * expected.norm()


def test_large_results_written_past_the_caches_are_those_of_small_pieces():
    length = STREAMED_FROM // (20 * 64)
    generator = torch.Generator().manual_seed(0)
    v, grad = torch.randn(2, length, 64, generator=generator), torch.randn(2, length, 64, 2, generator=generator)
    shift, bonds, state = torch.tensor([-1.0, -0.7]).repeat(64, 1), torch.ones(64), torch.zeros(2, 64, 2)
    ratios = cpu.causal(v, shift, bonds, state)
    large, *_ = cpu.causal_adjoint(grad, ratios, bonds, state, wants_bonds=False)
    for row in range(2):
        part = slice(row, row + 1)
        assert torch.equal(cpu.causal(v[part, :4096], shift, bonds, state[part]), ratios[part, :4096])
    small = [
        cpu.causal_adjoint(grad[row : row + 1, :, lane : lane + 16].contiguous(),
                           ratios[row : row + 1, :, lane : lane + 16].contiguous(),
                           bonds[:16], state[:1, :16], wants_bonds=False)[0]
        for row in range(2) for lane in (0, 48)
    ]  # fmt: skip
    assert 3 * large.nbytes >= STREAMED_FROM > 5 * small[0].nbytes
    for part, (row, lane) in zip(small, [(0, 0), (0, 48), (1, 0), (1, 48)], strict=True):
        assert torch.equal(large[row : row + 1, :, lane : lane + 16], part)


@pytest.mark.parametrize("shape", [(5, 3000, 64), (300, 50, 16)], ids=["a row at a time", "many rows at a time"])
def test_a_diagonal_is_the_definition_whatever_is_swept_at_once(shape):
    rows_at_once = KEPT_NEAR // (16 * shape[1] * shape[2])
    assert rows_at_once < shape[0]
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(shape, generator=generator, dtype=torch.float64)
    shift, bonds = torch.tensor([-1.0, -0.7]).double().repeat(shape[2], 1), torch.ones(shape[2]).double()
    found, expected = (module.bidirectional(v, shift, bonds) for module in (cpu, scan))
    assert (found - expected).norm() <= 1e-12 * expected.norm()


def test_a_lanes_results_do_not_depend_on_the_lanes_beside_it():
    """Else they would depend on the number of threads, which share the lanes of a single row."""
    generator = torch.Generator().manual_seed(0)
    v, grad = torch.randn(1, 200, 64, generator=generator), torch.randn(1, 200, 64, 2, generator=generator)
    shift, bonds = torch.randn(64, 2, generator=generator), torch.randn(64, generator=generator)
    state = torch.randn(1, 64, 2, generator=generator)
    found = []
    for width in WIDTHS:
        parts = [slice(begin, begin + width) for begin in range(0, 64, width)]
        ratios = torch.cat([swept_alone(v, shift, bonds, state, part) for part in parts], 2)
        adjoint = torch.cat([adjoint_alone(grad, ratios, bonds, state, part) for part in parts], 2)
        found.append((ratios, adjoint))
    for ratios, adjoint in found[1:]:
        assert torch.equal(ratios, found[0][0]) and torch.equal(adjoint, found[0][1])


def swept_alone(v, shift, bonds, state, part):
    out = torch.empty(*v[:, :, part].shape, 2)
    given = (v[:, :, part], shift[part], bonds[part].view(1, 1, -1), state[:, part])
    v, shift, bonds, state = (x.contiguous() for x in given)
    arrays = (v.numpy(), pairs(shift), bonds.numpy(), 0, 0, pairs(state), pairs(out), False, False)
    causal_kernel(*arrays, Share.of((0, 1, 0, v.shape[2])), nobody())
    return out


def adjoint_alone(grad, ratios, bonds, state, part):
    given = (grad[:, :, part], ratios[:, :, part], bonds[part].view(1, 1, -1), state[:, part])
    grad, ratios, bonds, state = (x.contiguous() for x in given)
    v_bar, sums = torch.empty(grad.shape[:3]), torch.zeros(1, grad.shape[2], 3, dtype=torch.float64)
    arrays = (pairs(grad), pairs(ratios), bonds.numpy(), 0, 0, pairs(state), v_bar.numpy(), sums.numpy())
    nothing = np.empty((0, 0, 0), np.float32)
    causal_adjoint_kernel(
        *arrays, nothing, pairs(torch.empty_like(state)), False, Share.of((0, 1, 0, grad.shape[2])), nobody()
    )
    return v_bar


def pairs(x):
    return torch.view_as_complex(x).numpy()
