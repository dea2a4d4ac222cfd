"""The registered torch operators: what torch itself checks, and their FLOP formulas."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.ops import bk_core, bk_tunnel
from resnet_bk.ops.bk import operators


def causal_arguments(dtype, bonds_shape):
    v = torch.randn(2, 5, 3, dtype=dtype, requires_grad=True)
    shift = torch.stack([torch.randn(3, dtype=dtype), -torch.rand(3, dtype=dtype) - 0.5], dim=-1).requires_grad_()
    bonds = torch.rand(bonds_shape, dtype=dtype, requires_grad=True)
    state = torch.zeros(2, 3, 2, dtype=dtype, requires_grad=True)
    return v, shift, bonds, state


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bonds_shape", [(3,), (2, 5, 3)])
@pytest.mark.parametrize("blend", [None, 0.5])
def test_torch_accepts_the_operators(backend, dtype, bonds_shape, blend):
    v, shift, bonds, state = causal_arguments(dtype, bonds_shape)
    if blend is not None:
        bonds, state = bonds.detach(), state.detach()
    torch.library.opcheck(operators.bk_causal, (v, shift, bonds, state, blend, backend))
    torch.library.opcheck(operators.bk_bidirectional, (v, shift, bonds, blend, backend))


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
@pytest.mark.parametrize("bonds_shape", [(3,), (2, 5, 3)])
@pytest.mark.parametrize("wants_bonds", [True, False])
def test_the_adjoint_has_the_shapes_that_its_fake_promises(backend, bonds_shape, wants_bonds):
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    v, _, bonds, state = (x.detach().to(device) for x in causal_arguments(torch.float32, bonds_shape))
    pairs = torch.rand(*v.shape, 2, device=device)
    arguments = (pairs, pairs, bonds, state, wants_bonds, backend)
    torch.library.opcheck(operators.bk_causal_backward, arguments, test_utils=("test_schema", "test_faketensor"))
    with FakeTensorMode() as mode:
        promised = operators.bk_causal_backward(
            *(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments)
        )
    found = operators.bk_causal_backward(*arguments)
    assert [x.shape for x in found] == [x.shape for x in promised]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_accepts_the_tunnel(backend, dtype):
    w = torch.rand(2, 5, 3, dtype=dtype, requires_grad=True)
    torch.library.opcheck(operators.bk_tunnel, (w, torch.ones(2, 3, dtype=dtype, requires_grad=True), backend))


@pytest.mark.parametrize(
    ("call", "forward", "backward"),
    [
        (lambda v: bk_core(v, 1j), operators.CAUSAL_FORWARD_FLOPS, operators.CAUSAL_BACKWARD_FLOPS),
        (
            lambda v: bk_core(v, 1j, causal=False),
            operators.BIDIRECTIONAL_FORWARD_FLOPS,
            operators.BIDIRECTIONAL_BACKWARD_FLOPS,
        ),
        (lambda v: bk_tunnel(v.abs()), operators.TUNNEL_FORWARD_FLOPS, operators.TUNNEL_BACKWARD_FLOPS),
    ],
)
def test_every_row_is_counted(call, forward, backward):
    v = torch.randn(3, 7, 5, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with counter:
        result = call(v)
    assert counter.get_total_flops() == forward * v.numel()
    with counter:
        result.abs().sum().backward()
    assert counter.get_total_flops() == backward * v.numel()


@pytest.mark.parametrize("heads", [4, 16])
def test_no_rows_at_all_give_none(heads):
    v, w = (torch.zeros(0, 5, heads, requires_grad=True) for _ in range(2))
    for result, given in ((bk_core(v, 1j), v), (bk_core(v, 1j, causal=False), v), (bk_tunnel(w), w)):
        assert result.shape == given.shape
        result.abs().sum().backward()
        assert given.grad.shape == given.shape
