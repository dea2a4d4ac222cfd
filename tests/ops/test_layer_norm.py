"""layer_norm, and its gradients along the stream too: every backend against the definition in double precision."""

import pytest
import torch
from dense_oracle import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_bk.ops import layer_norm_gpu
from resnet_bk.ops.layer_norm import layer_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
EPS = 1e-5
each_backend = pytest.mark.parametrize("backend", ["torch", "triton"])


def by_definition(x, weight, bias, added=0.0):
    total = x + added
    centred = total - total.mean(-1, keepdim=True)
    return total, centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + EPS) * weight + bias


def arguments(shape=(2, 5, 12), seed=0, added=None):
    """x, weight, bias and, in the type ``added``, what is added."""
    generator = torch.Generator().manual_seed(seed)
    x, other = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=generator) for _ in range(2))
    return [3 * x + 1, weight, bias] if added is None else [3 * x + 1, weight, bias, other.to(added)]


def with_gradients(function, inputs, *kinds):
    """Results of these kinds, and gradients. What comes along a result is rounded to its kind, for the definition as
    well: of few numbers next to nothing is left of it but that rounding, which is not the kernel's."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    results = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(y.shape, generator=generator).to(y.device, kind) for y, kind in zip(results, kinds, strict=True)
    ]
    loss = sum((y.double() * w).sum() for y, w in zip(results, weights, strict=True))
    return [*results, *torch.autograd.grad(loss, inputs)]


def check(inputs, backend, dtype):
    def ours(x, weight, bias, added=None):
        return layer_norm(x, weight, bias, EPS, dtype=dtype, added=added, backend=backend)

    expected = with_gradients(by_definition, [x.double() for x in inputs], torch.float32, dtype)
    device = DEVICE if backend == "triton" else "cpu"
    actual = with_gradients(ours, [x.to(device) for x in inputs], torch.float32, dtype)
    assert actual[1].dtype == dtype
    assert [x.dtype for x in actual[2:]] == [x.dtype for x in inputs]
    for x, y in zip(actual, expected, strict=True):
        assert x.shape == y.shape
        rounded = max(TOLERANCE[dtype], TOLERANCE[x.dtype])
        assert relative_error(x.cpu(), y) < rounded


@each_backend
@pytest.mark.parametrize("added", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_its_definition_with_every_gradient(backend, dtype, added):
    check(arguments(added=added), backend, dtype)


@each_backend
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 40),
    size=st.integers(3, 70),
    seed=st.integers(0, 2**31),
    added=st.sampled_from([None, torch.bfloat16]),
)
def test_any_shape(backend, rows, size, seed, added):
    check(arguments((rows, size), seed, added), backend, torch.bfloat16)


def test_programs_of_the_gpu_share_many_rows(monkeypatch):
    monkeypatch.setattr(layer_norm_gpu, "MOST_PROGRAMS", 2)
    monkeypatch.setattr(layer_norm_gpu, "BACKWARD_TILE", 32)
    check(arguments((23, 12), added=torch.bfloat16), "triton", torch.bfloat16)


@each_backend
def test_rows_far_from_zero_lose_nothing(backend):
    x, weight, bias = arguments((7, 33))
    expected = by_definition((x + 1000).double(), weight.double(), bias.double())[1]
    device = DEVICE if backend == "triton" else "cpu"
    arguments_there = [y.to(device) for y in (x + 1000, weight, bias)]
    _, actual = layer_norm(*arguments_there, EPS, dtype=torch.float32, backend=backend)
    assert relative_error(actual.cpu(), expected) < 1e-4


@each_backend
def test_no_rows(backend):
    device = DEVICE if backend == "triton" else "cpu"
    inputs = [x.to(device).requires_grad_() for x in arguments((0, 12))]
    _, y = layer_norm(*inputs, EPS, dtype=torch.bfloat16, backend=backend)
    y.sum().backward()
    assert y.shape == (0, 12)
    assert torch.equal(inputs[1].grad, torch.zeros_like(inputs[1]))


def test_a_strided_argument_is_read_as_it_is_meant():
    x, weight, bias, added = (x.to(DEVICE) for x in arguments((6, 4, 12), added=torch.bfloat16))
    for mixed in (x.transpose(0, 1), x[:, ::2]):
        other = added.transpose(0, 1) if mixed.shape[0] == 4 else added[:, ::2]
        options = {"dtype": torch.bfloat16, "added": other}
        actual = layer_norm(mixed, weight, bias, EPS, **options, backend="triton")
        expected = layer_norm(mixed, weight, bias, EPS, **options, backend="torch")
        assert torch.equal(actual[0], expected[0])
        assert relative_error(actual[1], expected[1].double()) < TOLERANCE[torch.bfloat16]


def test_doubles_are_refused_by_the_kernel_and_taken_otherwise():
    x, weight, bias = (x.double().to(DEVICE) for x in arguments())
    with pytest.raises(ValueError, match="backend='torch'"):
        layer_norm(x, weight, bias, EPS, dtype=torch.bfloat16, backend="triton")
    assert layer_norm(x, weight, bias, EPS, dtype=torch.bfloat16)[1].dtype == torch.bfloat16


@each_backend
@pytest.mark.parametrize("added", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("read", [0, 1])
def test_one_result_is_read_and_the_other_not(backend, added, read):
    def one(x, weight, bias, added=None):
        found = layer_norm(x, weight, bias, EPS, dtype=torch.float32, added=added, backend=backend)
        return (x * 0 + found[read] + 0 * (weight + bias) + (0 if added is None else 0 * added),)

    def wanted(*inputs):
        return (by_definition(*inputs)[read] + 0 * sum(inputs),)

    inputs = arguments(added=added)
    device = DEVICE if backend == "triton" else "cpu"
    actual = with_gradients(one, [x.to(device) for x in inputs], torch.float32)
    expected = with_gradients(wanted, [x.double() for x in inputs], torch.float32)
    for x, y in zip(actual[1:], expected[1:], strict=True):
        assert (x.cpu() - y).norm() <= TOLERANCE[x.dtype] * y.norm()


def test_the_operators_pass_torchs_own_checks():
    x, weight, bias, added = (x.to(DEVICE) for x in arguments((9, 16), added=torch.bfloat16))
    for other in (added, None):
        torch.library.opcheck(torch.ops.resnet_bk.layer_norm, (x, other, weight, bias, EPS, torch.bfloat16))
        for along in (x, None):
            arguments_ = (added, along, x, weight, EPS, None if other is None else torch.bfloat16)
            torch.library.opcheck(torch.ops.resnet_bk.layer_norm_backward, arguments_)
