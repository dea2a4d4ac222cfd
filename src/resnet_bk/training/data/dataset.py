"""Tokens on disk, memory-mapped, made once for a text, a tokenizer and a split."""

import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnet_bk.errors import UserError
from resnet_bk.files import new_directory, write_json
from resnet_bk.training.config import DataConfig
from resnet_bk.training.data.corpus import Corpus, Document, load_corpus
from resnet_bk.training.data.split import split_corpus
from resnet_bk.training.data.tokenizer import TextTokenizer, tokenizer_file, train_tokenizer

FORMAT_VERSION = 2
DOCUMENTS_AT_ONCE = 256
Tokens = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """One side's tokens, 1-D and read-only, and the size of the text they come from."""

    name: str
    tokens: Tokens
    num_bytes: int
    num_documents: int

    def unigram_entropy(self) -> float:
        """:func:`unigram_entropy` of all tokens here."""
        return unigram_entropy(self.tokens)

    def share_of(self, token_id: int | None) -> float:
        """Which share of the tokens here are this one; 0 for None."""
        return 0.0 if token_id is None else float(np.mean(self.tokens == token_id))


def unigram_entropy(tokens: NDArray[np.integer[Any]]) -> float:
    """Entropy of how often each token occurs, in nats per token: the best that a model without context could reach."""
    counts = np.bincount(tokens)
    shares = counts[counts > 0] / len(tokens)
    return float(-(shares * np.log(shares)).sum())


@dataclass(frozen=True, kw_only=True)
class TokenDataset:
    """Both sides, their tokenizer, and the record of how they came about."""

    train: TokenSplit
    validation: TokenSplit
    tokenizer: TextTokenizer
    record: dict[str, Any]


def prepare_dataset(
    config: DataConfig, *, corpus: Corpus | None = None, on_progress: Callable[[str], None] = lambda _: None
) -> TokenDataset:
    """Reads, splits, tokenizes; or finds what an earlier call made of the same text.

    ``corpus`` is the configuration's text, where that has been read already.

    The cache is $RESNET_BK_CACHE, else $XDG_CACHE_HOME/resnet-bk, else ~/.cache/resnet-bk.

    Raises:
        UserError: the text or the tokenizer cannot be had, or there is too little text.
    """
    corpus = load_corpus(config.data) if corpus is None else corpus
    entry = cache_directory() / _cache_key(config, corpus)
    if entry.exists():
        try:
            return _load(entry, config, corpus)
        except _DamagedCacheError as damage:
            on_progress(f"the token cache is damaged ({damage}); making it again")
            _discard(entry)
    _build(entry, config, corpus, on_progress)
    return _load(entry, config, corpus)


def tokenize_all(text: str | Corpus, tokenizer: TextTokenizer) -> TokenSplit:
    """The whole of a text, named or read, with a given tokenizer.

    Raises:
        UserError: the text cannot be had, or has fewer than two tokens.
    """
    corpus = load_corpus(text) if isinstance(text, str) else text
    tokens = np.concatenate([np.asarray(ids, dtype=np.uint32) for ids in _encode(corpus.documents, tokenizer)])
    _check_enough(corpus.spec, tokens.size)
    return TokenSplit(
        name="all", tokens=tokens, num_bytes=_num_bytes(corpus.documents), num_documents=len(corpus.documents)
    )


