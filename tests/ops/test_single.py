"""linear_in_single: what float32 gives of rounded tokens, with every gradient, however it is computed."""

import pytest
import torch
from dense_oracle import relative_error
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.ops import single
from resnet_bk.ops.single import linear_in_single
from resnet_bk.ops.single_gpu import split

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = 3e-6  # a GPU's tensor cores round their sums down
HALF_ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}


def arguments(dtype=torch.bfloat16, shape=(2, 9, 24), heads=5):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator) for size in (shape, (heads, shape[-1])))
    return [x.to(dtype).to(DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_()]


def with_gradients(inputs, autocast=False):
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        y = linear_in_single(*inputs)
    w = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad((y * w).sum(), inputs)]


def check(actual, inputs):
    y, x_bar, weight_bar = with_gradients([x.detach().double().requires_grad_() for x in inputs])
    assert relative_error(actual[0], y) < EXACT
    assert relative_error(actual[2], weight_bar) < EXACT
    assert relative_error(actual[1], x_bar) < HALF_ROUNDING[inputs[0].dtype]
    assert [x.dtype for x in actual] == [inputs[1].dtype, inputs[0].dtype, inputs[1].dtype]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_float32s_whatever_autocast_says(dtype, autocast):
    inputs = arguments(dtype)
    check(with_gradients(inputs, autocast), inputs)


def test_float32_numbers_in_three_parts_give_the_same(monkeypatch):
    def product(a, b):
        assert a.dtype == b.dtype == torch.bfloat16
        return a.float() @ b.float()

    monkeypatch.setattr(single, "_splits", lambda x_TD: True)
    if DEVICE == "cpu":  # whose products have no other type than their factors
        monkeypatch.setattr(single, "_times", product)
    inputs = arguments(shape=(2, 600, 24))
    check(with_gradients(inputs), inputs)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (700, 3), (0, 4)])
def test_three_parts_are_the_whole_number(shape, again):
    x = (torch.randn(shape) * 10.0 ** torch.randint(-20, 20, shape)).to(DEVICE)
    first, second, third, *more = split(x, again=again).view(shape[0], 3 + again, shape[1]).unbind(1)
    assert ((first.double() - x).abs() <= 2**-7 * x.abs()).all()  # Triton's interpreter does not round to the nearest
    assert torch.equal((first.double() + second.double() + third.double()).float(), x)
    assert len(more) == again
    assert all(torch.equal(part, first) for part in more)


def test_no_tokens():
    inputs = arguments(shape=(0, 24))
    y = linear_in_single(*inputs)
    y.sum().backward()
    assert y.shape == (0, 5)
    assert torch.equal(inputs[1].grad, torch.zeros_like(inputs[1]))


def test_the_operator_passes_torchs_own_checks_and_counts_its_products():
    x, weight = arguments(shape=(18, 24))
    torch.library.opcheck(torch.ops.resnet_bk.linear_in_single, (x, weight))
    with FlopCounterMode(display=False) as counter:
        linear_in_single(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 18 * 24 * 5


def test_nothing_but_the_arguments_is_kept():
    inputs, kept = arguments(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear_in_single(*inputs)
    assert sum(x.nbytes for x in kept) == sum(x.nbytes for x in inputs)
