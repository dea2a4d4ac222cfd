"""Runs the sections and writes report.json after each, so that nothing measured is lost.

A second call with the same settings on the same machine and code keeps what was measured and goes on with what was not.
"""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from resnet_bk.bench.contestants import Subject, contestant_configs, describe_contestant
from resnet_bk.bench.convergence import measure_convergence
from resnet_bk.bench.flops import measure_flops
from resnet_bk.bench.memory import measure_memory
from resnet_bk.bench.profiles import Profile
from resnet_bk.bench.scaling import measure_scaling
from resnet_bk.bench.stability import measure_stability, run_gates
from resnet_bk.bench.timing import measure_timing
from resnet_bk.environment import describe_environment
from resnet_bk.errors import UserError
from resnet_bk.files import check_writable, make_directory, write_json
from resnet_bk.models import ResNetBKConfig
from resnet_bk.schema import KIND, SECTIONS, VERSION, Report, Results, SectionStatus, Workload, read_report, to_json
from resnet_bk.training.config import DataConfig, TrainingConfig
from resnet_bk.training.data import TokenDataset, prepare_dataset, training_batch
from resnet_bk.training.data.batches import check_long_enough
from resnet_bk.training.data.tokenizer import check_tokenizer
from resnet_bk.training.start import check_memory
from resnet_bk.training.step import choose_device

REPORT_FILE = "report.json"


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to compare, on what. ``overrides`` are fields of the model that differ from the preset's."""

    profile: Profile
    preset: str
    overrides: dict[str, Any]
    data: DataConfig
    training: TrainingConfig
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
class _Bench:
    """Everything that sections read."""

    config: BenchmarkConfig
    models: dict[str, ResNetBKConfig]
    dataset: TokenDataset
    device: torch.device
    on_progress: Callable[[str], None]

    def subjects(self) -> dict[str, Subject]:
        """Every contestant with the same batch of the text."""
        return {key: Subject.build(model, self.config.training, self._batch()) for key, model in self.models.items()}

    def _batch(self) -> tuple[Tensor, Tensor]:
        training = self.config.training
        input_ids, targets = training_batch(
            self.dataset.train.tokens,
            batch_size=training.batch_size,
            sequence_length=training.sequence_length,
            seed=training.seed,
            step=0,
        )
        return input_ids.to(self.device), targets.to(self.device)

    def measure(self, section: str) -> Any:
        """The result of one section."""
        config, profile, training = self.config, self.config.profile, self.config.training
        match section:
            case "flops":
                return measure_flops(self.subjects())
            case "timing":
                return measure_timing(self.subjects(), profile)
            case "memory":
                return measure_memory(self.subjects())
            case "convergence":
                return measure_convergence(self.models, training, self.dataset, profile, self.device, self.on_progress)
            case "scaling":
                return measure_scaling(self.models, config.training, profile, self.device, self.on_progress)
            case _:
                return measure_stability(self.models, training, profile, self.device, self.on_progress)


def run_benchmark(
    config: BenchmarkConfig,
    out: Path,
    *,
    command: list[str],
    on_progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measures what is not measured yet and returns the report, which is also in ``out/report.json``.

    Raises:
        UserError: the settings do not fit, the text cannot be had, or ``out`` holds another benchmark.
    """
    if config.training.num_threads is not None:
        torch.set_num_threads(config.training.num_threads)
    check_writable(out)
    path = out / REPORT_FILE
    previous = _previous(path)
    bench, report = _begin(config, command, on_progress)
    if previous is not None:
        report = _continue(previous, report, path)
    missing = [name for name in config.sections if getattr(report.results, name) is None]
    if not missing:
        on_progress(f"{path} has every section already")
        return report
    make_directory(out)
    if not report.gates:
        on_progress("gates: exactness and causality before anything is timed")
        report = replace(report, gates=run_gates(bench.models, bench.device))
        _write(path, report)
    if failed := [gate.name for gate in report.gates if not gate.passed]:
        on_progress(f"not measured, because a gate failed: {'; '.join(failed)}")
        return report
    for section in missing:
        report = _measure(bench, report, section)
        _write(path, report)
    return report


def _begin(config: BenchmarkConfig, command: list[str], on_progress: Callable[[str], None]) -> tuple[_Bench, Report]:
    training, device = config.training, choose_device(config.training.device)
    check_tokenizer(config.data.tokenizer)
    dataset = prepare_dataset(config.data, on_progress=on_progress)
    check_long_enough(dataset.train.tokens, training.sequence_length)
    overrides = {"vocab_size": dataset.tokenizer.vocab_size, **config.overrides}
    try:
        models = contestant_configs(config.preset, overrides)
    except ValueError as error:
        raise UserError(str(error)) from None
    _check_models(models, training, device)
    workload = Workload(
        preset=config.preset,
        data=config.data.data,
        description=dataset.record["description"],
        tokenizer=config.data.tokenizer,
        vocab_size=dataset.tokenizer.vocab_size,
        train_tokens=len(dataset.train.tokens),
        validation_tokens=len(dataset.validation.tokens),
        split=dataset.record["split"],
        batch_size=training.batch_size,
        sequence_length=training.sequence_length,
        precision=training.precision,
        device=device.type,
        threads=torch.get_num_threads(),
        seed=training.seed,
    )
    report = Report(
        kind=KIND,
        version=VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        profile=msgspec.json.decode(msgspec.json.encode(config.profile)),
        environment=describe_environment(),
        workload=workload,
        contestants=[describe_contestant(key, model) for key, model in models.items()],
        gates=[],
        status={},
        results=Results(),
    )
    bench = _Bench(config=config, models=models, dataset=dataset, device=device, on_progress=on_progress)
    return bench, report


def _check_models(models: dict[str, ResNetBKConfig], training: TrainingConfig, device: torch.device) -> None:
    for model in models.values():
        limit = model.max_position_embeddings
        if limit is not None and training.sequence_length > limit:
            raise UserError(
                f"sequence_length {training.sequence_length} is more than the position table of {limit}; shorten it, "
                "or choose a preset without a table"
            )
        if not model.causal:
            raise UserError(
                "causal=False would compare a model that reads its targets; leave it out (the convergence section "
                "shows that variant beside the others)"
            )
        check_memory(model, training, device)


def _measure(bench: _Bench, report: Report, section: str) -> Report:
    bench.on_progress(section)
    began = time.perf_counter()
    result, failure = None, None
    try:
        result = bench.measure(section)
    except Exception as error:  # a section that fails is a result; the others are still worth having
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        bench.on_progress(f"  failed: {failure}\n{traceback.format_exc()}")
    seconds = time.perf_counter() - began
    return replace(
        report,
        results=replace(report.results, **{section: result}),
        status={**report.status, section: SectionStatus(seconds=seconds, failure=failure)},
    )


def _previous(path: Path) -> Report | None:
    return read_report(path) if path.exists() else None


def _continue(previous: Report, fresh: Report, path: Path) -> Report:
    """The earlier report if it is of the same benchmark; a different one is not overwritten."""
    for what, key in (("settings", "profile"), ("workload", "workload"), ("models", "contestants")):
        if msgspec.json.encode(getattr(previous, key)) != msgspec.json.encode(getattr(fresh, key)):
            raise UserError(f"{path} is of another benchmark (its {what} differ); choose another --out")
    if previous.environment != fresh.environment:
        raise UserError(
            f"{path} was measured on another machine, with other versions or another commit; choose another --out"
        )
    return previous


def _write(path: Path, report: Report) -> None:
    write_json(path, to_json(report))
