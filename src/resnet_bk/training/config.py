"""What a training run is made of. Light to import: the command line reads its defaults from here."""

import math
import os
from dataclasses import dataclass, fields
from typing import Literal, get_args

from resnet_bk.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]
Checkpointing = Literal["none", "selective", "full", "offload"]
MomentsType = Literal["fp32", "bf16"]
SHORTEST_DEFAULT_DECAY = 1000
LARGEST_INTEGER = 2**63 - 1  # torch's and numpy's
LARGEST_RATE = 1000.0  # more is no training, and its products leave float32


def most_threads() -> int:
    """More threads than this help nobody, and creating them can fail in torch's own way: by a crash."""
    return max(256, 4 * (os.cpu_count() or 1))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What text, cut into which tokens, and how much of it is held out."""

    data: str = "stdlib"
    tokenizer: str = "bpe:4096"
    validation_fraction: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction is {self.validation_fraction}; give a share between 0 and 1")
        if not self.data or not self.tokenizer:
            raise UserError("data and tokenizer must not be empty; leave them out for the defaults")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, on how much at once, how fast, in which precision, and what is written when.

    ``decay_steps`` None means the larger of ``steps`` and 1,000: a short run is then a prefix of a longer one, and
    extending it changes nothing that has happened. ``num_threads`` is recorded, since sums depend on it bitwise.

    ``max_grad_norm`` None does not clip. ``micro_batch_size`` rows of a batch go through the model at once, None for
    all. ``checkpointing`` computes a block's activations again in backward: all of them, those that are ``selective``ly
    cheap, or all with the blocks' inputs ``offload``ed to the host. ``offload_optimizer`` has masters, moments and
    updates on the host; then ``moments`` may be bf16, matrices may be ``half_weights`` on the device, and with
    ``stream_weights`` the blocks' wait on the host too. ``cuda_graphs`` record what a step block by block asks of a GPU
    for one block and replay it for those like it. ``loss_chunk_tokens`` tokens have logits at once, None for the
    loss's own rule.
    """

    steps: int = 1000
    batch_size: int = 20
    sequence_length: int = 128
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    min_learning_rate_ratio: float = 0.1
    warmup_steps: int = 50
    decay_steps: int | None = None
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float | None = 1.0
    precision: Precision = "fp32"
    micro_batch_size: int | None = None
    checkpointing: Checkpointing = "none"
    offload_optimizer: bool = False
    moments: MomentsType = "fp32"
    half_weights: bool = False
    stream_weights: bool = False
    cuda_graphs: bool = False
    loss_chunk_tokens: int | None = None
    seed: int = 0
    log_every: int = 20
    eval_every: int = 200
    eval_tokens: int = 50_000
    save_every: int = 200
    keep_checkpoints: int = 2
    device: str = "auto"
    num_threads: int | None = None

    def __post_init__(self) -> None:
        at_least_one = ("steps", "batch_size", "sequence_length", "gradient_accumulation_steps", "log_every")
        for name in (*at_least_one, "eval_every", "eval_tokens", "save_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a number of at least 1")
        for name in ("decay_steps", "num_threads", "micro_batch_size", "loss_chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; give a number of at least 1, or leave it out")
        if self.num_threads is not None and self.num_threads > most_threads():
            raise UserError(f"num_threads is {self.num_threads}; give at most {most_threads()}, or leave it out")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate is {self.learning_rate}; give a number above 0")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UserError(f"max_grad_norm is {self.max_grad_norm}; give a number above 0, or none for no clipping")
        for name in ("warmup_steps", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} is {getattr(self, name)}; give 0 or more")
        for name in ("min_learning_rate_ratio", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a number from 0 to 1")
        self._check_largest()
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise UserError(f"precision is {self.precision!r}; choose fp32, bf16 or fp16")
        self._check_strategy()

    def _check_strategy(self) -> None:
        for name, choices in (("checkpointing", Checkpointing), ("moments", MomentsType)):
            if getattr(self, name) not in get_args(choices):
                raise UserError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(get_args(choices))}")
        needs_offload = (self.moments != "fp32", self.half_weights, self.stream_weights)
        for name, given in zip(("moments bf16", "half_weights", "stream_weights"), needs_offload, strict=True):
            if given and not self.offload_optimizer:
                raise UserError(f"{name} needs the masters on the host; add --offload-optimizer True, or leave it out")
        if self.half_weights and self.precision == "fp32":
            raise UserError(
                "half_weights are multiplied in half precision; choose --precision bf16 or fp16, or leave them out"
            )
        if self.cuda_graphs and not self.goes_by_block:
            raise UserError(
                "cuda_graphs are of steps that go block by block; add --offload-optimizer True --checkpointing "
                "offload, or leave them out"
            )
        if self.stream_weights and self.checkpointing == "none":
            raise UserError("stream_weights computes blocks again in backward; add --checkpointing full")

    def _check_largest(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{field.name} is {value}; give a finite number")
            if isinstance(value, int) and value > LARGEST_INTEGER:
                raise UserError(f"{field.name} is {value}; give a number up to {LARGEST_INTEGER}")
        for name in ("learning_rate", "weight_decay"):
            if getattr(self, name) > LARGEST_RATE:
                raise UserError(f"{name} is {getattr(self, name)}; give a number up to {LARGEST_RATE:g}")

    @property
    def goes_by_block(self) -> bool:
        """Whether all micro-batches go through a block before the next one: where gradients and blocks' inputs leave
        the device anyway."""
        return self.offload_optimizer and self.checkpointing == "offload"

    @property
    def tokens_per_step(self) -> int:
        """Targets that one optimizer step learns from."""
        return self.batch_size * self.gradient_accumulation_steps * self.sequence_length
