"""Tokenizers, all of them ``tokenizers.Tokenizer`` underneath and saved as tokenizer.json."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream

from resnet_bk.errors import UserError
from resnet_bk.files import from_home, write_text
from resnet_bk.hub import HubError, cached_file, hub_file

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unk|>"
NUM_BYTES = 256
MINIMUM_SIZES = {"word": 3, "bpe": NUM_BYTES + 1}
# Training reserves memory for the whole size asked for, and the process dies where there is not enough.
LARGEST_VOCABULARY = 1_000_000
CHOICES = "byte, char, word:N, bpe:N, the path of a tokenizer.json, or a Hub name"


class TextTokenizer:
    """Text to token ids and back."""

    def __init__(self, tokenizer: Tokenizer, spec: str) -> None:
        # Text that happens to contain a special token's name is text.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.spec = spec

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def end_of_text_id(self) -> int | None:
        """The token between documents; None if a tokenizer from elsewhere has none."""
        found: int | None = self._tokenizer.token_to_id(END_OF_TEXT)
        return found

    @cached_property
    def unknown_id(self) -> int | None:
        """The token for what the training text did not have; None where every text can be written."""
        # A tokenizer from elsewhere has its own name for it, or (Unigram) only a number.
        model = json.loads(self._tokenizer.to_str())["model"]
        name = model.get("unk_token")
        found: int | None = self._tokenizer.token_to_id(name) if name else model.get("unk_id")
        return found

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's JSON."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: list[str]) -> Iterator[list[int]]:
        """Token ids of each text, on all cores."""
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield list(encoding.ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens leave none."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder that takes one id at a time."""
        return StreamDecoder(self._tokenizer)

    def save(self, path: Path) -> None:
        """Writes tokenizer.json, atomically."""
        write_text(path, self._tokenizer.to_str(pretty=True))

    @classmethod
    def load(cls, path: Path, spec: str) -> "TextTokenizer":
        """Reads a tokenizer.json.

        Raises:
            UserError: there is none, or it is damaged.
        """
        try:
            return cls(Tokenizer.from_str(path.read_text(encoding="utf-8")), spec)
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; check the path of the tokenizer") from None
        except Exception as error:  # tokenizers raises plain Exception
            raise UserError(
                f"{path} is not a readable tokenizer.json ({error}); give byte, char, bpe:SIZE or such a file, or "
                "restore it from a copy"
            ) from None


class StreamDecoder:
    """Ids in, pieces of text out, which together are the whole text; half a character waits for its rest."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def step(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty if it completes none."""
        return self._stream.step(self._tokenizer, token_id) or ""


def train_tokenizer(spec: str, texts: Iterable[str]) -> TextTokenizer:
    """The tokenizer that ``spec`` names, trained on ``texts`` where it needs training.

    ``byte`` and ``bpe:N`` can write every text and give it back exactly. ``char`` does for the characters of
    ``texts``. ``word:N`` keeps the N most frequent words and punctuation marks; its decoding joins them with spaces.
    What ``char`` and ``word:N`` have not seen becomes the unknown token.

    Raises:
        UserError: the name or size does not fit, or a tokenizer from elsewhere could not be had.
    """
    kind, _, size = spec.partition(":")
    if kind == "byte" and not size:
        return TextTokenizer(_byte_tokenizer(), spec)
    if kind == "char" and not size:
        return TextTokenizer(_char_tokenizer(texts), spec)
    if kind == "word":
        return TextTokenizer(_word_tokenizer(texts, _vocabulary_size(spec, size)), spec)
    if kind == "bpe":
        return TextTokenizer(_bpe_tokenizer(texts, _vocabulary_size(spec, size)), spec)
    return _existing_tokenizer(spec)


def check_tokenizer(spec: str) -> None:
    """Raises a UserError if ``spec`` names no tokenizer, so that a slip is found before any text is read."""
    kind, _, size = spec.partition(":")
    if kind in MINIMUM_SIZES:
        _vocabulary_size(spec, size)
    elif spec not in ("byte", "char"):
        _existing_tokenizer(spec)


def tokenizer_file(spec: str) -> Path:
    """The file that ``spec`` names if it is a path: the tokenizer.json itself, or the folder that holds it."""
    path = from_home(spec)
    return path / "tokenizer.json" if path.is_dir() else path


def _vocabulary_size(spec: str, size: str) -> int:
    minimum = MINIMUM_SIZES[spec.partition(":")[0]]
    if not size.isdecimal() or int(size) < minimum:
        raise UserError(f"tokenizer {spec} needs a size of at least {minimum}, as in {spec.partition(':')[0]}:4096")
    if int(size) > LARGEST_VOCABULARY:
        raise UserError(f"tokenizer {spec} is larger than {LARGEST_VOCABULARY:,} tokens; choose a smaller size")
    return int(size)


def _byte_tokenizer() -> Tokenizer:
    symbols = [END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    return _byte_level(tokenizer)


def _bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = _byte_level(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _byte_level(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _char_tokenizer(texts: Iterable[str]) -> Tokenizer:
    characters = sorted(set().union(*texts))
    vocabulary = {symbol: index for index, symbol in enumerate([END_OF_TEXT, UNKNOWN, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_TEXT, UNKNOWN])
    return tokenizer


def _word_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT, UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _existing_tokenizer(spec: str) -> TextTokenizer:
    path = tokenizer_file(spec)
    if path.suffix == ".json" or path.is_file():
        return TextTokenizer.load(path, spec)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec):
        raise UserError(f"there is no tokenizer {spec}{_did_you_mean(spec)}; choose {CHOICES}")
    return TextTokenizer.load(_hub_file(spec), spec)


def _did_you_mean(spec: str) -> str:
    """The tokenizer of ours that ``spec`` is probably a slip of, as a question; empty if it is like none."""
    parts = re.fullmatch(r"([a-z]+)[\W_]?(\d*)", spec.lower())
    close = parts and difflib.get_close_matches(parts[1], ["byte", "char", *MINIMUM_SIZES], n=1, cutoff=0.75)
    if not parts or not close:
        return ""
    meant = f"{close[0]}:{parts[2] or 'N'}" if close[0] in MINIMUM_SIZES else close[0]
    return f" (did you mean {meant}?)"


def _hub_file(spec: str) -> Path:
    name = "tokenizer.json"
    if cached_file(spec, name) is None and (question := _did_you_mean(spec)):
        raise UserError(f"there is no tokenizer {spec}{question}; choose {CHOICES}")
    try:
        return hub_file(spec, name)
    except HubError as error:
        raise UserError(f"{error}, or choose {CHOICES}") from None
