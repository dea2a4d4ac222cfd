"""queries_keys_values: every backend against its definition out of plain torch operations in double precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.ops import projections, projections_torch
from resnet_bk.ops.projections import choose_projections_backend, queries_keys_values

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPSILON = 2.0**-23
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}
each_backend = pytest.mark.parametrize("backend", ["torch", "triton"])


def device_of(backend):
    return DEVICE if backend == "triton" else "cpu"


def convolved(x, weight, window, documents):
    """Token by token, tap by tap."""
    if weight is None:
        return x
    size, (rows, length, channels) = weight.shape[0], x.shape
    window = x.new_zeros(rows, size - 1, channels) if window is None else window
    documents = torch.zeros(rows, length, dtype=torch.long) if documents is None else documents
    result = []
    for i in range(length):
        y = x.new_zeros(rows, channels)
        for s in range(min(size, i + size)):
            j = i - s
            then = x[:, j] if j >= 0 else window[:, j + size - 1]
            same = documents[:, j] == documents[:, i] if j >= 0 else documents[:, i] == 0
            y = y + weight[s] * then * same.unsqueeze(-1)
        result.append(y)
    return torch.stack(result, dim=1)


def by_definition(x, heads, key_size, weight=None, window=None, documents=None, rotary=None, *, constant_norm=False):
    z = convolved(x, weight, window, documents)
    s = (z / (1 + torch.exp(-z))).unflatten(-1, (heads, -1))
    q, k, v = s[..., :key_size], s[..., key_size : 2 * key_size], s[..., 2 * key_size :]
    rms = [torch.sqrt((y**2).mean(-1, keepdim=True) + EPSILON) for y in (q, k)]
    q, k = (y / (root.detach() if constant_norm else root) for y, root in zip((q, k), rms, strict=True))
    if rotary is not None:
        turn = torch.complex(*rotary).unsqueeze(2)
        numbers = (torch.complex(y[..., : key_size // 2], y[..., key_size // 2 :]) * turn for y in (q, k))
        q, k = (torch.cat([y.real, y.imag], dim=-1) for y in numbers)
    return q, k, v


def arguments(
    *,
    length,
    rows=2,
    heads=3,
    key_size=6,
    value_size=5,
    size=4,
    window=False,
    documents=False,
    rotary=None,
    dtype=torch.float32,
    seed=0,
):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    channels = heads * (2 * key_size + value_size)
    inputs = {"x": normal(rows, length, channels).to(dtype), "num_heads": heads, "key_size": key_size}
    if size:
        inputs["weight"] = normal(size, channels).to(torch.promote_types(dtype, torch.float32))
        if window:
            inputs["window"] = normal(rows, size - 1, channels).to(dtype)
        if documents:
            inputs["documents"] = (torch.rand(rows, length, generator=generator) < 0.3).long().cumsum(1)
    if rotary is not None:
        angles = normal(1 if rotary == "shared" else rows, length, key_size // 2)
        inputs["rotary"] = (angles.cos(), angles.sin())
    return inputs


def moved(inputs, change):
    return {
        name: tuple(map(change, x)) if isinstance(x, tuple) else change(x) if isinstance(x, torch.Tensor) else x
        for name, x in inputs.items()
    }


def with_gradients(function, inputs, **options):
    inputs = dict(inputs)
    leaves = [name for name in ("x", "weight") if name in inputs]
    for name in leaves:
        inputs[name] = inputs[name].detach().clone().requires_grad_()
    x, heads, key_size = (inputs.pop(name) for name in ("x", "num_heads", "key_size"))
    results = function(x, heads, key_size, **inputs, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).to(y.device) for y in results]
    total = sum((y.double() * w).sum() for y, w in zip(results, weights, strict=True))
    gradients = torch.autograd.grad(total, [x, *([inputs["weight"]] if "weight" in inputs else [])])
    return dict(zip(("q", "k", "v", *leaves), (*results, *gradients), strict=True))


def check(inputs, backend, tolerance=None):
    """The tolerance is relative to the result's norm.

    A norm's gradient is a difference, of which few coordinates leave next to nothing: where any number of them comes
    up, with a tolerance that is given, the smallest is of a term of that difference, the gradient with a constant norm.
    """
    doubles = moved(inputs, lambda x: x.double() if x.is_floating_point() else x)
    expected = with_gradients(by_definition, doubles)
    terms = with_gradients(by_definition, doubles, constant_norm=True)
    device = device_of(backend)
    actual = with_gradients(queries_keys_values, moved(inputs, lambda x: x.to(device)), backend=backend)
    for name, x in expected.items():
        assert actual[name].isfinite().all(), name
        dtype = inputs["x"].dtype
        allowed = (tolerance or TOLERANCE[dtype]) * x.norm()
        if dtype == torch.float32 and tolerance is not None:
            allowed = max(allowed, TOLERANCE[dtype] * terms[name].norm())
        assert (actual[name].cpu() - x).norm() <= allowed, name
    return actual


@each_backend
@pytest.mark.parametrize("length", [1, 2, 5, 70])
@pytest.mark.parametrize(
    "options",
    [
        {"size": 0},
        {},
        {"size": 2, "window": True},
        {"documents": True},
        {"window": True, "documents": True, "rotary": "shared"},
        {"rotary": "each"},
        {"size": 0, "rotary": "each"},
        {"size": 1},
    ],
    ids=str,
)
def test_it_is_its_definition_with_every_gradient(backend, length, options, monkeypatch):
    monkeypatch.setattr(projections_torch, "PIECE", 500)  # of 51 channels: some tokens of a row, or two rows
    actual = check(arguments(length=length, **options), backend)
    assert all(x.is_contiguous() for x in actual.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@each_backend
def test_other_types_have_their_own_precision(dtype, backend):
    inputs = arguments(length=33, window=True, documents=True, rotary="shared", dtype=dtype)
    if dtype == torch.float64 and backend == "triton":
        with pytest.raises(ValueError, match="backend='torch'"):
            queries_keys_values(**moved(inputs, lambda x: x.to(DEVICE)), backend="triton")
        return
    actual = check(inputs, backend, 2e-3 if dtype == torch.float16 else None)
    assert actual["q"].dtype == actual["v"].dtype == actual["x"].dtype == dtype
    assert actual["weight"].dtype == torch.promote_types(dtype, torch.float32)


@each_backend
@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 70),
    heads=st.integers(1, 3),
    key_size=st.integers(1, 40),
    value_size=st.integers(1, 40),
    size=st.integers(0, 5),
    window=st.booleans(),
    documents=st.booleans(),
    rotary=st.sampled_from([None, "shared", "each"]),
    piece=st.integers(1, 5000),
    seed=st.integers(0, 2**31),
)
def test_any_shape(backend, key_size, rotary, piece, **shape):
    rotary = rotary if key_size % 2 == 0 else None
    before, projections_torch.PIECE = projections_torch.PIECE, piece
    try:
        # Keys of few coordinates next to zero, as silu makes them, lose digits to the division.
        check(arguments(key_size=key_size, rotary=rotary, **shape), backend, 2e-5)
    finally:
        projections_torch.PIECE = before


@each_backend
def test_nothing_reads_a_later_token_or_another_row(backend):
    inputs = moved(arguments(length=70, rotary="shared"), lambda x: x.to(device_of(backend)))
    before = queries_keys_values(**inputs, backend=backend)
    for place in (0, 3, 63, 64, 69):
        changed = {**inputs, "x": inputs["x"].clone()}
        changed["x"][0, place] -= 1
        for x, y in zip(queries_keys_values(**changed, backend=backend), before, strict=True):
            assert torch.equal(x[0, :place], y[0, :place])
            assert torch.equal(x[1], y[1])
            assert not torch.equal(x[0, place], y[0, place])


@each_backend
def test_documents_of_a_row_are_as_if_each_were_alone(backend):
    inputs = moved(arguments(length=20, documents=True), lambda x: x.to(device_of(backend)))
    inputs["documents"][:] = (torch.arange(20) >= 7).long()
    packed = queries_keys_values(**inputs, backend=backend)
    del inputs["documents"]
    for part in (slice(0, 7), slice(7, 20)):
        alone = queries_keys_values(**{**inputs, "x": inputs["x"][:, part]}, backend=backend)
        for x, y in zip(packed, alone, strict=True):
            torch.testing.assert_close(x[:, part], y)


@each_backend
def test_pieces_joined_by_their_windows_are_the_whole(backend):
    inputs = moved(arguments(length=20, window=True), lambda x: x.to(device_of(backend)))
    whole = queries_keys_values(**inputs, backend=backend)
    x, behind = inputs["x"], torch.cat([inputs["window"], inputs["x"]], dim=1)
    for part in (slice(0, 1), slice(1, 2), slice(2, 20)):
        window = behind[:, part.start : part.start + 3]
        piece = queries_keys_values(**{**inputs, "x": x[:, part], "window": window}, backend=backend)
        for y, z in zip(whole, piece, strict=True):
            torch.testing.assert_close(y[:, part], z)


@each_backend
@pytest.mark.parametrize("length", [0, 3])
def test_no_rows_or_tokens_give_none(backend, length):
    inputs = moved(arguments(length=length, rows=0 if length else 2), lambda x: x.to(device_of(backend)))
    actual = with_gradients(queries_keys_values, inputs, backend=backend)
    assert actual["q"].shape[:2] == inputs["x"].shape[:2]
    assert not actual["weight"].any()


@each_backend
def test_small_halves_are_divided_by_their_own_length(backend):
    # The machine epsilon of bfloat16 added to the squares would leave them at a tenth of it.
    x = torch.full((1, 3, 10), 2e-2, dtype=torch.bfloat16, device=device_of(backend))
    q, k, _ = queries_keys_values(x, 1, 4, backend=backend)
    assert (q - 1).abs().max() < 1e-2
    assert (k - 1).abs().max() < 1e-2


@each_backend
def test_what_silu_takes_to_zero_stays_finite(backend):
    check(moved(arguments(length=5, size=0), lambda x: -30 - 10 * x.abs()), backend, 1e-4)


@each_backend
@pytest.mark.parametrize("with_options", [False, True])
def test_torch_accepts_the_operator(backend, with_options):
    inputs = moved(arguments(length=9, window=True, rotary="shared"), lambda x: x.to(DEVICE))
    x, weight = inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()
    documents = torch.zeros(2, 9, dtype=torch.int32, device=DEVICE)
    options = (weight, inputs["window"], documents, *inputs["rotary"]) if with_options else [None] * 5
    torch.library.opcheck(projections._projections, (x, *options, 3, 6, backend))


def test_the_convolution_is_counted_and_counted_again_in_backward():
    inputs = arguments(length=7)
    x = inputs["x"].requires_grad_()
    inputs["weight"].requires_grad_()
    counter = FlopCounterMode(display=False)
    with counter:
        q, k, v = queries_keys_values(**inputs)
    assert counter.get_total_flops() == 2 * 4 * x.numel()
    with counter:
        (q.sum() + k.sum() + v.sum()).backward()
    assert counter.get_total_flops() == 6 * 4 * x.numel()


@pytest.mark.parametrize(
    ("device", "dtype", "name"),
    [
        ("cpu", torch.float32, "torch"),
        ("mps", torch.float32, "torch"),
        ("cuda", torch.bfloat16, "triton"),
        ("cuda", torch.float64, "torch"),
    ],
)
def test_the_backend_is_the_fastest_that_can(device, dtype, name):
    assert choose_projections_backend(torch.device(device), dtype).name == name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(2, 5)}, "batch, tokens"),
        ({"num_heads": 2}, "2 heads"),
        ({"key_size": 0}, "at least 1"),
        ({"weight": torch.zeros(4, 2)}, "weight"),
        ({"weight": None, "window": torch.zeros(2, 3, 51)}, "weight too"),
        ({"window": torch.zeros(2, 4, 51)}, "window"),
        ({"documents": torch.zeros(2, 5)}, "integers"),
        ({"rotary": (torch.zeros(1, 5, 2), torch.zeros(1, 5, 2))}, "rotary"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_mend(changes, words):
    with pytest.raises(ValueError, match=words):
        queries_keys_values(**{**arguments(length=5), **changes})
