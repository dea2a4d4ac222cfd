"""A linear layer of one token: the same numbers as torch's, and torch's own wherever somebody keeps account."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.ops import one_token
from resnet_bk.ops.one_token import choose_one_token_backend, linear


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def kernel(monkeypatch):
    """Counts the calls of the compiled one."""
    from resnet_bk.ops import one_token_kernels

    calls, compiled = [], one_token_kernels.linear_kernel
    monkeypatch.setattr(one_token_kernels, "linear_kernel", lambda *args: (calls.append(args), compiled(*args)))
    return calls


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 300),
    hidden=st.integers(1, 300),
    leading=st.lists(st.just(1), max_size=3),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_it_is_the_product(width, hidden, leading, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, hidden, generator=generator)
    weight = torch.randn(width, hidden, generator=generator)
    found, exact = linear(x, weight), F.linear(x.double(), weight.double())
    assert found.shape == exact.shape and found.dtype == torch.float32
    size = x.double().abs() @ weight.double().abs().T
    assert ((found - exact).abs() <= 1e-6 * size + 1e-30).all()


@torch.no_grad()
def test_one_token_is_read_by_the_kernel(kernel):
    linear(torch.ones(1, 1, 8), torch.ones(4, 8))
    assert len(kernel) == 1
    assert choose_one_token_backend(torch.device("cpu")).name == "numba"


@torch.no_grad()
def test_a_token_that_lies_apart_in_memory(kernel):
    x = torch.randn(8, 3).t()[1:2]
    weight = torch.randn(4, 8)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    assert len(kernel) == 1


@torch.no_grad()
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_show(bad, kernel):
    weight = torch.ones(3, 40)
    weight[1, 5] = bad
    found = linear(torch.ones(1, 40), weight)
    torch.testing.assert_close(found, F.linear(torch.ones(1, 40), weight), equal_nan=True)
    assert len(kernel) == 1


def test_a_gradient_goes_through_torch(kernel):
    x, weight = torch.randn(1, 8, requires_grad=True), torch.randn(4, 8)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0, keepdim=True))
    assert not kernel


@torch.no_grad()
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.ones(1, 2, 8), torch.ones(4, 8)),
        (torch.ones(1, 8, dtype=torch.float64), torch.ones(4, 8, dtype=torch.float64)),
        (torch.ones(1, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16)),
        (torch.ones(1, 8), torch.ones(8, 4).t()),
    ],
    ids=["two tokens", "float64", "bfloat16", "a transposed matrix"],
)
def test_everything_else_is_torchs(x, weight, kernel):
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert not kernel


@torch.no_grad()
def test_autocast_and_modes_see_torchs_operator(kernel):
    x, weight = torch.ones(1, 8), torch.ones(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 4 * 8
    assert not kernel


@torch.no_grad()
def test_with_many_threads_it_is_torchs(kernel, monkeypatch):
    monkeypatch.setattr(one_token.torch, "get_num_threads", lambda: 3)
    linear(torch.ones(1, 8), torch.ones(4, 8))
    assert not kernel
    assert choose_one_token_backend(torch.device("cpu")).name == "torch"


@torch.no_grad()
def test_it_compiles_into_one_graph(kernel):
    x, weight = torch.randn(1, 8), torch.randn(4, 8)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))
    assert not kernel
