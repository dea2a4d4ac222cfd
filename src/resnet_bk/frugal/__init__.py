"""Training in little device memory: what it needs can wait in host memory, or be computed again.

Each part works alone, on any ``nn.Module``; ``training.strategy`` puts them together. Where several are used: the
optimizer first (its masters are float32), then half weights, streaming, checkpointing.

    optimizer = OffloadedAdamW(model.parameters(), blocks=model.layers)
    half_weights(model, torch.bfloat16)
    model.to("cuda")
    checkpoint_blocks(model.layers, "offload")

Where a step has several pieces of a batch, ``backward_by_block`` takes all of them through a block before the next one,
and ``RecordedPasses`` has a GPU do again what it was asked for a block like it.
"""

from resnet_bk.frugal.activations import HostActivations as HostActivations
from resnet_bk.frugal.by_block import ModelInParts as ModelInParts
from resnet_bk.frugal.by_block import Passes as Passes
from resnet_bk.frugal.by_block import backward_by_block as backward_by_block
from resnet_bk.frugal.checkpointing import CheckpointHandle as CheckpointHandle
from resnet_bk.frugal.checkpointing import checkpoint_blocks as checkpoint_blocks
from resnet_bk.frugal.micro_batches import MicroBatches as MicroBatches
from resnet_bk.frugal.micro_batches import split_rows as split_rows
from resnet_bk.frugal.optimizer import OffloadedAdamW as OffloadedAdamW
from resnet_bk.frugal.precision import half_weights as half_weights
from resnet_bk.frugal.recorded import RecordedPasses as RecordedPasses
from resnet_bk.frugal.streaming import StreamedBlocks as StreamedBlocks
from resnet_bk.frugal.streaming import stream_blocks as stream_blocks
from resnet_bk.frugal.waiting import WaitingTensors as WaitingTensors

__all__ = [
    "CheckpointHandle",
    "HostActivations",
    "MicroBatches",
    "ModelInParts",
    "OffloadedAdamW",
    "Passes",
    "RecordedPasses",
    "StreamedBlocks",
    "WaitingTensors",
    "backward_by_block",
    "checkpoint_blocks",
    "half_weights",
    "split_rows",
    "stream_blocks",
]
