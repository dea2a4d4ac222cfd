"""Which text is held out: whole documents where there are many, the tail of the text where there are few."""

import hashlib
from dataclasses import dataclass

from resnet_bk.errors import UserError
from resnet_bk.training.data.corpus import Corpus, Document

FEWEST_DOCUMENTS_TO_SPLIT_BETWEEN = 20


@dataclass(frozen=True, kw_only=True)
class TextSplit:
    """The two sides, which share no text, and how they were parted."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    method: str


def split_corpus(corpus: Corpus, validation_fraction: float) -> TextSplit:
    """Parts a corpus, the same way every time.

    With 20 documents or more, those whose content hashes lowest are held out until they make up the fraction, so
    that neither the order nor a few new documents reshuffle the rest, and equal documents stay on one side. With
    fewer, or where one document would be most of the text, the contiguous tail is held out.

    Raises:
        UserError: there is too little text for two sides.
    """
    total = sum(len(document.text) for document in corpus.documents)
    if len(corpus.documents) >= FEWEST_DOCUMENTS_TO_SPLIT_BETWEEN:
        split = _by_document(corpus, validation_fraction * total)
        held_out = sum(len(document.text) for document in split.validation)
        if split.train and held_out <= 2 * validation_fraction * total:
            return split
    return _by_tail(corpus, total - max(1, round(validation_fraction * total)))


def _by_document(corpus: Corpus, wanted: float) -> TextSplit:
    digests = [hashlib.sha256(document.text.encode()).digest() for document in corpus.documents]
    size_of = dict.fromkeys(digests, 0)
    for digest, document in zip(digests, corpus.documents, strict=True):
        size_of[digest] += len(document.text)
    held_out, size = set(), 0
    for digest in sorted(size_of):
        if size >= wanted:
            break
        held_out.add(digest)
        size += size_of[digest]
    sides: tuple[list[Document], list[Document]] = ([], [])
    for digest, document in zip(digests, corpus.documents, strict=True):
        sides[digest in held_out].append(document)
    return TextSplit(train=tuple(sides[0]), validation=tuple(sides[1]), method="by document, lowest content hashes")


def _by_tail(corpus: Corpus, cut: int) -> TextSplit:
    train, validation, position = [], [], 0
    for document in corpus.documents:
        local = min(max(cut - position, 0), len(document.text))
        if head := document.text[:local]:
            train.append(Document(name=document.name, text=head))
        if tail := document.text[local:]:
            validation.append(Document(name=document.name, text=tail))
        position += len(document.text)
    if not train or not validation:
        raise UserError(f"{corpus.spec} has too little text to hold some of it out; give more text")
    return TextSplit(train=tuple(train), validation=tuple(validation), method="contiguous tail")
