"""gated_norm: every backend against its definition out of plain torch operations in double precision."""

import pytest
import torch
from dense_oracle import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_bk.ops import gated_norm as module
from resnet_bk.ops import gated_norm_torch
from resnet_bk.ops.gated_norm import gated_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
EPS = 1e-5
each_backend = pytest.mark.parametrize("backend", ["torch", "triton"])


def by_definition(o, weight, gate, eps):
    root = torch.sqrt((o**2).mean(-1, keepdim=True) + eps)
    return (o / root * weight).flatten(-2) * gate / (1 + torch.exp(-gate))


def arguments(rows=2, length=5, heads=3, size=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, length, heads, size), (size,), (rows, length, heads * size)]
    o, weight, gate = (torch.randn(shape, generator=generator) for shape in shapes)
    return [o.to(dtype), weight.to(torch.promote_types(dtype, torch.float32)), gate.to(dtype)]


def with_gradients(function, inputs, **options):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*inputs, EPS, **options)
    w = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device)
    return [y, *torch.autograd.grad((y.double() * w).sum(), inputs)]


def check(inputs, backend):
    expected = with_gradients(by_definition, [x.double() for x in inputs])
    device = DEVICE if backend == "triton" else "cpu"
    actual = with_gradients(gated_norm, [x.to(device) for x in inputs], backend=backend)
    for x, y in zip(actual, expected, strict=True):
        assert x.shape == y.shape
        assert relative_error(x.cpu(), y) < TOLERANCE[inputs[0].dtype]
    assert [x.dtype for x in actual[1:]] == [x.dtype for x in inputs]
    assert actual[0].dtype == inputs[2].dtype


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 5, 70])
def test_it_is_its_definition_with_every_gradient(backend, dtype, length, monkeypatch):
    monkeypatch.setattr(gated_norm_torch, "PIECE", 500)
    check(arguments(length=length, dtype=dtype), backend)


@each_backend
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 70),
    heads=st.integers(1, 3),
    size=st.integers(4, 40),  # a number alone has a gradient of next to nothing
    seed=st.integers(0, 2**31),
)
def test_any_shape(backend, **shape):
    check(arguments(**shape), backend)


def test_doubles_are_in_double_precision():
    check(arguments(length=33, dtype=torch.float64), "auto")
    with pytest.raises(ValueError, match="backend='torch'"):
        gated_norm(*(x.to(DEVICE) for x in arguments(dtype=torch.float64)), EPS, backend="triton")


@each_backend
def test_the_result_is_in_the_gates_type_whatever_the_others(backend):
    o, weight, gate = (x.to(DEVICE if backend == "triton" else "cpu") for x in arguments())
    y = gated_norm(o, weight.bfloat16(), gate.bfloat16(), EPS, backend=backend)
    assert y.dtype == torch.bfloat16


@each_backend
@pytest.mark.parametrize("shape", [{"length": 0}, {"rows": 0}])
def test_no_tokens_give_none(backend, shape):
    inputs = [x.to(DEVICE if backend == "triton" else "cpu") for x in arguments(**shape)]
    y, *gradients = with_gradients(gated_norm, inputs, backend=backend)
    assert y.shape == inputs[2].shape
    assert not gradients[1].any()


@each_backend
def test_columns_that_do_not_lie_together_are_read_as_they_are(backend):
    o, weight, gate = (x.to(DEVICE if backend == "triton" else "cpu") for x in arguments())
    expected = gated_norm(o, weight, gate, EPS, backend=backend)
    turned = o.transpose(1, 2).contiguous().transpose(1, 2), weight, gate.mT.contiguous().mT
    torch.testing.assert_close(gated_norm(*turned, EPS, backend=backend), expected)
    torch.testing.assert_close(
        with_gradients(gated_norm, turned, backend=backend),
        with_gradients(gated_norm, (o, weight, gate), backend=backend),
    )


@each_backend
def test_torch_accepts_the_operator(backend):
    inputs = [x.to(DEVICE).requires_grad_() for x in arguments()]
    torch.library.opcheck(module._gated_norm, (*inputs, EPS, backend))


@pytest.mark.parametrize(("place", "shape"), [(0, (2, 5, 15)), (1, (4,)), (2, (2, 5, 14))])
def test_what_does_not_fit_is_refused_with_a_mend(place, shape):
    inputs = arguments()
    inputs[place] = torch.zeros(shape)
    with pytest.raises(ValueError, match="tokens, H, V"):
        gated_norm(*inputs, EPS)
