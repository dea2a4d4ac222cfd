"""A run folder: what was asked for, the tokenizer, the metrics and the checkpoints."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from resnet_bk.environment import describe_environment
from resnet_bk.errors import UserError
from resnet_bk.files import check_writable, from_home, read_json, write_json
from resnet_bk.models import ResNetBKConfig
from resnet_bk.training.checkpoint import checkpoints
from resnet_bk.training.config import DataConfig, TrainingConfig
from resnet_bk.training.data import Corpus, TextTokenizer, TokenDataset, load_corpus, prepare_dataset
from resnet_bk.training.data.corpus import MissingTextError

KIND, VERSION = "resnet-bk run", 1
RECORD = "run.json"
ConfigT = TypeVar("ConfigT", TrainingConfig, DataConfig)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Model, training and data: what makes two runs the same run."""

    model: ResNetBKConfig
    training: TrainingConfig
    data: DataConfig

    @classmethod
    def read(cls, path: Path) -> Self:
        """From a run.json.

        Raises:
            UserError: the file is not one.
        """
        record = read_json(path)
        if not isinstance(record, dict) or record.get("kind") != KIND:
            raise UserError(f"{path} is not a run.json; give the one that a run folder holds")
        if record.get("version") != VERSION:
            raise UserError(f"{path} has version {record.get('version')}, this program reads {VERSION}; update it")
        try:
            _check_sections(record)
            return cls(
                model=ResNetBKConfig.derive(record["model"]),
                training=_convert(record["training"], TrainingConfig),
                data=_convert(record["data"], DataConfig),
            )
        except (TypeError, ValueError, msgspec.ValidationError) as error:
            raise UserError(f"{path} does not describe a run ({error}); restore it from a copy") from None


@dataclass(frozen=True, kw_only=True)
class Run:
    """An existing run folder and what it records."""

    folder: Path
    config: RunConfig
    dataset: dict[str, Any]

    @property
    def checkpoint_folder(self) -> Path:
        """Where the checkpoints are."""
        return self.folder / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line: what each logged step and each evaluation saw."""
        return self.folder / "metrics.jsonl"

    def latest_checkpoint(self) -> Path:
        """The newest checkpoint.

        Raises:
            UserError: there is none.
        """
        if found := checkpoints(self.checkpoint_folder):
            return found[-1]
        raise UserError(f"{self.folder} holds no checkpoint; train again with another --out")

    def tokenizer(self) -> TextTokenizer:
        """The run's tokenizer.

        Raises:
            UserError: it is damaged, or not the one that the model was trained with.
        """
        tokenizer = TextTokenizer.load(self.folder / "tokenizer.json", self.config.data.tokenizer)
        if tokenizer.fingerprint != self.dataset["tokenizer_sha256"]:
            raise UserError(
                f"{self.folder / 'tokenizer.json'} is not the vocabulary this run was trained with; restore it"
            )
        return tokenizer

    def read_text(self, place: str | None = None) -> Corpus:
        """The text at ``place``, or where the run last found its own.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        if place is not None:
            return load_corpus(place)
        data = self.config.data.data
        try:
            return load_corpus(data)
        except MissingTextError:
            seen_from = "" if from_home(data).is_absolute() else f" (seen from {Path.cwd()})"
            raise UserError(
                f"{data}, the text that {self.folder} was trained on, is not there{seen_from}; give --data with the "
                "place where it is now"
            ) from None

    def has_as_text(self, corpus: Corpus) -> bool:
        """Whether the run was trained on ``corpus``: the same text, wherever it is, or what is now in its place."""
        return corpus.fingerprint == self.dataset["corpus_sha256"] or _same_place(corpus.spec, self.config.data.data)

    def prepare_text(self, corpus: Corpus, *, on_progress: Callable[[str], None] = lambda _: None) -> TokenDataset:
        """The run's tokens, of its text, which may be elsewhere by now.

        Raises:
            UserError: it is another text, or gives another vocabulary.
        """
        if corpus.fingerprint != self.dataset["corpus_sha256"]:
            raise UserError(self._other_data("text", corpus.spec))
        config = replace(self.config.data, data=corpus.spec)
        dataset = prepare_dataset(config, corpus=corpus, on_progress=on_progress)
        self.check_same_data(dataset)
        return dataset

    def check_same_data(self, dataset: TokenDataset) -> None:
        """Raises a UserError if the text or the vocabulary is not what the run was trained on."""
        for key, what in (("tokenizer_sha256", "vocabulary"), ("corpus_sha256", "text")):
            if dataset.record[key] != self.dataset[key]:
                raise UserError(self._other_data(what, dataset.record["data"]))

    def _other_data(self, what: str, place: str) -> str:
        mend = "restore it" if _same_place(place, self.config.data.data) else f"give the {what} that was"
        return (
            f"the {what} of {place} is not the one {self.folder} was trained on; {mend}, or start a new run "
            "with another --out"
        )

    def moved(self, dataset: TokenDataset) -> "Run":
        """The same run whose text is now where ``dataset`` has it from, on disk too."""
        data = replace(self.config.data, data=dataset.record["data"])
        place = {key: dataset.record[key] for key in ("data", "description")}
        record = read_json(self.folder / RECORD)
        record = {**record, "data": asdict(data), "dataset": {**record["dataset"], **place}}
        write_json(self.folder / RECORD, record)
        return replace(self, config=replace(self.config, data=data), dataset=record["dataset"])

    def changed(self, **training_fields: Any) -> "Run":
        """The same run with other values in its training's configuration, on disk too."""
        training = replace(self.config.training, **training_fields)
        record = read_json(self.folder / RECORD)
        write_json(self.folder / RECORD, {**record, "training": asdict(training)})
        return replace(self, config=replace(self.config, training=training))


