"""Ways to train, from the fastest to the most frugal."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Where weights, moments and activations are while training; ``resnet-bk train`` can do all of it.

    ``half`` is autocast. ``checkpointing`` is what backward computes again. ``offload_optimizer`` has masters, moments
    and the update on the host; then matrices may be ``half_weights``, blocks may be streamed, and moments bfloat16. A
    step block by block may be ``replayed`` from CUDA graphs.
    """

    name: str
    half: bool = False
    checkpointing: Literal["none", "selective", "full", "offload"] = "none"
    offload_optimizer: bool = False
    half_weights: bool = False
    stream_weights: bool = False
    half_moments: bool = False
    replayed: bool = False

    @property
    def goes_by_block(self) -> bool:
        """Whether all micro-batches of a step go through a block before the next one: inputs and gradients leave the
        device anyway, and so do so once."""
        return self.offload_optimizer and self.checkpointing == "offload"

    @property
    def weight_bytes(self) -> int:
        """Bytes of a matrix's number on the device."""
        return 2 if self.half_weights else 4


STRATEGIES = (
    Strategy(name="fp32"),
    Strategy(name="mixed precision", half=True),
    Strategy(name="selective checkpointing", half=True, checkpointing="selective"),
    Strategy(name="full checkpointing", half=True, checkpointing="full"),
    Strategy(name="offloaded optimizer", half=True, checkpointing="full", offload_optimizer=True, half_weights=True),
    Strategy(
        name="offloaded activations", half=True, checkpointing="offload", offload_optimizer=True, half_weights=True
    ),
    Strategy(
        name="streamed weights",
        half=True,
        checkpointing="offload",
        offload_optimizer=True,
        half_weights=True,
        stream_weights=True,
    ),
)
