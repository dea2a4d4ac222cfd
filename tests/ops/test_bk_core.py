"""bk_core against the dense inverse: values, every gradient, states, dtypes, and the arguments it refuses."""

import pytest
import torch
from dense_oracle import dense_resolvent, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_bk.ops import bk_core

BACKENDS = ["cpu", "torch", "reference"]
shapes = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 3))


def random_problem(shape, seed, *, eta=0.3, strength=1.0, dtype=torch.float64):
    batch_size, length, heads = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    v = (strength * normal(batch_size, length, heads)).to(dtype)
    z = torch.complex(normal(heads), eta + normal(heads).abs())
    h0 = normal(heads)
    hopping = torch.rand(batch_size, length - 1, heads, generator=generator, dtype=torch.float64) * 2
    return v, z, h0, hopping


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**31), strength=st.sampled_from([0.0, 1.0, 100.0]))
def test_values_are_those_of_the_dense_inverse(backend, causal, shape, seed, strength):
    v, z, h0, hopping = random_problem(shape, seed, strength=strength)
    expected = dense_resolvent(v, z, h0, hopping, causal=causal)
    actual = bk_core(v, z, h0=h0, hopping=hopping, causal=causal, backend=backend)
    assert actual.dtype == torch.complex128
    assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@settings(max_examples=15, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**31))
def test_gradients_of_every_input_are_those_of_the_dense_inverse(backend, causal, shape, seed):
    inputs = [x.requires_grad_() for x in random_problem(shape, seed)]
    v, z, h0, hopping = inputs
    weights = torch.randn(shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))
    expected = torch.autograd.grad((dense_resolvent(v, z, h0, hopping, causal=causal) * weights).real.sum(), inputs)
    result = bk_core(v, z, h0=h0, hopping=hopping, causal=causal, backend=backend)
    actual = torch.autograd.grad((result * weights).real.sum(), inputs)
    for name, got, wanted in zip(["v", "z", "h0", "hopping"], actual, expected, strict=True):
        assert got.shape == wanted.shape
        if wanted.numel():
            assert relative_error(got, wanted) < 1e-10, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_crosses_tokens(backend):
    v = torch.randn(1, 6, 1, dtype=torch.float64, requires_grad=True)
    bk_core(v, 0.3 + 0.5j, backend=backend)[0, -1, 0].real.backward()
    assert (v.grad[0, :-1].abs() > 1e-6).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hopping_kind", ["float", "heads", "bonds"])
@settings(max_examples=15, deadline=None)
@given(shape=st.tuples(st.integers(1, 2), st.integers(2, 12), st.integers(1, 3)), seed=st.integers(0, 2**31))
def test_a_sequence_in_two_pieces_is_the_sequence(backend, hopping_kind, shape, seed):
    v, z, h0, bonds = random_problem(shape, seed)
    cut = 1 + seed % (shape[1] - 1)
    hopping = {"float": 1.3, "heads": bonds[0, 0], "bonds": bonds}[hopping_kind]
    first_hopping, second_hopping = hopping, hopping
    if hopping_kind == "bonds":
        first_hopping, second_hopping = bonds[:, : cut - 1], bonds[:, cut - 1 :]
    options = {"h0": h0, "backend": backend, "output_final_state": True}
    whole, whole_state = bk_core(v, z, hopping=hopping, **options)
    first, state = bk_core(v[:, :cut], z, hopping=first_hopping, **options)
    second, final = bk_core(v[:, cut:], z, hopping=second_hopping, initial_state=state, **options)
    assert relative_error(torch.cat([first, second], dim=1), whole) < 1e-12
    assert relative_error(final, whole_state) < 1e-12
    assert torch.equal(whole_state, whole[:, -1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_with_an_initial_state(backend):
    v, z, h0, _ = random_problem((2, 5, 2), seed=1)
    bonds = torch.rand(2, 5, 2, dtype=torch.float64)
    state = torch.complex(torch.rand(2, 2).double(), torch.rand(2, 2).double())
    inputs = [x.requires_grad_() for x in (v, z, h0, bonds, state)]
    dense = dense_resolvent(v, z, h0, bonds[:, 1:], causal=True, first_bond_state=bonds[:, 0] * state)
    ours = bk_core(v, z, h0=h0, hopping=bonds, initial_state=state, backend=backend)
    weights = torch.randn_like(dense)
    expected = torch.autograd.grad((dense * weights).real.sum(), inputs)
    for got, wanted in zip(torch.autograd.grad((ours * weights).real.sum(), inputs), expected, strict=True):
        assert relative_error(got, wanted) < 1e-10


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 1000, 2500])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_float32_error_does_not_grow_with_length(causal, length, eta):
    v = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(length))
    weights = torch.randn(2, length, 3, dtype=torch.complex64)
    results = {}
    for name, values in {"ours": v, "exact": v.double()}.items():
        leaf = values.clone().requires_grad_()
        result = bk_core(leaf, complex(0.3, eta), causal=causal)
        results[name] = result, torch.autograd.grad((result * weights.to(result.dtype)).real.sum(), leaf)[0]
    assert results["ours"][0].dtype == torch.complex64
    assert relative_error(results["ours"][0], results["exact"][0]) < 2e-6
    assert relative_error(results["ours"][1], results["exact"][1]) < 2e-5
    if length <= 1000:
        assert (
            relative_error(
                results["exact"][0], bk_core(v.double(), complex(0.3, eta), causal=causal, backend="reference")
            )
            < 1e-12
        )


