"""Content carried by the causal resolvent: matrix-valued states, in three forms that mean the same.

Read the modules in this order:

- ``reference``: every pair of tokens, and token by token (how a model decodes);
- ``chunked``: chunks of tokens as matrix products, and the exact adjoint, in plain torch for every device;
- ``gpu``: the same in Triton;
- ``operators``: the chunked form as torch operators (autograd, fake tensors, FLOP formulas);
- ``api``: the public function, which checks its arguments and chooses a backend.
"""

from resnet_bk.ops.carry.api import bk_carry as bk_carry
from resnet_bk.ops.carry.api import choose_carry_backend as choose_carry_backend

__all__ = ["bk_carry", "choose_carry_backend"]
