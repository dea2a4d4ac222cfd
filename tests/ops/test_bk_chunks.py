"""Few heads on a CPU: rows cut into chunks give what whole rows give, whatever the threads."""

import pytest
import torch
from dense_oracle import relative_error

from resnet_bk.ops.bk import cpu

SHAPES = [(1, 1500, 1), (3, 1111, 5), (2, 2048, 15), (40, 600, 3)]


@pytest.fixture
def whole_rows(monkeypatch):
    """Calls a function with no row cut."""

    def call(function, *arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "SHORTEST_CHUNK", 1 << 40)
            return function(*arguments, **options)

    return call


def chain(shape, eta, potential=1.0):
    rows, _, heads = shape
    generator = torch.Generator().manual_seed(0)
    v = potential * torch.randn(shape, generator=generator, dtype=torch.float64)
    shift = torch.tensor([-0.5, -eta], dtype=torch.float64).repeat(heads, 1)
    bonds = 0.5 + torch.rand(heads, generator=generator, dtype=torch.float64)
    state = torch.rand(rows, heads, 2, generator=generator, dtype=torch.float64)
    grad = torch.randn(*shape, 2, generator=generator, dtype=torch.float64)
    return v, shift, bonds, state, grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("eta", [0.3, 2.0])
def test_chunks_are_whole_rows(shape, eta, whole_rows):
    v, shift, bonds, state, grad = chain(shape, eta)
    cut = cpu._causal_in_chunks(v, shift, bonds, state)
    assert cut is not None, "chunks are long enough for the proof"
    ratios = whole_rows(cpu.causal, v, shift, bonds, state)
    assert relative_error(cut, ratios) < 1e-15
    gradients = cpu._causal_adjoint_in_chunks(grad, ratios, bonds)
    assert gradients is not None
    wanted = whole_rows(cpu.causal_adjoint, grad, ratios, bonds, state, wants_bonds=False)
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert not ours.numel() or relative_error(ours, theirs) < 1e-14


def test_where_nothing_is_forgotten_rows_stay_whole(whole_rows):
    v, shift, bonds, state, grad = chain((2, 1200, 2), eta=1e-5, potential=0.0)
    assert cpu._causal_in_chunks(v, shift, bonds, state) is None
    ratios = cpu.causal(v, shift, bonds, state)
    assert torch.equal(ratios, whole_rows(cpu.causal, v, shift, bonds, state))
    assert cpu._causal_adjoint_in_chunks(grad, ratios, bonds) is None
    assert torch.isfinite(cpu.causal_adjoint(grad, ratios, bonds, state, wants_bonds=False)[0]).all()


@pytest.mark.parametrize("shape", [(1, 1500, 1), (1, 2000, 7), (3, 1111, 2), (3, 70, 5)], ids=str)
@pytest.mark.parametrize("gap", [0.0, 1e-6, 1.0, 1e30])
def test_chunks_of_the_tunnel_are_whole_rows(shape, gap, whole_rows):
    generator = torch.Generator().manual_seed(0)
    w = gap * torch.rand(shape, generator=generator, dtype=torch.float64)
    w[:, ::3] *= 1e-3
    state = torch.rand(shape[0], shape[2], generator=generator, dtype=torch.float64)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    log_l = whole_rows(cpu.tunnel, w, state)
    assert relative_error(cpu.tunnel(w, state), log_l) < 1e-14
    assert relative_error(cpu.tunnel(w.float(), state.float()), log_l) < 3e-7
    wanted = whole_rows(cpu.tunnel_adjoint, grad, log_l)
    assert relative_error(cpu.tunnel_adjoint(grad, log_l), wanted) < 1e-13


def test_the_number_of_threads_changes_nothing():
    v, shift, bonds, state, grad = (x.float() for x in chain((2, 70_000, 3), eta=0.5))
    gap, weights = v.abs(), grad[..., 0].contiguous()
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            ratios = cpu.causal(v, shift, bonds, state)
            gradients = cpu.causal_adjoint(grad, ratios, bonds, state, wants_bonds=False)
            log_l = cpu.tunnel(gap, state[..., 0])
            results.append([ratios, *gradients, log_l, cpu.tunnel_adjoint(weights, log_l)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