@settings(max_examples=30, deadline=None)
@given(
    length=st.sampled_from([1, 2, 50, 300]),
    eta=st.floats(1e-3, 10),
    energy=st.floats(-5, 5),
    hopping=st.floats(0, 4),
    strength=st.sampled_from([0.0, 1.0, 100.0]),
    seed=st.integers(0, 2**31),
)
def test_the_causal_ratio_stays_in_its_half_disc(length, eta, energy, hopping, strength, seed):
    v = strength * (2 * torch.rand(2, length, 2, generator=torch.Generator().manual_seed(seed)) - 1)
    ratios = bk_core(v.double(), complex(energy, eta), hopping=hopping)
    assert (ratios.imag > 0).all()
    assert (ratios.abs() <= (1 + 1e-12) / eta).all()


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_smaller_dtype_gives_complex64(dtype, causal, backend):
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    v = torch.randn(1, 40, 2).to(device, dtype).requires_grad_()
    result = bk_core(v, 1j, causal=causal, backend=backend)
    assert result.dtype == torch.complex64
    result.real.sum().backward()
    assert v.grad.dtype == dtype
    assert torch.equal(result, bk_core(v.float(), 1j, causal=causal, backend=backend))


@pytest.mark.parametrize("causal", [True, False])
def test_at_most_eight_bytes_an_element_are_kept_besides_the_input(causal):
    v = torch.randn(2, 1000, 16, requires_grad=True)
    kept = {}

    def keep(saved):
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        bk_core(v, 1j, causal=causal)
    kept.pop(v.untyped_storage().data_ptr(), None)
    assert 8 * v.numel() <= sum(kept.values()) <= 8.01 * v.numel()


def test_an_empty_sequence_passes_its_state_on():
    state = torch.randn(2, 3, dtype=torch.complex64)
    result, final = bk_core(torch.empty(2, 0, 3), 1j, initial_state=state, output_final_state=True)
    assert result.shape == (2, 0, 3) and result.dtype == torch.complex64
    assert torch.equal(final, state)


@settings(max_examples=20, deadline=None)
@given(blend=st.floats(0, 1), causal=st.booleans(), seed=st.integers(0, 2**31))
def test_blend_is_the_analytic_rule(blend, causal, seed):
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(2, 7, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    upstream = torch.randn(2, 7, 2, dtype=torch.complex128, generator=generator)
    result = bk_core(v, 0.2 + 0.8j, causal=causal, grad="blend", blend=blend)
    assert torch.equal(result.detach(), bk_core(v.detach(), 0.2 + 0.8j, causal=causal))
    (gradient,) = torch.autograd.grad(result, v, upstream)
    square = result.detach() ** 2
    expected = -(upstream.conj() * ((1 - blend) * square + blend / square)).real
    assert relative_error(gradient, expected) < 1e-12


def test_blend_is_finite_where_the_resolvent_vanishes():
    v = torch.full((1, 3, 1), 1e18, requires_grad=True)
    bk_core(v, 1j, grad="blend").real.sum().backward()
    assert torch.isfinite(v.grad).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"v": torch.zeros(2, 3)}, "batch, tokens, heads"),
        ({"v": torch.zeros(2, 3, 1, dtype=torch.int64)}, "floating-point"),
        ({"v": torch.zeros(2, 3, 1, dtype=torch.complex64)}, "floating-point"),
        ({"z": 1.0}, "Im z > 0"),
        ({"z": -1j}, "Im z > 0"),
        ({"z": torch.zeros(1)}, "complex"),
        ({"z": torch.zeros(2, dtype=torch.complex64)}, "shape"),
        ({"h0": torch.zeros(3)}, "h0"),
        ({"hopping": -1.0}, ">= 0"),
        ({"hopping": float("nan")}, ">= 0"),
        ({"hopping": torch.zeros(2, 3, 1)}, "hopping"),
        ({"hopping": torch.zeros(2, 2, 1), "initial_state": torch.zeros(2, 1, dtype=torch.complex64)}, "joining"),
        ({"initial_state": torch.zeros(2, 1)}, "complex"),
        ({"initial_state": torch.zeros(1, 1, dtype=torch.complex64)}, "initial_state"),
        ({"causal": False, "output_final_state": True}, "causal"),
        ({"grad": "approximate"}, "exact"),
        ({"backend": "magic"}, "backend"),
        ({"grad": "blend", "blend": 2.0}, "share"),
        ({"grad": "blend", "hopping": torch.ones(1, requires_grad=True)}, "detach"),
        ({"grad": "blend", "backend": "reference"}, "reference"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_mend(changes, words):
    arguments = {"v": torch.zeros(2, 3, 1), "z": 1j, **changes}
    with pytest.raises(ValueError, match=words):
        bk_core(arguments.pop("v"), arguments.pop("z"), **arguments)