def check_new_run(out: Path) -> None:
    """Raises a UserError if ``out`` cannot become a run folder: it holds something, or cannot be written."""
    check_writable(out)
    if (out / RECORD).exists():
        raise UserError(f"{out} already holds a run; continue it with --resume {out}, or choose another --out")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another --out")


def write_record(folder: Path, config: RunConfig, dataset: TokenDataset, command: list[str]) -> None:
    """Writes run.json and tokenizer.json into a folder that becomes a run's."""
    write_json(
        folder / RECORD,
        {
            "kind": KIND,
            "version": VERSION,
            "model": config.model.own_fields(),
            "training": asdict(config.training),
            "data": asdict(config.data),
            "dataset": dataset.record,
            "environment": describe_environment(),
            "command": command,
        },
    )
    dataset.tokenizer.save(folder / "tokenizer.json")


def open_run(folder: Path) -> Run:
    """An existing run.

    Raises:
        UserError: there is none, or its record is damaged.
    """
    if folder.is_file():
        raise UserError(f"{folder} is not a run folder but a file; give the folder that `train --out` made")
    if folder.is_dir() and folder.parent.name == "checkpoints" and (folder.parent.parent / RECORD).is_file():
        raise UserError(f"{folder} is a checkpoint; give its run, {folder.parent.parent}")
    if not (folder / RECORD).is_file() and (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is a model's folder (it has config.json and no {RECORD}); give the run folder that "
            "`train --out` made"
        )
    if not (folder / RECORD).is_file():
        raise UserError(f"{folder} is not a run folder (it has no {RECORD}); start one with `train --out {folder}`")
    config = RunConfig.read(folder / RECORD)
    dataset = read_json(folder / RECORD).get("dataset")
    if not isinstance(dataset, dict) or not {"tokenizer_sha256", "corpus_sha256"} <= dataset.keys():
        raise UserError(f"{folder / RECORD} does not record its data; restore it from a copy")
    return Run(folder=folder, config=config, dataset=dataset)


def find_checkpoint(path: Path) -> tuple[Run, Path]:
    """The run and checkpoint that ``path`` names: a run folder (its newest checkpoint) or a checkpoint folder.

    Raises:
        UserError: it is neither.
    """
    checkpoint = path.resolve()  # "." has no name
    if checkpoint.name.startswith("step-") and (checkpoint.parent.parent / RECORD).is_file() and checkpoint.is_dir():
        return open_run(checkpoint.parent.parent), path
    run = open_run(path)
    return run, run.latest_checkpoint()


def _same_place(one: str, other: str) -> bool:
    """Whether two ways to name a text name the same one, whatever is in it."""
    if one == other or "stdlib" in (one, other):
        return one == other
    try:
        return from_home(one).samefile(from_home(other))
    except OSError:  # not there, or no path
        return False


def _check_sections(record: dict[str, Any]) -> None:
    """Raises a ValueError that names the section which is missing, or the model's field which is of another type."""
    for section in ("model", "training", "data"):
        if not isinstance(record.get(section), dict):
            raise ValueError(f"it has no section {section}")
    kinds = ResNetBKConfig.__annotations__
    for name, value in record["model"].items():
        if name in kinds:
            try:
                msgspec.convert(value, kinds[name])
            except msgspec.ValidationError as error:
                raise ValueError(f"model's {name}: {error}") from None


def _convert(values: dict[str, Any], kind: type[ConfigT]) -> ConfigT:
    """A configuration from its JSON; a misspelt field is an error and not left out."""
    if unknown := set(values) - {field.name for field in fields(kind)}:
        raise ValueError(f"there is no configuration field {', '.join(sorted(unknown))}")
    return msgspec.convert(values, kind)
