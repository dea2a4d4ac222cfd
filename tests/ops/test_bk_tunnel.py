"""bk_tunnel: the real recurrence without cancellation."""

import math

import pytest
import torch
from dense_oracle import dense_resolvent, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_bk.ops import bk_tunnel

BACKENDS = ["cpu", "torch", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(shape=st.tuples(st.integers(1, 2), st.integers(1, 10), st.integers(1, 3)), seed=st.integers(0, 2**31))
def test_it_is_the_resolvent_below_the_band(backend, shape, seed):
    w = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    heads = shape[2]
    bonds = torch.ones(shape[0], shape[1] - 1, heads, dtype=torch.float64)
    zero, two = torch.zeros(heads, dtype=torch.complex128), torch.full((heads,), 2.0, dtype=torch.float64)
    expected = dense_resolvent(w, zero, two, bonds, causal=True).real
    assert relative_error(bk_tunnel(w, backend=backend).exp(), expected) < 1e-12


@pytest.mark.parametrize("gap", [1e-6, 1e-2, 1.0])
def test_a_constant_gap_decays_at_the_known_rate(gap):
    log_l = bk_tunnel(torch.full((1, 20_000, 1), gap, dtype=torch.float64))
    assert log_l[0, -1, 0].item() == pytest.approx(-math.acosh(1 + gap / 2), rel=1e-6)


def test_no_gap_is_the_free_chain():
    # With w = 0 the determinants are theta_i = i + 1, so l_i = i / (i + 1).
    log_l = bk_tunnel(torch.zeros(1, 50, 1, dtype=torch.float64))
    index = torch.arange(1, 51, dtype=torch.float64)
    assert torch.allclose(log_l[0, :, 0], torch.log(index / (index + 1)), atol=0, rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_and_gradients_through_the_state(backend):
    w = torch.rand(2, 9, 3, dtype=torch.float64, requires_grad=True)
    whole, whole_state = bk_tunnel(w, output_final_state=True, backend=backend)
    first, state = bk_tunnel(w[:, :4], output_final_state=True, backend=backend)
    second, final = bk_tunnel(w[:, 4:], initial_state=state, output_final_state=True, backend=backend)
    pieces = torch.cat([first, second], dim=1)
    assert relative_error(pieces, whole) < 1e-13
    assert relative_error(final, whole_state) < 1e-13
    weights = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * weights).sum() + whole_state.sum(), w)[0]
    actual = torch.autograd.grad((pieces * weights).sum() + final.sum(), w)[0]
    assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_token_to_decode_goes_without_the_operator_and_is_the_same(dtype):
    generator = torch.Generator().manual_seed(0)
    w = torch.rand(3, 1, 5, generator=generator).to(dtype)
    state = torch.rand(3, 5, generator=generator)
    expected = bk_tunnel(w, initial_state=state, output_final_state=True)
    with torch.no_grad():
        actual = bk_tunnel(w, initial_state=state, output_final_state=True)
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype
        assert relative_error(x, y) < 1e-6


def test_gradient_of_the_initial_state():
    w = torch.rand(2, 5, 2, dtype=torch.float64, requires_grad=True)
    state = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, state: bk_tunnel(w, initial_state=state), (w, state))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_documents_of_a_row_are_as_if_each_were_alone(backend, dtype):
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    w = (torch.rand(2, 40, 3, dtype=torch.float64) * torch.tensor([1e-6, 0.1, 3.0])).to(dtype).requires_grad_()
    state = torch.rand(2, 3, dtype=torch.float64).to(dtype)
    places = [0, 1, 2, 17, 39]
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[:, places[1:]] = True
    weights = torch.randn(2, 40, 3, dtype=dtype)
    packed = bk_tunnel(w, starts=starts, initial_state=state, backend=backend)
    gradient = torch.autograd.grad((packed * weights).sum(), w)[0]
    alone = []
    for begin, end in zip(places, [*places[1:], 40], strict=True):
        alone.append(bk_tunnel(w[:, begin:end], initial_state=state if begin == 0 else None, backend=backend))
    alone = torch.cat(alone, dim=1)
    assert relative_error(packed, alone) < tolerance
    assert relative_error(gradient, torch.autograd.grad((alone * weights).sum(), w)[0]) < 10 * tolerance


def test_an_empty_sequence_passes_its_state_on():
    result, state = bk_tunnel(torch.empty(2, 0, 3), output_final_state=True)
    assert result.shape == (2, 0, 3)
    assert torch.equal(state, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"w": torch.zeros(3)}, "batch, tokens, heads"),
        ({"w": torch.zeros(1, 2, 1, dtype=torch.complex64)}, "floating-point"),
        ({"w": torch.zeros(1, 2, 1), "initial_state": torch.zeros(1, 1, dtype=torch.complex64)}, "real"),
        ({"w": torch.zeros(1, 2, 1), "initial_state": torch.zeros(2, 1)}, "initial_state"),
        ({"w": torch.zeros(1, 2, 1), "backend": "magic"}, "backend"),
        ({"w": torch.zeros(1, 2, 1), "starts": torch.zeros(1, 2)}, "bool"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_mend(arguments, words):
    with pytest.raises(ValueError, match=words):
        bk_tunnel(arguments.pop("w"), **arguments)
