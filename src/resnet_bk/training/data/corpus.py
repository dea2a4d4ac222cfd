"""Where text comes from: the Python standard library, a file, a folder, a glob, or a Hugging Face data set."""

import glob
import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from resnet_bk.errors import UserError
from resnet_bk.files import from_home

# Left out so that a distribution's Python, which ships some of these apart, gives nearly the text of a self-built one.
STDLIB_LEFT_OUT = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo"),
    *("lib2to3", "ensurepip", "tkinter", "distutils", "__pycache__"),
}


class MissingTextError(UserError):
    """Where text was looked for, nothing is."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text, and a name for messages and records."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, how they were asked for, and a sentence that describes them."""

    spec: str
    documents: tuple[Document, ...]
    description: str

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the texts and their boundaries."""
        digest = hashlib.sha256()
        for document in self.documents:
            content = document.text.encode()
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
        return digest.hexdigest()


def load_corpus(spec: str) -> Corpus:
    """Reads the text that ``spec`` names.

    Args:
        spec: ``stdlib`` (the source text of the running Python's standard library), a text file, a folder (all text
            files in it, recursively), a glob pattern, or ``hf:ORG/NAME[:CONFIG]``.

    Raises:
        MissingTextError: there is nothing of that name.
        UserError: there is no text to be had from it; the message says why.
    """
    if not spec:
        raise UserError("data is empty; give stdlib, a text file, a folder, a glob, or hf:ORG/NAME")
    if spec == "stdlib":
        return _stdlib()
    if spec.startswith("hf:"):
        return _hugging_face(spec)
    path = from_home(spec)
    try:
        if path.is_dir():
            return _folder(spec, path)
        if path.exists():
            return Corpus(spec, (_file(path),), f"the text file {path.name}")
        if glob.has_magic(spec):
            return _glob(spec)
    except PermissionError:
        raise UserError(f"{spec} may not be read; change its permissions or choose another file") from None
    except OSError as error:
        raise UserError(f"{spec} cannot be read ({error.strerror}); choose another file") from None
    raise MissingTextError(f"{spec} does not exist; give stdlib, a text file, a folder, a glob, or hf:ORG/NAME")


def _stdlib() -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py")) if not STDLIB_LEFT_OUT & set(path.relative_to(root).parts)]
    documents, _ = _text_files(paths, root)
    return _corpus("stdlib", documents, "the source text of Python's standard library")


def _folder(spec: str, root: Path) -> Corpus:
    paths = [path for path in sorted(root.rglob("*")) if path.is_file() and not _hidden(path.relative_to(root))]
    documents, skipped = _text_files(paths, root)
    if not documents:
        raise UserError(f"the folder {spec} holds no text (UTF-8) file; choose another or convert the files")
    return _corpus(spec, documents, f"the folder {root.name}", skipped)


def _glob(pattern: str) -> Corpus:
    expanded = str(from_home(pattern))
    matches = glob.glob(expanded, recursive=True)  # noqa: PTH207  # Path.glob takes no absolute pattern
    paths = [Path(name) for name in sorted(matches) if Path(name).is_file()]
    if not paths:
        mend = "check the pattern (quote it, so that the shell leaves it alone)"
        raise MissingTextError(f"no file matches {pattern}; {mend}")
    documents, skipped = _text_files(paths, Path(paths[0].anchor))
    if not documents:
        raise UserError(f"none of the {len(paths)} files that match {pattern} is UTF-8 text; convert them")
    return _corpus(pattern, documents, f"the files {pattern}", skipped)


def _hugging_face(spec: str) -> Corpus:
    name, _, configuration = spec.removeprefix("hf:").partition(":")
    if not name:
        raise UserError(f"{spec} names no data set; write hf:ORG/NAME or hf:ORG/NAME:CONFIG")
    import datasets

    try:
        rows: Any = datasets.load_dataset(name, configuration or None, split="train")
    except Exception as error:  # datasets raises many kinds, from the network, the hub and the parsers
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"the data set {spec} could not be loaded ({reason}); check its name and the network") from None
    column = _text_column(spec, rows.features)
    # A row without text has None there.
    texts = tuple(
        Document(name=f"{spec}[{row}]", text=text) for row, text in enumerate(rows[column]) if text and text.strip()
    )
    if not texts:
        raise UserError(f"column {column} of {spec} holds no text; choose another data set")
    return Corpus(spec, texts, f"the data set {name}, column {column}, {len(texts):,} documents")


def _text_column(spec: str, features: Any) -> str:
    strings: list[str] = [
        name for name, feature in features.items() if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    found = ", ".join(features) or "none"
    raise UserError(
        f"{spec} has no column 'text' and not just one column of strings (columns: {found}); choose another"
    )


def _corpus(spec: str, documents: list[Document], what: str, skipped: int = 0) -> Corpus:
    note = f", {skipped} files that are not text left out" if skipped else ""
    return Corpus(spec, tuple(documents), f"{what}, {len(documents):,} files{note}")


def _text_files(paths: list[Path], root: Path) -> tuple[list[Document], int]:
    """The documents among ``paths`` and how many files were left out because they are empty or not UTF-8 text."""
    documents = []
    for path in paths:
        text = _decode(path.read_bytes())
        if isinstance(text, str) and text.strip():
            documents.append(Document(name=path.relative_to(root).as_posix(), text=text))
    return documents, len(paths) - len(documents)


def _file(path: Path) -> Document:
    content = path.read_bytes()
    if not content.strip():
        raise UserError(f"{path} is empty; give a file with text")
    text = _decode(content)
    if isinstance(text, int):
        raise UserError(f"{path} is not UTF-8 text (byte {text:,} is not); convert it or choose another file")
    return Document(name=path.name, text=text)


def _decode(content: bytes) -> str | int:
    """The text, or the offset of the first byte that cannot be text."""
    if (offset := content.find(b"\0")) >= 0:
        return offset
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
