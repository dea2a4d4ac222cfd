"""``resnet-bk bench``."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from resnet_bk.bench.profiles import PROFILES
from resnet_bk.cli.console import print_json, remark, result_console
from resnet_bk.cli.flags import DataFlags, ModelFlags, given, shown
from resnet_bk.errors import UserError
from resnet_bk.training.config import DataConfig, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class BenchCommand:
    """Measure ResNet-BK against a Transformer of the same size on the same text, and write report.json.

    The Transformer differs in the mixer alone: it has rotary positions, and the same short convolution if there is one.
    Beside a resolvent mixer the seed's is measured too. Another baseline can be named.

    Six sections: FLOPs, wall-clock time, memory, convergence, scaling, numerical stability. Before anything is timed,
    gates check that the operators are exact and that no model reads ahead; a model that fails has no speed and no
    loss. Each cell is a process of its own: one that hangs, dies or takes all memory is a result. Each result is
    written at once; the same command again goes on with what is missing.

    Examples:
      resnet-bk bench --profile quick --out runs/bench
      resnet-bk bench --baseline hf:gpt2 --batch-size 8 --out runs/bench-gpt2
      resnet-bk bench --preset seed --mixer resolvent --conv-size 4 --max-position-embeddings none
      resnet-bk bench --preset seed --data book.txt --tokenizer char --out runs/bench-book
      resnet-bk bench --only timing memory --out runs/bench-time --json
    """

    out: Path = Path("runs/bench")
    """Folder for report.json."""
    profile: Literal["smoke", "quick", "standard", "full"] = "quick"
    """How much to measure: smoke (shows that it runs), quick (minutes, one seed), standard (three seeds, tuned learning
    rates, all axes; about half an hour on two cores) or full (hours)."""
    preset: str = "seed"
    """Named size of the models: seed, tiny, 100m, 1b, 7b or 70b."""
    baseline: Annotated[str | None, shown("the same with attention", "PRESET|hf:NAME_OR_PATH|MODULE:FUNCTION")] = None
    """What to compare with: a preset, a causal language model of transformers from its configuration, or a function
    that makes an nn.Module for a vocab_size. It gets this tokenizer's vocabulary and fresh weights."""
    only: tuple[Literal["flops", "timing", "memory", "convergence", "scaling", "stability"], ...] = ()
    """Sections to measure; all by default."""
    batch_size: Annotated[int | None, shown(TrainingConfig.batch_size)] = None
    """Sequences in a batch."""
    sequence_length: Annotated[int | None, shown(TrainingConfig.sequence_length)] = None
    """Tokens in a sequence."""
    precision: Annotated[Literal["fp32", "bf16"] | None, shown(TrainingConfig.precision, "fp32|bf16")] = None
    """Mixed precision of the matrix products."""
    seed: Annotated[int | None, shown(TrainingConfig.seed)] = None
    """Of the weights and the batches outside of the convergence section."""
    device: Annotated[str | None, shown(TrainingConfig.device)] = None
    """auto, cpu, cuda, ..."""
    num_threads: Annotated[int | None, shown("torch's choice", "INT")] = None
    """CPU threads."""
    model: ModelFlags = field(default_factory=ModelFlags)
    text: DataFlags = field(default_factory=DataFlags)
    json: bool = False
    """Print the whole report as one JSON document on standard output."""

    def run(self) -> None:
        """Measures, writes, and prints where and what."""
        from resnet_bk.bench.suite import REPORT_FILE, BenchmarkConfig, run_benchmark
        from resnet_bk.cli.bench_progress import BenchmarkProgress
        from resnet_bk.schema import SECTIONS, to_json

        config = BenchmarkConfig(
            profile=PROFILES[self.profile],
            preset=self.preset,
            overrides=given(self.model),
            data=replace(DataConfig(), **given(self.text)),
            training=replace(TrainingConfig(), **self._training()),
            baseline=self.baseline,
            sections=self.only or SECTIONS,
        )
        with BenchmarkProgress() as progress:
            report = run_benchmark(
                config, self.out, command=sys.argv[1:], on_remark=remark, on_progress=progress.observe
            )
        path = self.out / REPORT_FILE
        if self.json:
            print_json(to_json(report))
        if failed := [gate.name for gate in report.gates if not gate.passed]:
            raise UserError(f"a gate failed, so this model has no speed and no loss: {'; '.join(failed)}; see {path}")
        if failed := [name for name, cell in report.cells.items() if cell.failure]:
            raise UserError(f"not measured: {', '.join(failed)}; {path} says why, the same command tries them again")
        if not self.json:
            remark(f"write the PDF and the HTML page with: resnet-bk report {path}")
            result_console.print(str(path), markup=False, soft_wrap=True)

    def _training(self) -> dict[str, Any]:
        names = ("batch_size", "sequence_length", "precision", "seed", "device", "num_threads")
        return {name: value for name in names if (value := getattr(self, name)) is not None}
