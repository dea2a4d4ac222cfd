"""Products of groups of rows: the operators, the Triton kernels behind them, and which one is taken."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.ops import grouped
from resnet_bk.ops.bk.api import BackendChoice
from resnet_bk.ops.grouped import choose_moe_backend, grouped_mm

CUDA = torch.device("cuda")
HERE = CUDA if torch.cuda.is_available() else torch.device("cpu")  # there, Triton's interpreter runs the kernels
# Rows, width before, width after, groups.
SHAPES = [(0, 8, 8, 2), (1, 4, 6, 3), (5, 16, 16, 1), (130, 20, 33, 5), (300, 64, 130, 4), (1500, 8, 8, 2)]


def rows_of_groups(rows, width_in, width_out, groups, dtype=torch.float64, device=HERE):
    """Rows, matrices, gradients of the results, ends of the groups, and each row's group. A middle group is empty."""
    generator = torch.Generator().manual_seed(rows)
    make = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)  # noqa: E731
    group = torch.randint(groups, (rows,), generator=generator)
    group = group.masked_fill(group == 1, groups - 1).sort().values
    ends = torch.searchsorted(group, torch.arange(groups), right=True, out_int32=True).to(device)
    return make(rows, width_in), make(groups, width_in, width_out), make(rows, width_out), ends, group.to(device)


def product(x, w, group):
    return torch.einsum("tk,tkm->tm", x.double(), w.double()[group])


def outer(x, g, group, groups):
    one_hot = torch.nn.functional.one_hot(group, groups).double()
    return torch.einsum("te,tk,tm->ekm", one_hot, x.double(), g.double())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_row_is_multiplied_with_its_groups_matrix(shape):
    x, w, g, ends, group = rows_of_groups(*shape)
    x, w = x.requires_grad_(), w.requires_grad_()
    y = grouped_mm(x, w, ends)
    torch.testing.assert_close(y, product(x, w, group))
    x_bar, w_bar = torch.autograd.grad(y, (x, w), g)
    torch.testing.assert_close(x_bar, product(g, w.transpose(1, 2), group))
    torch.testing.assert_close(w_bar, outer(x, g, group, shape[-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # Triton's interpreter has no bfloat16
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_do_the_same_with_sums_in_float32(shape, dtype):
    from resnet_bk.ops import grouped_gpu

    x, w, g, ends, group = rows_of_groups(*shape, dtype=dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 2e-3}
    for found, exact in (
        (grouped_gpu.grouped_mm(x, w, ends), product(x, w, group)),
        (grouped_gpu.grouped_mm(g, w.transpose(1, 2), ends), product(g, w.transpose(1, 2), group)),
        (grouped_gpu.grouped_outer(x, g, ends), outer(x, g, group, shape[-1])),
    ):
        assert found.dtype == dtype and found.is_contiguous()
        torch.testing.assert_close(found.double(), exact, **tolerance)


def test_gradients_through_the_kernels_are_those_of_the_loops(monkeypatch):
    x, w, g, ends, group = rows_of_groups(130, 20, 33, 5, dtype=torch.float32)
    monkeypatch.setattr(grouped, "needs_no_operator", lambda _x: False)
    monkeypatch.setattr(grouped, "choose_moe_backend", lambda *_: BackendChoice(name="triton", reason=""))
    y = grouped_mm(x.requires_grad_(), w.requires_grad_(), ends)
    x_bar, w_bar = torch.autograd.grad(y, (x, w), g)
    tolerance = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(y.double(), product(x, w, group), **tolerance)
    torch.testing.assert_close(x_bar.double(), product(g, w.transpose(1, 2), group), **tolerance)
    torch.testing.assert_close(w_bar.double(), outer(x, g, group, 5), **tolerance)


def test_a_row_does_not_depend_on_its_place_in_a_tile_nor_on_its_neighbours():
    from resnet_bk.ops import grouped_gpu

    x, w, _, ends, _ = rows_of_groups(300, 20, 33, 3, dtype=torch.float32)
    whole = grouped_gpu.grouped_mm(x, w, ends)
    for end in (1, 63, 64, 65, int(ends[0])):
        alone = grouped_gpu.grouped_mm(x[:end], w, ends.clamp(max=end))
        assert torch.equal(alone, whole[:end])
    others = torch.cat([x[:70], torch.randn_like(x[70:])])
    assert torch.equal(grouped_gpu.grouped_mm(others, w, ends)[:70], whole[:70])


def test_the_operators_pass_torchs_own_checks():
    x, w, g, ends, _ = rows_of_groups(9, 4, 6, 3)
    torch.library.opcheck(torch.ops.resnet_bk.grouped_product, (x, w, ends))
    torch.library.opcheck(torch.ops.resnet_bk.grouped_sums, (x, g, ends))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_operators_are_the_loops_with_their_work_counted(shape):
    x, w, g, ends, group = rows_of_groups(*shape)
    rows, width_in, width_out, groups = shape
    for operator, other, exact in (
        (grouped.grouped_product, w, product(x, w, group)),
        (grouped.grouped_sums, g, outer(x, g, group, groups)),
    ):
        with FlopCounterMode(display=False) as counter:
            found = operator(x, other, ends)
        torch.testing.assert_close(found, exact)
        assert counter.get_total_flops() == 2 * rows * width_in * width_out


def test_a_second_derivative_is_refused():
    x, w, _, ends, _ = rows_of_groups(9, 4, 6, 3)
    y = grouped_mm(x.requires_grad_(), w, ends)
    with pytest.raises(RuntimeError, match="grouped_mm has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("device", "dtype", "shape", "capability", "name"),
    [
        ("cpu", torch.bfloat16, (2560, 64, 128), None, "loop"),
        ("mps", torch.float32, (2560, 64, 128), None, "loop"),
        ("cuda", torch.float64, (2560, 64, 128), (9, 0), "loop"),
        ("cuda", torch.float32, (10**6, 512, 1024), (9, 0), "triton"),
        ("cuda", torch.float16, (10**6, 512, 1024), (9, 0), "triton"),
        ("cuda", torch.bfloat16, (2560, 64, 128), (9, 0), "triton"),
        ("cuda", torch.bfloat16, (10**6, 512, 1024), (9, 0), "grouped_mm"),
        ("cuda", torch.bfloat16, (10**6, 512, 1024), (10, 0), "grouped_mm"),
        ("cuda", torch.bfloat16, (10**6, 512, 1020), (9, 0), "triton"),
        ("cuda", torch.bfloat16, (10**6, 512, 1024), (8, 6), "triton"),
    ],
)
def test_the_backend_follows_device_dtype_and_size(monkeypatch, device, dtype, shape, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    choice = choose_moe_backend(torch.device(device), dtype, *shape)
    assert (choice.name, bool(choice.reason)) == (name, True)


def test_sizes_that_nobody_reads_are_not_read_under_fake_tensors():
    with torch._subclasses.FakeTensorMode() as mode:
        x, w, g, ends = (mode.from_tensor(t) for t in rows_of_groups(9, 4, 6, 3)[:4])
        assert grouped_mm(x, w, ends).shape == (9, 6)
        assert grouped.grouped_sums(x, g, ends).shape == (3, 4, 6)
