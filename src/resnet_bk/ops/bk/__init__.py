"""BK-Core: the diagonal of the resolvent of a tridiagonal Hamiltonian, in O(N).

For each sequence and head, H is tridiagonal with diagonal ``h0 + v_i`` and off-diagonal products
``t_i = b_i c_i >= 0``, and ``a_i = h0 + v_i - z``. Read the modules in this order:

- ``reference``: the definition, by leading and trailing determinants, in complex128;
- ``scan``: the algorithm, by ratios of those determinants, and its exact adjoint, in plain torch for every device;
- ``cpu`` and ``gpu``: the same, compiled by numba and by Triton;
- ``operators``: the sweeps as torch operators (autograd, fake tensors, FLOP formulas);
- ``api``: the public functions, which check their arguments and choose a backend.
"""

from resnet_bk.ops.bk.api import BackendChoice as BackendChoice
from resnet_bk.ops.bk.api import available_backends as available_backends
from resnet_bk.ops.bk.api import bk_core as bk_core
from resnet_bk.ops.bk.api import bk_core_pairs as bk_core_pairs
from resnet_bk.ops.bk.api import bk_tunnel as bk_tunnel
from resnet_bk.ops.bk.api import choose_backend as choose_backend

__all__ = ["BackendChoice", "available_backends", "bk_core", "bk_core_pairs", "bk_tunnel", "choose_backend"]
