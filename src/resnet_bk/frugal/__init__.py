"""Training in little device memory: what it needs can wait in host memory, or be computed again.

Each part works alone, on any ``nn.Module``; ``training.strategy`` puts them together. Where several are used: the
optimizer first (its masters are float32), then half weights, streaming, checkpointing.

    optimizer = OffloadedAdamW(model.parameters(), blocks=model.layers)
    half_weights(model, torch.bfloat16)
    model.to("cuda")
    checkpoint_blocks(model.layers, "offload")
"""

from resnet_bk.frugal.activations import HostActivations as HostActivations
from resnet_bk.frugal.checkpointing import CheckpointHandle as CheckpointHandle
from resnet_bk.frugal.checkpointing import checkpoint_blocks as checkpoint_blocks
from resnet_bk.frugal.micro_batches import MicroBatches as MicroBatches
from resnet_bk.frugal.micro_batches import split_rows as split_rows
from resnet_bk.frugal.optimizer import OffloadedAdamW as OffloadedAdamW
from resnet_bk.frugal.precision import half_weights as half_weights
from resnet_bk.frugal.streaming import StreamedBlocks as StreamedBlocks
from resnet_bk.frugal.streaming import stream_blocks as stream_blocks

__all__ = [
    "CheckpointHandle",
    "HostActivations",
    "MicroBatches",
    "OffloadedAdamW",
    "StreamedBlocks",
    "checkpoint_blocks",
    "half_weights",
    "split_rows",
    "stream_blocks",
]
