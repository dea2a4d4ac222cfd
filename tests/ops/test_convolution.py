"""short_convolution: every backend against its definition."""

import pytest
import torch
from dense_oracle import relative_error

from resnet_bk.ops import convolution, convolution_torch
from resnet_bk.ops.convolution import short_convolution

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def by_definition(x, weight, window=None, documents=None):
    size, (rows, length, channels) = weight.shape[0], x.shape
    window = torch.zeros(rows, size - 1, channels, dtype=x.dtype) if window is None else window
    documents = torch.zeros(rows, length, dtype=torch.long) if documents is None else documents
    result = []
    for i in range(length):
        y = torch.zeros(rows, channels, dtype=x.dtype)
        for s in range(size):
            j = i - s
            then = x[:, j] if j >= 0 else window[:, j + size - 1]
            same = documents[:, j] == documents[:, i] if j >= 0 else documents[:, i] == 0
            y = y + weight[s] * then * same.unsqueeze(-1)
        result.append(y)
    return torch.stack(result, dim=1)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("length", [1, 2, 5, 70])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("with_window", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
def test_it_is_its_definition_with_every_gradient(backend, length, size, with_window, with_documents, monkeypatch):
    monkeypatch.setattr(convolution_torch, "PIECE", 16)
    generator = torch.Generator().manual_seed(0)
    device = DEVICE if backend == "triton" else "cpu"

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    x, weight, grad = normal(2, length, 5), normal(size, 5), normal(2, length, 5)
    options = {}
    if with_window:
        options["window"] = normal(2, size - 1, 5)
    if with_documents:
        options["documents"] = (torch.rand(2, length, generator=generator) < 0.3).long().cumsum(1)
    doubles = {name: y.double() if y.is_floating_point() else y for name, y in options.items()}
    wide_x, wide_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = by_definition(wide_x, wide_weight, **doubles)
    expected_gradients = torch.autograd.grad((expected * grad).sum(), (wide_x, wide_weight))
    x, weight = x.to(device).requires_grad_(), weight.to(device).requires_grad_()
    actual = short_convolution(x, weight, backend=backend, **{name: y.to(device) for name, y in options.items()})
    gradients = torch.autograd.grad((actual * grad.to(device)).sum(), (x, weight))
    assert relative_error(actual.cpu(), expected) < 1e-6
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative_error(found.cpu(), wanted) < 1e-6


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("with_options", [False, True])
def test_torch_accepts_the_operator(backend, with_options):
    x = torch.randn(2, 9, 3, device=DEVICE, requires_grad=True)
    weight = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    window = torch.randn(2, 3, 3, device=DEVICE) if with_options else None
    has_documents = with_options and backend == "triton"
    documents = torch.zeros(2, 9, dtype=torch.int32, device=DEVICE) if has_documents else None
    torch.library.opcheck(convolution._convolution, (x, weight, window, documents, backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_torch_a_halfs_weight_gradient_is_summed_in_single_precision(dtype):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(1, 3000, 8, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(4, 8, generator=generator).requires_grad_()
    y = short_convolution(x, weight, backend="torch")
    assert y.dtype == dtype
    (found,) = torch.autograd.grad(y, weight, grad)
    behind = torch.nn.functional.pad(x.double(), (0, 0, 3, 0))
    wanted = torch.stack([(grad.double() * behind[:, 3 - s : 3003 - s]).sum((0, 1)) for s in range(4)])
    # Of 3,000 numbers; a sum in a half type would be off by more than 1e-3.
    assert relative_error(found, wanted) < 5e-6


@pytest.mark.parametrize("length", [1, 5])
def test_under_autocast_it_is_in_its_type(length):
    x, weight = torch.randn(2, length, 3), torch.randn(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = short_convolution(x, weight)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, by_definition(x.double(), weight.double())) < 1e-2


def test_halves_are_summed_in_single_precision():
    x, weight = torch.randn(1, 200, 8, device=DEVICE).half(), torch.randn(4, 8, device=DEVICE)
    y = short_convolution(x, weight, backend="triton")
    assert y.dtype == torch.float16
    assert relative_error(y.cpu(), by_definition(x.cpu().double(), weight.cpu().double())) < 5e-4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(2, 5)}, "batch, tokens"),
        ({"weight": torch.zeros(4, 2)}, "size, C"),
        ({"window": torch.zeros(2, 4, 3)}, "window"),
        ({"documents": torch.zeros(2, 5)}, "integers"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_mend(changes, words):
    with pytest.raises(ValueError, match=words):
        short_convolution(**{"x": torch.zeros(2, 5, 3), "weight": torch.zeros(4, 3), **changes})
