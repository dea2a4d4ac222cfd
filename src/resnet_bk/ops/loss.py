"""The loss of a language model."""

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def shift_targets(labels_BN: Tensor) -> Tensor:
    """Targets for each position: the next token's label, and nothing for the last. ``(B, N)``."""
    return F.pad(labels_BN[:, 1:], (0, 1), value=IGNORE_INDEX)


def cross_entropy(logits_BNV: Tensor, targets_BN: Tensor) -> Tensor:
    """Mean over the targets that are not ``-100`` of -log p(target), in nats, in float32 at least."""
    logits_TV = logits_BNV.flatten(0, 1)
    if logits_TV.dtype.itemsize < 4:
        logits_TV = logits_TV.float()
    return F.cross_entropy(logits_TV, targets_BN.flatten(), ignore_index=IGNORE_INDEX)