def cache_directory() -> Path:
    """Where token caches live."""
    if chosen := os.environ.get("RESNET_BK_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "resnet-bk"


class _DamagedCacheError(Exception):
    pass


def _cache_key(config: DataConfig, corpus: Corpus) -> str:
    parts = [FORMAT_VERSION, corpus.fingerprint, config.tokenizer, config.validation_fraction]
    if (path := tokenizer_file(config.tokenizer)).is_file():
        parts.append(hashlib.sha256(path.read_bytes()).hexdigest())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _build(entry: Path, config: DataConfig, corpus: Corpus, on_progress: Callable[[str], None]) -> None:
    split = split_corpus(corpus, config.validation_fraction)
    on_progress(f"tokenizing {corpus.description} with {config.tokenizer}")
    tokenizer = train_tokenizer(config.tokenizer, (document.text for document in split.train))
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    try:
        with new_directory(entry) as folder:
            sides = {
                name: _write_side(folder / f"{name}.bin", documents, tokenizer, dtype, config.data)
                for name, documents in (("train", split.train), ("validation", split.validation))
            }
            tokenizer.save(folder / "tokenizer.json")
            record = _record(config, corpus, tokenizer, split.method, sides)
            meta = {"dtype": dtype.name, "sides": sides, "record": record}
            write_json(folder / "meta.json", {"meta": meta, "sha256": _checksum(meta)})
    except UserError:
        # Another process may have made the same entry meanwhile: a folder cannot be renamed over a full one.
        if not entry.exists():
            raise


def _record(
    config: DataConfig, corpus: Corpus, tokenizer: TextTokenizer, method: str, sides: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    return {
        "data": config.data,
        "description": corpus.description,
        "corpus_sha256": corpus.fingerprint,
        "python": platform.python_version() if config.data == "stdlib" else None,
        "tokenizer": config.tokenizer,
        "tokenizer_sha256": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "split": method,
        "validation_fraction": config.validation_fraction,
        "sides": {name: {key: side[key] for key in ("documents", "bytes", "tokens")} for name, side in sides.items()},
    }


def _write_side(
    path: Path, documents: tuple[Document, ...], tokenizer: TextTokenizer, dtype: np.dtype[Any], spec: str
) -> dict[str, Any]:
    digest, count = hashlib.sha256(), 0
    with path.open("wb") as file:
        for ids in _encode(documents, tokenizer):
            content = np.asarray(ids, dtype=dtype).tobytes()
            digest.update(content)
            file.write(content)
            count += len(ids)
    part = "part to train on" if path.stem == "train" else "held-out part"
    _check_enough(f"the {part} of {spec}", count)
    return {"documents": len(documents), "bytes": _num_bytes(documents), "tokens": count, "sha256": digest.hexdigest()}


def _encode(documents: tuple[Document, ...], tokenizer: TextTokenizer) -> Any:
    """Token ids of each document, with the end-of-text token after each but the last."""
    ending = [] if tokenizer.end_of_text_id is None else [tokenizer.end_of_text_id]
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        batch = documents[start : start + DOCUMENTS_AT_ONCE]
        for offset, ids in enumerate(tokenizer.encode_many([document.text for document in batch])):
            yield ids if start + offset + 1 == len(documents) else ids + ending


def _num_bytes(documents: tuple[Document, ...]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def _check_enough(text: str, num_tokens: int) -> None:
    if num_tokens < 2:
        length = "1 token" if num_tokens == 1 else "no token"
        raise UserError(f"{text} has {length}, and a prediction takes two; give more text")


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()


def _load(entry: Path, config: DataConfig, corpus: Corpus) -> TokenDataset:
    try:
        content = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        meta = content["meta"]
        if _checksum(meta) != content["sha256"]:
            raise _DamagedCacheError("meta.json has changed")
        tokenizer = TextTokenizer.load(entry / "tokenizer.json", config.tokenizer)
        record = meta["record"]
        if tokenizer.fingerprint != record["tokenizer_sha256"]:
            raise _DamagedCacheError("tokenizer.json has changed")
        dtype = np.dtype(meta["dtype"])
        train, validation = (_load_side(entry, name, meta["sides"][name], dtype) for name in ("train", "validation"))
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise _DamagedCacheError(str(error)) from None
    # Equal texts share an entry, whatever they were called.
    record = {**record, "data": config.data, "description": corpus.description}
    return TokenDataset(train=train, validation=validation, tokenizer=tokenizer, record=record)


def _load_side(entry: Path, name: str, side: dict[str, Any], dtype: np.dtype[Any]) -> TokenSplit:
    path = entry / f"{name}.bin"
    if path.stat().st_size != side["tokens"] * dtype.itemsize:
        raise _DamagedCacheError(f"{path.name} has the wrong size")
    tokens = np.memmap(path, dtype=dtype, mode="r")
    if hashlib.sha256(tokens.data).hexdigest() != side["sha256"]:
        raise _DamagedCacheError(f"{path.name} has changed")
    return TokenSplit(name=name, tokens=tokens, num_bytes=side["bytes"], num_documents=side["documents"])


def _discard(entry: Path) -> None:
    for file in entry.iterdir():
        file.unlink()
    entry.rmdir()
