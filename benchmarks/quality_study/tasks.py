"""What models learn: text, and synthetic memories whose answers are known."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnet_bk.models import ResNetBKForCausalLM
from resnet_bk.ops.loss import IGNORE_INDEX
from resnet_bk.training.config import DataConfig, Precision
from resnet_bk.training.data import prepare_dataset
from resnet_bk.training.micro_step import autocast

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Text:
    """Token ids: what is trained on, what chooses, and what claims are made by. So many tokens are a ``phrase``."""

    vocab_size: int
    phrase: int
    train: NDArray[np.int64]
    choosing: NDArray[np.int64]
    test: NDArray[np.int64]


@lru_cache(maxsize=2)
def characters(path: Path) -> Text:
    """A file by characters; as in nanoGPT the first 90% are trained on. Half of the rest chooses, half tests."""
    alphabet, numbers = np.unique(np.array(list(path.read_text(encoding="utf-8"))), return_inverse=True)
    tokens = numbers.astype(np.int64)
    cut = len(tokens) * 9 // 10
    half = cut + (len(tokens) - cut) // 2
    parts = {"train": tokens[:cut], "choosing": tokens[cut:half], "test": tokens[half:]}
    return Text(vocab_size=len(alphabet), phrase=5, **parts)


@lru_cache(maxsize=1)
def embedded() -> Text:
    """The corpus that is always there, Python's own source, in 2,048 byte pairs; held out by whole files."""
    dataset = prepare_dataset(DataConfig(data="stdlib", tokenizer="bpe:2048"))
    held_out = dataset.validation.tokens.astype(np.int64)
    half = len(held_out) // 2
    return Text(
        vocab_size=dataset.tokenizer.vocab_size,
        phrase=3,
        train=dataset.train.tokens.astype(np.int64),
        choosing=held_out[:half],
        test=held_out[half:],
    )


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Pairs of a key and a value, then the keys again in another order: after each its value is to be said.

    ``filler`` random tokens of an alphabet of their own lie between pairs and questions. Keys of a row differ.
    """

    pairs: int
    filler: int = 0
    keys: int = 256
    values: int = 256
    fillers: int = 64

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values + self.fillers

    def batch(self, rows: int, generator: np.random.Generator) -> Batch:
        keys = np.argsort(generator.random((rows, self.keys)), axis=1)[:, : self.pairs]
        values = self.keys + generator.integers(self.values, size=(rows, self.pairs))
        order = np.argsort(generator.random((rows, self.pairs)), axis=1)
        filler = self.keys + self.values + generator.integers(self.fillers, size=(rows, self.filler))
        stored = np.stack([keys, values], axis=2).reshape(rows, -1)
        asked = np.stack([np.take_along_axis(part, order, 1) for part in (keys, values)], axis=2).reshape(rows, -1)
        tokens = np.concatenate([stored, filler, asked], axis=1)
        targets = np.full_like(tokens, IGNORE_INDEX)
        first = stored.shape[1] + self.filler
        targets[:, first::2] = tokens[:, first + 1 :: 2]
        return torch.from_numpy(tokens), torch.from_numpy(targets)


@dataclass(frozen=True, kw_only=True)
class Copying:
    """``length`` random symbols, a mark, and the same again."""

    length: int
    symbols: int = 64

    @property
    def vocab_size(self) -> int:
        return self.symbols + 1

    def batch(self, rows: int, generator: np.random.Generator) -> Batch:
        word = generator.integers(self.symbols, size=(rows, self.length))
        mark = np.full((rows, 1), self.symbols)
        tokens = np.concatenate([word, mark, word], axis=1)
        targets = np.full_like(tokens, IGNORE_INDEX)
        targets[:, self.length : -1] = tokens[:, self.length + 1 :]
        return torch.from_numpy(tokens), torch.from_numpy(targets)


@dataclass(frozen=True, kw_only=True)
class Needle:
    """A mark and a value somewhere in the first half of ``length`` tokens of filler; at the end the mark again."""

    length: int
    values: int = 64
    fillers: int = 64

    @property
    def vocab_size(self) -> int:
        return self.values + self.fillers + 1

    def batch(self, rows: int, generator: np.random.Generator) -> Batch:
        tokens = self.values + generator.integers(self.fillers, size=(rows, self.length))
        place = generator.integers(max(1, self.length // 2 - 2), size=rows)
        value = generator.integers(self.values, size=rows)
        mark, row = self.values + self.fillers, np.arange(rows)
        tokens[row, place], tokens[row, place + 1], tokens[:, -1] = mark, value, mark
        targets = np.full_like(tokens, IGNORE_INDEX)
        targets[:, -1] = value
        return torch.from_numpy(tokens), torch.from_numpy(targets)


Synthetic = Recall | Copying | Needle


@torch.no_grad()
def accuracy(
    model: ResNetBKForCausalLM, task: Synthetic, *, rows: int, batches: int, precision: Precision, seed: int = 10**6
) -> float:
    """Share of answers whose most probable token is right, over fresh rows."""
    model.eval()
    generator = np.random.default_rng(seed)
    right = count = 0
    for _ in range(batches):
        tokens, targets = task.batch(rows, generator)
        with autocast(model.device, precision):
            hidden = model.model(tokens.to(model.device), use_cache=False).last_hidden_state
            asked = (targets != IGNORE_INDEX).to(model.device)
            said = model.lm_head(hidden[asked]).argmax(-1).cpu()
        answers = targets[targets != IGNORE_INDEX]
        right += int((said == answers).sum())
        count += len(answers)
    return right / count
