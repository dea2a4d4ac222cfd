"""Where chunks of the Triton sweeps start, with so long a memory that what lies before them shows in every digit."""

import pytest
import torch
from dense_oracle import relative_error

from resnet_bk.ops.bk.operators import sweeps

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# In the middle of the band nothing decays but by eta: a twentieth a site.
ETA, TOLERANCE = 0.05, 2e-5
LENGTHS = [17, 33, 50]


def chain(length, heads, per_token):
    torch.manual_seed(length)
    v = 0.1 * torch.randn(2, length, heads, dtype=torch.float64)
    shift = torch.tensor([0.0, -ETA], dtype=torch.float64).repeat(heads, 1)
    bonds = 0.8 + 0.4 * torch.rand(2, length, heads) if per_token else 0.8 + 0.4 * torch.rand(heads)
    state = torch.randn(2, heads, 2, dtype=torch.float64)
    state[..., 1].abs_()
    return v, shift, bonds.double(), state


def in_float32(tensors):
    return [tensor.float().to(DEVICE) for tensor in tensors]


@pytest.mark.parametrize("reverse", [False, True], ids=["from the left", "from the right"])
@pytest.mark.parametrize("per_token", [False, True], ids=["bonds of heads", "bonds of tokens"])
@pytest.mark.parametrize("heads", [1, 3])
def test_the_state_reaches_every_chunk(heads, per_token, reverse):
    for length in LENGTHS:
        *problem, state = chain(length, heads, per_token)
        # Read from the right, a token's own bond joins it to an earlier one: none is left for a state.
        problem.append(state * 0 if per_token and reverse else state)
        exact = sweeps("cpu").causal(*problem, reverse=reverse)
        ours = sweeps("triton").causal(*in_float32(problem), reverse=reverse)
        assert relative_error(ours.cpu().double(), exact) < TOLERANCE, length


@pytest.mark.parametrize("per_token", [False, True], ids=["bonds of heads", "bonds of tokens"])
@pytest.mark.parametrize("heads", [1, 3])
def test_both_ends_of_a_row_reach_every_chunk(heads, per_token):
    for length in LENGTHS:
        problem = chain(length, heads, per_token)[:3]
        exact = sweeps("cpu").bidirectional(*problem)
        ours = sweeps("triton").bidirectional(*in_float32(problem))
        assert relative_error(ours.cpu().double(), exact) < TOLERANCE, length
