"""What is compared, on what, and how much: plain data, so that a process of its own can build it all again."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from resnet_bk.bench.contestants import BASELINE, OURS, Contender, contenders
from resnet_bk.bench.profiles import Profile
from resnet_bk.bench.subject import Subject
from resnet_bk.errors import UserError
from resnet_bk.memory.parameters import count_parameters
from resnet_bk.memory.plan import Budget, plan_strategy
from resnet_bk.models import ResNetBKConfig
from resnet_bk.training.config import DataConfig, TrainingConfig
from resnet_bk.training.data import TokenDataset, prepare_dataset, training_batch
from resnet_bk.training.strategy import strategy_of, training_shape

# Of cells that are not timed on a GPU. Each has two threads that launch kernels, and some that compile them.
MOST_AT_ONCE, PROCESSORS_OF_A_CELL = 4, 4
CONTEXT_BYTES = 10**9  # about what a process takes of a GPU before its first tensor


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A benchmark. ``overrides`` are fields of the model that differ from the preset's; ``withheld`` are contestants
    that a gate keeps out, with the reason; ``training.device`` is a device and not ``auto``. ``corpus_sha256`` is the
    fingerprint of the text that all of it is measured on."""

    preset: str
    overrides: Mapping[str, Any]
    baseline: str | None
    vocab_size: int
    data: DataConfig
    training: TrainingConfig
    profile: Profile
    corpus_sha256: str | None = None
    withheld: Mapping[str, str] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: the models it builds by itself."""
        return {found.name: getattr(self, found.name) for found in fields(self)}

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return torch.device(self.training.device)

    @cached_property
    def all_contenders(self) -> dict[str, Contender]:
        """Those that no gate has seen yet included."""
        return contenders(self.preset, dict(self.overrides), self.baseline, self.vocab_size)

    @property
    def contenders(self) -> dict[str, Contender]:
        """Those that are measured, ours first."""
        return {key: contender for key, contender in self.all_contenders.items() if key not in self.withheld}

    @property
    def configs(self) -> dict[str, ResNetBKConfig]:
        """Of those that are ours."""
        return {key: found.config for key, found in self.contenders.items() if found.config is not None}

    @property
    def compared(self) -> tuple[str, str] | None:
        """Ours and the baseline; None if one of them is withheld."""
        return (OURS, BASELINE) if {OURS, BASELINE} <= set(self.contenders) else None

    @property
    def dataset(self) -> TokenDataset:
        """The text, from the cache.

        Raises:
            UserError: it was changed since the benchmark began.
        """
        found = _dataset(self.data)
        if self.corpus_sha256 not in (None, found.record["corpus_sha256"]):
            raise UserError(f"the text of {self.data.data} was changed while it was measured on; restore it")
        return found

    @cached_property
    def at_once(self) -> int:
        """How many cells that are not timed are measured at once.

        A GPU, which small models leave idle, takes as many as there are processors and memory for; of a CPU each cell
        has all processors.
        """
        if self.device.type != "cuda" or len(self.configs) < len(self.contenders):
            return 1
        training, room = self.training, torch.cuda.get_device_properties(self.device).total_memory
        strategy, shape = strategy_of(training), training_shape(training)
        most = max(
            plan_strategy(strategy, config, shape, count_parameters(config), Budget()).gpu_bytes
            for config in self.configs.values()
        )
        processors, places = len(os.sched_getaffinity(0)), room // (2 * (most + CONTEXT_BYTES))
        return max(1, min(MOST_AT_ONCE, processors // PROCESSORS_OF_A_CELL, places))

    def batch(self) -> tuple[Tensor, Tensor]:
        """The first batch of the text, ``(B, N)`` ids and targets."""
        training = self.training
        input_ids, targets = training_batch(
            self.dataset.train.tokens,
            batch_size=training.batch_size,
            sequence_length=training.sequence_length,
            seed=training.seed,
            step=0,
        )
        return input_ids.to(self.device), targets.to(self.device)

    def subject(self, key: str) -> Subject:
        """A contestant with that batch."""
        return Subject.of(self.contenders[key].with_seed(self.training.seed), self.training, self.batch())

    def without(self, reasons: Mapping[str, str]) -> "Setup":
        """The same with these contestants kept out."""
        return replace(self, withheld={**self.withheld, **reasons})


@lru_cache(maxsize=1)
def _dataset(config: DataConfig) -> TokenDataset:
    return prepare_dataset(config)
