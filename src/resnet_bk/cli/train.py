"""``resnet-bk train``."""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from resnet_bk.cli.console import print_json, remark
from resnet_bk.cli.flags import DataFlags, ModelFlags, TrainingFlags, given
from resnet_bk.cli.progress import TrainingProgress
from resnet_bk.cli.wording import local_attention_in_words, untrained_distances_in_words
from resnet_bk.errors import UserError
from resnet_bk.training.config import DataConfig, TrainingConfig

if TYPE_CHECKING:
    import torch

    from resnet_bk.memory.plan import Budget
    from resnet_bk.models import ResNetBKConfig
    from resnet_bk.training.data import TokenDataset
    from resnet_bk.training.distributed import World
    from resnet_bk.training.loop import TrainingSummary
    from resnet_bk.training.run import RunConfig
    from resnet_bk.training.start import ReadyRun

DEFAULT_PRESET = "seed"
# How long a run is, how it is computed and what is written when: not what it learns from or how fast.
CHANGEABLE_ON_RESUME = (
    *("steps", "micro_batch_size", "checkpointing", "offload_optimizer", "stream_weights", "cuda_graphs"),
    *("loss_chunk_tokens", "log_every", "eval_every", "eval_tokens", "save_every", "keep_checkpoints"),
)


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train a language model, or go on with a run that was stopped.

    Several GPUs or machines share parameters and batch under torchrun:
    torchrun --nproc-per-node 8 -m resnet_bk train ...

    Examples:
      resnet-bk train --preset seed --out runs/first
      resnet-bk train --preset seed --data book.txt --tokenizer char --steps 2000 --out runs/book
      resnet-bk train --preset seed --mixer resolvent --conv-size 4 --max-position-embeddings none --out runs/resolvent
      resnet-bk train --preset seed --mixer attention --out runs/transformer
      resnet-bk train --preset 1b --gpu-memory 4GB --host-memory 24GB --sequence-length 1024 --out runs/large
      resnet-bk train --resume runs/first --steps 4000
      resnet-bk train --config runs/first/run.json --seed 1 --out runs/second
    """

    out: Path | None = None
    """Folder for the run; must not hold one yet."""
    preset: str | None = None
    """Named size: seed, tiny, 100m, 1b, 7b or 70b. Without --config, seed is the default."""
    config: Path | None = None
    """A run.json to take the configuration from; flags given besides it change it."""
    resume: Path | None = None
    """Run folder to go on with, bitwise as if it had never stopped (on a CPU). --steps may be raised, and how it is
    computed and written may change (--micro-batch-size, --checkpointing, --offload-optimizer, --save-every and so on).
    --data says where its text is now, if that has moved."""
    gpu_memory: str | None = None
    """Train in this much, like 4GB: the fastest strategy that fits is chosen, and the allocator held to it. Flags given
    besides it stay as they are."""
    host_memory: str | None = None
    """The same for the host, like 15GB."""
    strategy: Literal["auto", "given"] | None = None
    """auto: the fastest way to train that fits the budget, or this machine if there is none; given: as the flags say.
    auto is the default when a budget is given."""
    model: ModelFlags = field(default_factory=ModelFlags)
    training: TrainingFlags = field(default_factory=TrainingFlags)
    text: DataFlags = field(default_factory=DataFlags)
    json: bool = False
    """Print the outcome as one JSON document on standard output."""

    def run(self) -> None:
        """Trains, and prints how it ended. Of several ranks (torchrun), rank 0 prints and writes."""
        from resnet_bk.training.distributed import joined

        with joined() as world:
            self._train(world)

    def _train(self, world: "World") -> None:
        progress = TrainingProgress(silent=not world.is_main)
        with progress:
            ready = self._resume(progress, world) if self.resume else self._start(progress, world)
            if ready is None:
                return
            run = ready.trainer.run
            progress.begin(total=run.config.training.steps, completed=ready.state.step)
            summary = ready.trainer.train(ready.state)
        if world.is_main:
            self._report(ready, summary)

    def _start(self, progress: TrainingProgress, world: "World") -> "ReadyRun":
        if self.out is None:
            raise UserError("say where the run goes: --out runs/NAME (or --resume a run folder)")
        from resnet_bk.planner.devices import device_for
        from resnet_bk.planner.predict import check_traced
        from resnet_bk.training.data import prepare_dataset
        from resnet_bk.training.data.tokenizer import check_tokenizer
        from resnet_bk.training.run import check_new_run
        from resnet_bk.training.start import check_device, check_ranks, start_run
        from resnet_bk.training.step import choose_device

        if world.is_main:
            check_new_run(self.out)
        config = self._configuration()
        check_ranks(config.training, world)
        check_device(config.training)
        check_tokenizer(config.data.tokenizer)
        with world.one_here_first():
            dataset = prepare_dataset(config.data, on_progress=_remarks(world))
        config = self._within_budget(self._with_vocabulary(config, dataset, world), world)
        if world.is_main and world.size == 1:
            check_traced(config.model, config.training, device_for(choose_device(config.training.device)))
        ready = start_run(self.out, config, dataset, command=sys.argv[1:], observer=progress.observe, world=world)
        if world.is_main:
            self._describe(ready)
        return ready

    def _resume(self, progress: TrainingProgress, world: "World") -> "ReadyRun | None":
        assert self.resume
        from resnet_bk.training.run import open_run
        from resnet_bk.training.start import check_device, resume_run

        run = open_run(self.resume)
        self._check_resume_flags(run.config)
        changes = {name: value for name, value in given(self.training).items() if name in CHANGEABLE_ON_RESUME}
        training = replace(run.config.training, **changes)
        if "cuda_graphs" in changes:
            check_device(training)
        run.tokenizer()
        with world.one_here_first():
            dataset = run.prepare_text(run.read_text(self.text.data), on_progress=_remarks(world))
        wanted = replace(run, config=replace(run.config, training=training))
        self._held_budget(training, world)
        ready = resume_run(wanted, dataset, observer=progress.observe, world=world)
        say = _remarks(world)
        # Even of a run that is done: where its text is now is what `eval` asks next.
        if world.is_main and dataset.record["data"] != run.config.data.data:
            run = run.moved(dataset)
            say(f"{self.resume} now records {run.config.data.data} as the place of its text")
        if ready.state.step >= training.steps:
            say(f"{self.resume} has done its {ready.state.step} steps; raise --steps to go on")
            if self.json and world.is_main:
                print_json({"run": str(self.resume), "steps": ready.state.step, "finished": True})
            return None
        # Written last: a run that turns out damaged, or done, keeps its record of how it trains.
        if world.is_main:
            if training != run.config.training:
                run.changed(**changes)
            self._describe(ready)
        say(f"going on after step {ready.state.step}")
        return ready

    def _configuration(self) -> "RunConfig":
        from resnet_bk.models import ResNetBKConfig
        from resnet_bk.training.run import RunConfig

        if self.config and self.preset:
            raise UserError("give --preset or --config, not both")
        base = RunConfig.read(self.config) if self.config else None
        try:
            if base:
                model = ResNetBKConfig.derive(base.model.own_fields(), **given(self.model))
            else:
                model = ResNetBKConfig.from_preset(self.preset or DEFAULT_PRESET, **given(self.model))
        except ValueError as error:
            raise UserError(str(error)) from None
        training = replace(base.training if base else TrainingConfig(), **given(self.training))
        data = replace(base.data if base else DataConfig(), **given(self.text))
        return RunConfig(model=model, training=training, data=data)

    def _with_vocabulary(self, config: "RunConfig", dataset: "TokenDataset", world: "World") -> "RunConfig":
        """The model's vocabulary is the tokenizer's, unless it was asked for; experts of a baseline follow it."""
        vocab_size = dataset.tokenizer.vocab_size
        if self.model.vocab_size is not None or config.model.vocab_size == vocab_size:
            return config
        from resnet_bk.models import ResNetBKConfig

        _remarks(world)(f"vocabulary: {vocab_size:,} tokens, the tokenizer's (configured: {config.model.vocab_size:,})")
        flags = {**given(self.model), "vocab_size": vocab_size}
        if self.config:
            model = ResNetBKConfig.derive(config.model.own_fields(), **flags)
        else:
            model = ResNetBKConfig.from_preset(self.preset or DEFAULT_PRESET, **flags)
        return replace(config, model=model)

    def _within_budget(self, config: "RunConfig", world: "World") -> "RunConfig":
        """The strategy that a budget asks for, or --strategy auto; without either, the configuration's own."""
        has_budget = self.gpu_memory is not None or self.host_memory is not None
        if not (has_budget if self.strategy is None else self.strategy == "auto"):
            if has_budget:
                self._held_budget(config.training, world)
            return config
        from resnet_bk.memory.units import format_bytes
        from resnet_bk.planner.devices import device_for
        from resnet_bk.planner.search import whole_machine
        from resnet_bk.planner.together import choose_together
        from resnet_bk.training.step import choose_device

        # Held first: it changes what the driver takes of the device.
        held = self._held_budget(config.training, world) if has_budget else None
        device = device_for(choose_device(config.training.device))
        budget = held or whole_machine(device)
        fixed = set(given(self.training))
        chosen = choose_together(config.model, config.training, budget, device, fixed=fixed, world=world)
        on_gpu = f"GPU {format_bytes(chosen.gpu_bytes)}, " if chosen.gpu_bytes else ""
        _remarks(world)(
            f"planned: {on_gpu}host {format_bytes(chosen.host_bytes)}, tensors "
            f"{format_bytes(chosen.tensor_bytes)} on {'the' if world.size == 1 else 'each'} device"
        )
        return replace(config, training=chosen.training)

    def _held_budget(self, training: TrainingConfig, world: "World") -> "Budget":
        """The budget that was given, to which the allocator is held from here on."""
        from resnet_bk.memory.plan import Budget
        from resnet_bk.training.budget import hold_to_budget
        from resnet_bk.training.step import choose_device

        budget = Budget.parse(self.gpu_memory, self.host_memory)
        if budget.gpu_bytes is not None:
            hold_to_budget(budget.gpu_bytes, choose_device(training.device), alone=world.size == 1)
        return budget

    def _check_resume_flags(self, recorded: "RunConfig") -> None:
        """A run goes on as what it is: flags that would make it another are refused, not ignored."""
        if self.out is not None or self.preset is not None or self.config is not None:
            raise UserError("--resume takes everything from the run folder; leave out --out, --preset and --config")
        recorded_fields = {**recorded.model.own_fields(), **asdict(recorded.training), **asdict(recorded.data)}
        flags = {**given(self.model), **given(self.training), **given(self.text)}
        changed = [
            name
            for name, value in flags.items()
            if name not in (*CHANGEABLE_ON_RESUME, "data") and recorded_fields[name] != value  # data: by its content
        ]
        if changed:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
            differ, them = ("differs", "it") if len(changed) == 1 else ("differ", "them")
            raise UserError(f"{names} {differ} from what {self.resume} records; leave {them} out, or start a new run")

    def _describe(self, ready: "ReadyRun") -> None:
        from resnet_bk.memory.parameters import count_parameters
        from resnet_bk.training.strategy import describe_strategy

        trainer = ready.trainer
        config, dataset = trainer.run.config, trainer.dataset
        model, training, device = config.model, config.training, trainer.device
        counts = count_parameters(model)
        remark(
            f"model: {counts.total:,} parameters, {counts.active:,} active per token, {_mixer_in_words(model, device)}"
        )
        if not model.causal:
            remark("       causal=False: tokens read the future; the loss of this model is a leak, not skill")
        if untrained := untrained_distances_in_words(model, training.sequence_length):
            remark(f"       {untrained}")
        record = dataset.record
        remark(
            f"data: {record['description']}; {len(dataset.train.tokens):,} tokens to train on, "
            f"{len(dataset.validation.tokens):,} held out ({record['split']})"
        )
        remark(
            f"on {_ranks_in_words(trainer.world)}{device.type}, {training.precision}, {training.num_threads} threads; "
            f"{training.tokens_per_step:,} tokens a step, {training.steps:,} steps; writing {trainer.run.folder}"
        )
        if strategy := describe_strategy(training):
            remark(f"memory: {strategy}")

    def _report(self, ready: "ReadyRun", summary: "TrainingSummary") -> None:
        run, dataset = ready.trainer.run, ready.trainer.dataset
        entropy = dataset.validation.unigram_entropy()
        document: dict[str, Any] = {
            "run": str(run.folder),
            "checkpoint": str(summary.checkpoint),
            "steps": summary.step,
            "finished": True,
            "seconds": summary.seconds,
            "tokens": summary.step * run.config.training.tokens_per_step,
            "validation_loss": summary.validation.loss,
            "validation_tokens": summary.validation.tokens,
            "unigram_entropy": entropy,
            "leaks_targets": not run.config.model.causal,
        }
        leak = "" if run.config.model.causal else " (a leak: the model reads its targets)"
        remark(
            f"done: {summary.step:,} steps in {summary.seconds:.0f} s; held-out loss "
            f"{summary.validation.loss:.3f} nats a token{leak}, unigram entropy {entropy:.3f}; {summary.checkpoint}"
        )
        if self.json:
            print_json(document)


def _remarks(world: "World") -> Callable[[str], None]:
    """What remarks go through: nowhere, but on rank 0."""
    return remark if world.is_main else lambda _: None


def _ranks_in_words(world: "World") -> str:
    return "" if world.size == 1 else f"{world.size} ranks, each "


def _mixer_in_words(model: "ResNetBKConfig", device: "torch.device") -> str:
    """The mixer and what computes it."""
    from resnet_bk.ops.bk import choose_backend
    from resnet_bk.ops.carry import choose_carry_backend
    from resnet_bk.ops.convolution import choose_convolution_backend

    words = f"mixer {model.mixer}"
    if model.mixer == "bk":
        words += f" ({choose_backend(device).name} backend)"
    if model.mixer == "resolvent":
        chains, carry = choose_backend(device).name, choose_carry_backend(device).name
        words += f" ({model.resolvent_regime}, chains on the {chains} backend, carry on {carry})"
    words += local_attention_in_words(model)
    if not model.conv_size:
        return words
    return f"{words}, convolution over {model.conv_size} tokens ({choose_convolution_backend(device).name} backend)"
