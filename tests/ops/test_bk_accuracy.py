"""Every backend in float32 against complex128: values and all gradients, over lengths, eta, potentials and hoppings.

The sweep compiled for the CPU in double precision is what the others are held to; test_bk_core.py holds it to the
dense inverse, and the first test here to the definition.
"""

import pytest
import torch
from dense_oracle import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_bk.ops import bk_core, bk_tunnel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOAT32_EPS = torch.finfo(torch.float32).eps
# Errors stay below this many float32 eps times the condition of the problem.
CONDITION_CONSTANT = 8
BACKENDS = ["cpu", "torch", "triton"]
LENGTHS = [1, 2, 3, 127, 128, 129, 1000, 4096]
LONG = [65_537, 1_048_576]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
NAMES = ("v", "E", "eta", "h0", "hopping", "state")


def interpreted(backend):
    """Whether seconds are taken for what a GPU does in microseconds."""
    return backend == "triton" and DEVICE.type == "cpu"


def problem(length, *, eta, strength, hopping, causal, seed, batch_size=2, heads=3, per_token=False):
    """Inputs in float32, that is numbers which both precisions have, and a gradient for the result."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size):
        return 2 * torch.rand(*size, generator=generator) - 1

    bonds_shape = (batch_size, length - (0 if causal else 1), heads) if per_token else (heads,)
    inputs = {
        "v": strength * uniform(batch_size, length, heads),
        "E": uniform(heads),
        "eta": eta * (1 + uniform(heads).abs()),
        "h0": uniform(heads) - 1,
        "hopping": hopping * (0.5 + 0.5 * uniform(bonds_shape).abs()) if bonds_shape[-2:] != (0, heads) else None,
        "state": torch.complex(uniform(batch_size, heads), uniform(batch_size, heads).abs()) / 2 if causal else None,
    }
    weights = torch.complex(uniform(batch_size, length, heads), uniform(batch_size, length, heads))
    return inputs, weights


def solve(inputs, weights, *, causal, backend, dtype):
    """Value and gradients of the given precision, by name."""
    device = DEVICE if backend == "triton" else torch.device("cpu")
    wide = {
        name: x.to(device, dtype.to_complex() if x.is_complex() else dtype).requires_grad_()
        for name, x in inputs.items()
        if x is not None
    }
    z = torch.complex(wide["E"], wide["eta"])
    result = bk_core(
        wide["v"],
        z,
        h0=wide["h0"],
        hopping=wide.get("hopping", 1.0),
        initial_state=wide.get("state"),
        causal=causal,
        backend=backend,
    )
    objective = (result * weights.to(device, result.dtype)).real.sum()
    gradients = torch.autograd.grad(objective, list(wide.values()), allow_unused=True)
    return {"value": result.detach(), **dict(zip(wide, gradients, strict=True))}


def errors(inputs, weights, *, causal, backend):
    ours = solve(inputs, weights, causal=causal, backend=backend, dtype=torch.float32)
    exact = solve(inputs, weights, causal=causal, backend="cpu", dtype=torch.float64)
    assert all(x is None or torch.isfinite(torch.view_as_real(x) if x.is_complex() else x).all() for x in ours.values())
    return {name: relative_error(ours[name].cpu(), exact[name]) for name in exact if exact[name] is not None}, exact


def condition(inputs, weights, exact, *, causal):
    """By how much relative changes of all inputs are magnified in the value and in each gradient, the most of 3."""
    worst = dict.fromkeys(exact, 1.0)
    step = 1e-8
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        moved = {
            name: None
            if x is None
            else x.to(torch.complex128 if x.is_complex() else torch.float64)
            * (1 + step * torch.randn(x.shape, generator=generator, dtype=torch.float64))
            for name, x in inputs.items()
        }
        there = solve(moved, weights, causal=causal, backend="cpu", dtype=torch.float64)
        for name, value in exact.items():
            if value is not None:
                worst[name] = max(worst[name], relative_error(there[name], value) / step)
    return worst


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("eta", [1e-3, 0.5])
def test_the_double_precision_sweep_is_the_definition(causal, eta):
    inputs, weights = problem(200, eta=eta, strength=3.0, hopping=2.0, causal=causal, seed=0)
    swept = solve(inputs, weights, causal=causal, backend="cpu", dtype=torch.float64)
    defined = solve(inputs, weights, causal=causal, backend="reference", dtype=torch.float64)
    known = condition(inputs, weights, swept, causal=causal)
    for name, value in swept.items():
        if value is not None:
            assert relative_error(value, defined[name]) < 1e-13 * max(known.values()), name


def check_well_conditioned(length, backend, causal, settings_of_problem, **shape):
    for seed, (eta, strength, hopping, per_token) in enumerate(settings_of_problem):
        inputs, weights = problem(
            length, eta=eta, strength=strength, hopping=hopping, causal=causal, seed=seed, per_token=per_token, **shape
        )
        found, _ = errors(inputs, weights, causal=causal, backend=backend)
        assert found.pop("value") <= 2e-6
        assert max(found.values()) <= 2e-5, found


SETTINGS = [(0.5, 1.0, 1.0, False), (0.5, 100.0, 4.0, True), (1.0, 0.0, 1.0, False), (10.0, 10.0, 0.0, False)]


@each_backend
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_float32_is_right_to_two_millionths_from_eta_one_half_on(backend, causal, length):
    # The interpreter runs programs one after the other: the longest rows have the lanes of one head there.
    heads = 1 if interpreted(backend) and length == LENGTHS[-1] else 3
    of_problem = SETTINGS[:2] if interpreted(backend) else SETTINGS
    check_well_conditioned(length, backend, causal, of_problem, batch_size=1, heads=heads)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS if DEVICE.type == "cuda" else ["cpu", "torch"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", LONG)
def test_the_error_does_not_grow_with_a_million_tokens(backend, causal, length):
    check_well_conditioned(length, backend, causal, SETTINGS[:2], batch_size=1, heads=1 if length > 100_000 else 3)


@each_backend
@pytest.mark.parametrize("causal", [True, False])
@settings(max_examples=8, deadline=None)
@given(
    length=st.sampled_from([1, 2, 37, 200]),
    eta=st.sampled_from([1e-3, 1e-2, 0.1, 1.0, 5.0]),
    strength=st.sampled_from([0.0, 1.0, 10.0, 100.0]),
    hopping=st.sampled_from([0.0, 0.5, 1.0, 4.0]),
    per_token=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_elsewhere_the_error_is_that_of_the_problem(backend, causal, length, eta, strength, hopping, per_token, seed):
    batch_size, heads = 2, 3
    if interpreted(backend):
        # As many chains in one row, where they are swept together; a walk back may be as long as a row.
        batch_size, heads, length = 1, 6, min(length, 70)
    inputs, weights = problem(
        length,
        eta=eta,
        strength=strength,
        hopping=hopping,
        causal=causal,
        seed=seed,
        batch_size=batch_size,
        heads=heads,
        per_token=per_token,
    )
    found, exact = errors(inputs, weights, causal=causal, backend=backend)
    # One condition for all: a gradient is computed from the values, and is no better than they are.
    known = max(condition(inputs, weights, exact, causal=causal).values())
    assert max(found.values()) <= CONDITION_CONSTANT * FLOAT32_EPS * known


GAPS = [1e-6, 1e-3, 0.1, 3.0, 100.0]


def check_tunnel(length, gaps, backend, *, constant, batch_size=2):
    """Three heads of each gap, solved together, each gap held to the bounds by itself."""
    generator = torch.Generator().manual_seed(length)
    heads = 3 * len(gaps)
    shape = (batch_size, length, heads)
    w = torch.tensor(gaps).repeat_interleave(3) * (
        torch.ones(shape) if constant else torch.rand(shape, generator=generator)
    )
    state = torch.rand(batch_size, heads, generator=generator)
    weights = torch.randn(shape, generator=generator)
    results = {}
    for name, dtype in {"ours": torch.float32, "exact": torch.float64}.items():
        device = DEVICE if backend == "triton" and name == "ours" else torch.device("cpu")
        leaves = [x.to(device, dtype).requires_grad_() for x in (w, state)]
        value = bk_tunnel(leaves[0], initial_state=leaves[1], backend=backend if name == "ours" else "cpu")
        gradients = torch.autograd.grad((value * weights.to(device, dtype)).sum(), leaves)
        results[name] = [x.detach().cpu() for x in (value, *gradients)]
    assert all(torch.isfinite(x).all() for x in results["ours"])
    for number, gap in enumerate(gaps):
        of_gap = slice(3 * number, 3 * number + 3)
        value, *gradients = (
            relative_error(ours[..., of_gap], exact[..., of_gap])
            for ours, exact in zip(results["ours"], results["exact"], strict=True)
        )
        assert value <= 2e-6, gap
        assert max(gradients) <= 2e-5, gap


@each_backend
@pytest.mark.parametrize("length", LENGTHS)
def test_the_tunnel_keeps_its_digits_at_every_gap(backend, length):
    for constant in (True, False) if length < LENGTHS[-1] else (True,):
        check_tunnel(length, GAPS, backend, constant=constant, batch_size=2 if length < 1000 else 1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS if DEVICE.type == "cuda" else ["cpu", "torch"])
@pytest.mark.parametrize("length", LONG)
def test_the_tunnel_does_not_drift_over_a_million_tokens(backend, length):
    for constant in (True, False):
        check_tunnel(length, GAPS[:1], backend, constant=constant)


# numpy, in which Triton's kernels are interpreted, tells of each square that leaves float32; a GPU does not.
@pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning")
@each_backend
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("potential", [0.0, 1e18, 1e25, 1e38])
def test_values_and_gradients_are_finite_whatever_the_potential(backend, causal, potential):
    signs = torch.tensor([1.0, -1.0]).repeat(20).view(1, 40, 1)
    v = (potential * signs).to(DEVICE if backend == "triton" else "cpu").requires_grad_()
    result = bk_core(v, 1e-3j, causal=causal, backend=backend)
    (gradient,) = torch.autograd.grad(result.real.sum() + result.imag.sum(), v)
    assert torch.isfinite(torch.view_as_real(result)).all()
    assert torch.isfinite(gradient).all()
