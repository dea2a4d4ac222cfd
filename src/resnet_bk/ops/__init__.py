"""Pure functions on tensors: the resolvent operators, the mixture of experts and the loss."""

from resnet_bk.ops.bk import bk_core as bk_core
from resnet_bk.ops.bk import bk_tunnel as bk_tunnel
from resnet_bk.ops.carry import bk_carry as bk_carry

__all__ = ["bk_carry", "bk_core", "bk_tunnel"]
