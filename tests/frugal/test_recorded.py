"""Passes that are replayed compute, from the same rooms and into the same ones, what they computed the first time."""

import pytest
import torch

from resnet_bk.frugal.recorded import RecordedPasses

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def numbers(*size):
    return torch.randn(*size, device=DEVICE)


def doubled_and_summed(given):
    x, more = given
    return 2 * x + more, x.sum()


def test_each_run_has_results_of_its_own():
    passes = RecordedPasses(DEVICE)
    given = [(numbers(3, 4), numbers(3, 4)) for _ in range(4)]
    found = [passes.run("sum", doubled_and_summed, pair) for pair in given]
    for (x, more), (y, total) in zip(given, found, strict=True):
        assert torch.equal(y, 2 * x + more) and torch.equal(total, x.sum())
    assert len({y.data_ptr() for y, _ in found}) == len(found)


def test_what_is_given_is_read_and_not_kept():
    passes = RecordedPasses(DEVICE)
    x, more = numbers(3), numbers(3)
    before = x.clone(), more.clone()

    def spoiling(given):
        given[0].zero_()
        return [given[1] + 1]

    passes.run("spoil", spoiling, [x, more])
    assert torch.equal(x, before[0]) and torch.equal(more, before[1])


def test_passes_share_rooms_where_shape_and_type_are_the_same():
    passes = RecordedPasses(DEVICE)
    places = set()

    def noting(given):
        places.add(given[0].data_ptr())
        return [given[0] + 1]

    for key in ("one", "other"):
        passes.run(key, noting, [numbers(5)])
    assert len(places) == 1
    passes.run("longer", noting, [numbers(6)])
    passes.run("double", noting, [numbers(5).double()])
    assert len(places) == 3


def test_gradients_of_a_module_are_those_of_autograd():
    torch.manual_seed(0)
    layer, passes = torch.nn.Linear(4, 3, device=DEVICE), RecordedPasses(DEVICE)

    def backward(given):
        with torch.enable_grad():
            x = given[0].detach().requires_grad_()
            return torch.autograd.grad(layer(x).tanh(), [x, *layer.parameters()], given[1])

    for _ in range(3):
        x, gradient = numbers(2, 4).requires_grad_(), numbers(2, 3)
        found = passes.run("backward", backward, [x, gradient])
        expected = torch.autograd.grad(layer(x).tanh(), [x, *layer.parameters()], gradient)
        assert all(torch.allclose(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        with torch.no_grad():
            layer.weight.mul_(1.5)


def test_forgetting_gives_back_rooms_and_begins_again():
    passes = RecordedPasses(DEVICE)
    passes.run("sum", doubled_and_summed, [numbers(3), numbers(3)])
    passes.forget()
    assert not passes._rooms and not passes._recorded
    x, more = numbers(3), numbers(3)
    assert torch.equal(passes.run("sum", doubled_and_summed, [x, more])[0], 2 * x + more)


def test_what_a_pass_raises_reaches_the_caller():
    def failing(_given):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        RecordedPasses(torch.device("cpu")).run("fail", failing, [torch.ones(1)])
