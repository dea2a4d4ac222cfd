"""Weights in a half type: which are rounded, to what, and that nothing else of them changes."""

import pytest
import torch
from torch import nn

from resnet_bk.frugal.precision import half_weights, is_vector

HALF_TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3, bias=False))


def types(module):
    return {name: parameter.dtype for name, parameter in module.named_parameters()}


@HALF_TYPES
def test_matrices_are_rounded_to_nearest_and_vectors_stay(dtype):
    module, before = network(), network()
    half_weights(module, dtype)
    matrices = {"0.weight", "1.weight", "3.weight"}
    assert {name for name, kind in types(module).items() if kind == dtype} == matrices
    for (name, rounded), exact in zip(module.named_parameters(), before.parameters(), strict=True):
        expected = exact.to(dtype) if name in matrices else exact
        assert torch.equal(rounded, expected), name
        assert rounded.dtype == expected.dtype, name
    assert not torch.equal(module[1].weight.float(), before[1].weight), "there was something to round"


@HALF_TYPES
def test_parameters_stay_the_objects_that_they_are(dtype):
    module = network()
    before = list(module.parameters())
    half_weights(module, dtype)
    for one, other in zip(before, module.parameters(), strict=True):
        assert one is other
        assert isinstance(one, nn.Parameter) and one.requires_grad and one.is_leaf


def test_a_tied_matrix_stays_tied():
    module = nn.ModuleDict({"embed": nn.Embedding(5, 8), "head": nn.Linear(8, 5, bias=False)})
    module["head"].weight = module["embed"].weight
    half_weights(module, torch.bfloat16)
    assert module["head"].weight is module["embed"].weight
    assert module["head"].weight.dtype == torch.bfloat16


def test_keep_sees_names_and_parameters_and_decides():
    module, seen = network(), {}

    def keep(name, parameter):
        seen[name] = parameter
        return name.startswith("1.")

    half_weights(module, torch.bfloat16, keep=keep)
    assert seen == dict(module.named_parameters())
    assert {name for name, dtype in types(module).items() if dtype == torch.float32} == {"1.weight", "1.bias"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_what_is_not_float32_is_left_as_it_is(dtype):
    module = nn.Module()
    module.matrix = nn.Parameter(torch.ones(3, 3, dtype=dtype), requires_grad=False)
    half_weights(module, torch.bfloat16)
    assert module.matrix.dtype == dtype


def test_buffers_are_left_as_they_are():
    module = nn.Module()
    module.register_buffer("table", torch.ones(3, 3))
    half_weights(module, torch.bfloat16)
    assert module.table.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_type_that_is_no_half_type_is_refused_before_anything_changes(dtype):
    module = network()
    with pytest.raises(ValueError, match=r"^half weights are bfloat16 or float16, not torch"):
        half_weights(module, dtype)
    assert set(types(module).values()) == {torch.float32}


@pytest.mark.parametrize(("shape", "expected"), [((), True), ((4,), True), ((4, 4), False), ((2, 4, 4), False)])
def test_vectors_are_what_has_one_axis_at_most(shape, expected):
    assert is_vector("any name", nn.Parameter(torch.ones(shape))) is expected


@HALF_TYPES
def test_a_gradient_under_autocast_is_that_of_the_rounded_weights(dtype):
    """Where the weights were representable from the start, autocast computes with the same numbers."""
    half, single = network()[1:], network()[1:]
    for parameter in single.parameters():
        parameter.data = parameter.data.to(dtype).float()
    half_weights(half, dtype)
    half[0].bias.data = single[0].bias.data.clone()
    x = torch.randn(4, 8)
    gradients = []
    for module in (half, single):
        with torch.autocast("cpu", dtype=dtype):
            module(x).float().square().sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one.float(), other)
