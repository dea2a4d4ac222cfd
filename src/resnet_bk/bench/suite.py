"""Runs gates and sections cell by cell, and writes report.json after each, so that nothing measured is lost.

A second call with the same settings and text on the same machine and code keeps what was measured and goes on with what
was not. Two calls at the same time are not for one folder: the later one is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from resnet_bk.bench import convergence, flops, gates, memory, scaling, stability, timing
from resnet_bk.bench.cells import Cell, NotANumberError, Outcome, Section
from resnet_bk.bench.contestants import describe_contestant
from resnet_bk.bench.process import Ended, run_apart, side_by_side
from resnet_bk.bench.profiles import Profile
from resnet_bk.bench.setup import Setup
from resnet_bk.environment import describe_environment
from resnet_bk.errors import UserError
from resnet_bk.files import check_writable, make_directory, read_json, sole_use, write_json
from resnet_bk.heap import keep_freed_memory
from resnet_bk.memory.limits import is_out_of_memory
from resnet_bk.schema import (
    KIND,
    SECTIONS,
    VERSION,
    CellStatus,
    Failure,
    FailureKind,
    Report,
    Results,
    Workload,
    read_report,
    to_json,
)
from resnet_bk.training.config import DataConfig, TrainingConfig
from resnet_bk.training.data import TokenDataset, prepare_dataset
from resnet_bk.training.data.batches import check_long_enough
from resnet_bk.training.data.tokenizer import check_tokenizer
from resnet_bk.training.start import check_memory
from resnet_bk.training.step import choose_device

REPORT_FILE, CELLS_FOLDER = "report.json", "cells"
MODULES: dict[str, Section] = {
    module.NAME: module for module in (gates, flops, timing, memory, convergence, scaling, stability)
}
ASKED = ("cell", "arguments", "contestants")
# Figures that a wrong model must not have.
WITHHELD_FROM = ("timing", "convergence", "scaling")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to compare, on what. ``overrides`` are fields of the model that differ from the preset's; ``baseline`` is a
    preset, ``hf:`` and a configuration, ``module:function``, or None for the same model with attention."""

    profile: Profile
    preset: str
    overrides: dict[str, Any]
    data: DataConfig
    training: TrainingConfig
    baseline: str | None = None
    sections: tuple[str, ...] = SECTIONS

    def __post_init__(self) -> None:
        if unknown := [name for name in self.sections if name not in SECTIONS]:
            raise UserError(f"there is no section {unknown[0]!r}; choose among {', '.join(SECTIONS)}")
        if self.training.precision == "fp16":
            raise UserError("a benchmark in fp16 would time a loss scaling that skips steps; choose fp32 or bf16")
        if self.training.sequence_length <= self.profile.decode_tokens:
            raise UserError(
                f"sequence_length {self.training.sequence_length} leaves no prompt before the "
                f"{self.profile.decode_tokens} tokens that profile {self.profile.name} decodes; lengthen it"
            )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A cell that begins, or with ``status`` one that has ended; ``seconds_left`` is None until one has ended."""

    cell: str
    done: int
    total: int
    seconds_left: float | None
    status: CellStatus | None


Watch = Callable[[Progress], None]


def run_benchmark(
    config: BenchmarkConfig,
    out: Path,
    *,
    command: list[str],
    on_remark: Callable[[str], None] = lambda _: None,
    on_progress: Watch = lambda _: None,
) -> Report:
    """Measures what is not measured yet and returns the report, which is also in ``out/report.json``.

    Raises:
        UserError: the settings do not fit, the text cannot be had, ``out`` holds another benchmark or is in use by one.
    """
    if config.training.num_threads is not None:
        torch.set_num_threads(config.training.num_threads)
    check_writable(out)
    # Before the text is prepared, which would disturb what the other one times.
    with sole_use(out, f"{out} is in use by another benchmark; wait until it ends, or choose another --out"):
        return _run_alone(config, out, command, on_remark, on_progress)


def _run_alone(
    config: BenchmarkConfig, out: Path, command: list[str], on_remark: Callable[[str], None], on_progress: Watch
) -> Report:
    path = out / REPORT_FILE
    previous = read_report(path) if path.exists() else None
    setup, report = _begin(config, command, on_remark)
    if previous is not None:
        report = _continued(previous, report, path)
    make_directory(out / CELLS_FOLDER)
    if previous is None:  # cells without their report could be of anything
        for left in (out / CELLS_FOLDER).glob("*.json"):
            left.unlink()
    run = _Run(out=out, on_progress=on_progress, sections=config.sections)
    return run.whole(setup, report)


def _begin(config: BenchmarkConfig, command: list[str], on_remark: Callable[[str], None]) -> tuple[Setup, Report]:
    device = choose_device(config.training.device)
    keep_freed_memory(device)
    training = replace(config.training, device=device.type)
    check_tokenizer(config.data.tokenizer)
    dataset = prepare_dataset(config.data, on_progress=on_remark)
    check_long_enough(dataset.train.tokens, training.sequence_length)
    setup = Setup(
        preset=config.preset,
        overrides=config.overrides,
        baseline=config.baseline,
        vocab_size=dataset.tokenizer.vocab_size,
        data=config.data,
        training=training,
        profile=config.profile,
        corpus_sha256=dataset.record["corpus_sha256"],
    )
    _check_models(setup)
    report = Report(
        kind=KIND,
        version=VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        profile=msgspec.json.decode(msgspec.json.encode(config.profile)),
        environment=describe_environment(),
        workload=_workload(setup, dataset),
        contestants=[describe_contestant(contender) for contender in setup.all_contenders.values()],
        gates=[],
        cells={},
        results=Results(),
    )
    return setup, report


def _workload(setup: Setup, dataset: TokenDataset) -> Workload:
    training = setup.training
    validation, test = convergence.held_out(dataset)
    return Workload(
        preset=setup.preset,
        data=setup.data.data,
        description=dataset.record["description"],
        tokenizer=setup.data.tokenizer,
        vocab_size=setup.vocab_size,
        train_tokens=len(dataset.train.tokens),
        validation_tokens=len(validation),
        test_tokens=len(test),
        split=dataset.record["split"],
        batch_size=training.batch_size,
        sequence_length=training.sequence_length,
        precision=training.precision,
        device=setup.device.type,
        threads=torch.get_num_threads(),
        seed=training.seed,
        corpus_sha256=dataset.record["corpus_sha256"],
        tokenizer_sha256=dataset.record["tokenizer_sha256"],
    )


def _check_models(setup: Setup) -> None:
    length = setup.training.sequence_length
    for model in setup.configs.values():
        limit = model.max_position_embeddings
        if limit is not None and length > limit:
            raise UserError(
                f"sequence_length {length} is more than the position table of {limit}; shorten it, or choose a preset "
                "without a table"
            )
        if not model.causal:
            raise UserError(
                "causal=False would compare a model that reads its targets; leave it out (the convergence section "
                "shows that variant beside the others)"
            )
        check_memory(model, setup.training, setup.device)


def _continued(previous: Report, fresh: Report, path: Path) -> Report:
    """The earlier report if it is of the same benchmark; a different one is not overwritten."""
    _check_same_text(previous.workload, fresh.workload, path)
    with_this_vocabulary = replace(previous.workload, tokenizer_sha256=fresh.workload.tokenizer_sha256)
    for what, before, now in (
        ("settings differ", previous.profile, fresh.profile),
        ("workload differs", with_this_vocabulary, fresh.workload),
        ("vocabulary differs", previous.workload, fresh.workload),
        ("models differ", previous.contestants, fresh.contestants),
    ):
        if msgspec.json.encode(before) != msgspec.json.encode(now):
            raise UserError(f"{path} is of another benchmark (its {what}); choose another --out")
    if previous.environment != fresh.environment:
        raise UserError(
            f"{path} was measured on another machine, with other versions or another commit; choose another --out"
        )
    return previous


def _check_same_text(previous: Workload, fresh: Workload, path: Path) -> None:
    """What goes by the same name may have been edited since, and have as many tokens as before."""
    if previous.data != fresh.data:
        return
    if previous.corpus_sha256 is None:  # nothing else tells whether it is the same: an installed copy has no commit
        raise UserError(f"{path} is of an older program and does not say what its text was; choose another --out")
    if previous.corpus_sha256 != fresh.corpus_sha256:
        raise UserError(
            f"the text of {fresh.data} is not the one that {path} was measured on; restore it, or choose another --out"
        )


def measure_cell(setup: Setup, cell: Cell) -> Any:
    """What runs in a process of its own."""
    keep_freed_memory(setup.device)
    if setup.training.num_threads is not None:
        torch.set_num_threads(setup.training.num_threads)
    return MODULES[cell.section].measure(setup, cell)


def failure_kind(error: BaseException) -> FailureKind:
    """What a report calls an exception."""
    if is_out_of_memory(error):
        return "out of memory"
    return "not a number" if isinstance(error, NotANumberError) else "error"


class _Run:
    """Cells of one folder: each outcome is a file, and report.json is made of all of them anew after each."""

    def __init__(self, *, out: Path, on_progress: Watch, sections: tuple[str, ...]) -> None:
        self._out, self._on_progress, self._sections = out, on_progress, sections
        self._outcomes: dict[str, dict[str, Outcome]] = {name: {} for name in MODULES}
        self._spent = 0.0
        self._weight_spent = 0.0

    def whole(self, setup: Setup, report: Report) -> Report:
        """Gates, then the sections that were asked for."""
        asked = (gates.NAME, *self._sections)
        others = {name: status for name, status in report.cells.items() if name.partition("/")[0] not in asked}
        report = replace(report, cells=others)  # the rest is made anew, of what is kept and what is measured
        write_json(self._out / REPORT_FILE, to_json(report))
        report = self._section(gates, setup, report, later=setup)
        report = replace(report, gates=gates.assemble(setup, self._outcomes[gates.NAME]))
        broken, wrong = gates.reasons_to_withhold(setup, self._outcomes[gates.NAME])
        for name in self._sections:
            reasons = {**(wrong if name in WITHHELD_FROM else {}), **broken}
            report = replace(report, cells={**report.cells, **_withheld(name, reasons)})
            report = self._section(MODULES[name], setup.without(reasons), report, later=setup)
        write_json(self._out / REPORT_FILE, to_json(report))
        return report

    def _section(self, module: Section, setup: Setup, report: Report, *, later: Setup) -> Report:
        name = module.NAME
        outcomes = self._outcomes[name]
        while todo := [cell for cell in module.cells(setup, outcomes) if cell.name not in outcomes]:
            several = _at_once(todo, setup)
            kept = {cell.name: self._kept(module, cell, setup) for cell in several}
            if missing := [cell for cell in several if kept[cell.name] is None]:
                left = sum(cell.weight for cell in todo) + self._weight_of_sections_after(name, later)
                outcomes |= self._measured(setup, missing, left, len(todo), report)
            outcomes |= {name: outcome for name, outcome in kept.items() if outcome is not None}
            report = replace(report, cells=report.cells | {cell.path: outcomes[cell.name].status for cell in several})
            report = _with_result(report, name, module.assemble(setup, outcomes))
            write_json(self._out / REPORT_FILE, to_json(report))
        return report

    def _measured(
        self, setup: Setup, cells: list[Cell], weight_left: float, cells_left: int, report: Report
    ) -> dict[str, Outcome]:
        """All of them at once, by name."""
        done = len(report.cells)
        rate = self._spent / self._weight_spent if self._weight_spent else None
        left = None if rate is None else rate * weight_left
        show = partial(Progress, total=done + cells_left, seconds_left=left)
        for cell in cells:
            self._on_progress(show(cell=cell.path, done=done, status=None))
        limit = setup.profile.cell_seconds
        ended = side_by_side(
            [partial(run_apart, measure_cell, (setup, cell), timeout=limit, kind_of=failure_kind) for cell in cells]
        )
        self._spent += max(found.seconds for found in ended)
        self._weight_spent += sum(cell.weight for cell in cells)
        outcomes = {}
        for number, (cell, found) in enumerate(zip(cells, ended, strict=True), start=1):
            outcomes[cell.name] = self._keep(cell, found, setup)
            self._on_progress(show(cell=cell.path, done=done + number, status=outcomes[cell.name].status))
        return outcomes

    def _weight_of_sections_after(self, name: str, setup: Setup) -> float:
        names = [gates.NAME, *self._sections]
        return sum(
            cell.weight
            for later in names[names.index(name) + 1 :]
            for cell in MODULES[later].cells(setup, {})
            if not self._path(cell).exists()
        )

    def _path(self, cell: Cell) -> Path:
        return self._out / CELLS_FOLDER / f"{cell.section}--{cell.name.replace('/', '--')}.json"

    def _keep(self, cell: Cell, ended: Ended, setup: Setup) -> Outcome:
        status = CellStatus(seconds=ended.seconds, failure=ended.failure, waited=ended.waited)
        raw = None if ended.result is None else msgspec.json.decode(ended.result)
        try:
            result = _decoded(MODULES[cell.section], raw)
        except msgspec.ValidationError as error:
            failure = Failure(kind="error", message=f"a figure is out of all bounds: {error}")
            status, raw, result = replace(status, failure=failure), None, None
        document = {**_asked(cell, setup), "status": msgspec.to_builtins(status), "result": raw}
        write_json(self._path(cell), document)
        return Outcome(status=status, result=result)

    def _kept(self, module: Section, cell: Cell, setup: Setup) -> Outcome | None:
        """What an earlier call measured, of the same contestants. Failures are tried again."""
        if not self._path(cell).exists():
            return None
        try:
            document = read_json(self._path(cell))
            if {name: document[name] for name in ASKED} != _asked(cell, setup):
                return None
            status = msgspec.convert(document["status"], CellStatus)
            result = _decoded(module, document["result"])
        except (UserError, msgspec.ValidationError, KeyError, TypeError):
            return None
        return None if status.failure is not None else Outcome(status=status, result=result)


def _at_once(todo: list[Cell], setup: Setup) -> list[Cell]:
    """What is measured next: a cell that is timed alone, others with more of their kind."""
    if todo[0].timed:
        return todo[:1]
    return [cell for cell in todo if not cell.timed][: setup.at_once]


def _asked(cell: Cell, setup: Setup) -> dict[str, Any]:
    """What a cell was asked: whom a gate has let in since was not measured in it."""
    asked = (cell.path, dict(cell.arguments), list(setup.contenders))
    found: dict[str, Any] = msgspec.to_builtins(dict(zip(ASKED, asked, strict=True)))
    return found


def _decoded(module: Section, raw: Any) -> Any:
    return None if raw is None else msgspec.convert(raw, module.RESULT)


def _with_result(report: Report, name: str, result: Any) -> Report:
    if name == gates.NAME:
        return replace(report, gates=result)
    return replace(report, results=replace(report.results, **{name: result}))


def _withheld(section: str, reasons: Mapping[str, str]) -> dict[str, CellStatus]:
    return {
        f"{section}/{key}": CellStatus(seconds=0.0, failure=Failure(kind="withheld", message=reason))
        for key, reason in reasons.items()
    }
