"""``resnet-bk plan``."""

import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from resnet_bk.cli.console import print_json, remark, result_console
from resnet_bk.cli.flags import NORM_OR_NONE, ModelFlags, given, shown
from resnet_bk.cli.wording import local_attention_in_words
from resnet_bk.errors import UserError
from resnet_bk.training.config import TrainingConfig

if TYPE_CHECKING:
    from resnet_bk.memory.plan import Budget, Plan
    from resnet_bk.models import ResNetBKConfig
    from resnet_bk.planner.devices import Device
    from resnet_bk.planner.predict import Prediction
    from resnet_bk.training.config import Precision, TrainingConfig


ASSUMED = "h100"  # where there is no GPU and none was named


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Say what training will need, on the GPU and in host memory, before anything runs.

    Nothing is allocated, and no GPU is needed. With a budget, or a device, the fastest way to train that fits is
    searched, traced tensor by tensor, and printed as the `train` command that does it. GB is 10^9 bytes, GiB 2^30.

    Examples:
      resnet-bk plan --preset seed
      resnet-bk plan --preset 1b --batch-size 128 --sequence-length 1024 --gpu-memory 12GB --host-memory 40GB
      resnet-bk plan --preset 100m --device colab-t4 --batch-size 32 --sequence-length 1024 --explain
      resnet-bk plan --preset 7b --device h100 --num-gpus 8 --batch-size 64 --sequence-length 1024
      resnet-bk plan --model hf:gpt2 --batch-size 8 --sequence-length 1024 --device rtx-3060
      resnet-bk plan --preset tiny --verify
      resnet-bk plan --ladder --figure ladder.svg
    """

    preset: str = "seed"
    """Named size: seed, tiny, 100m, 1b, 7b or 70b."""
    foreign: Annotated[str | None, tyro.conf.arg(name="model", metavar="hf:NAME_OR_PATH")] = None
    """Instead of a preset: any dense causal language model of transformers, from its configuration alone."""
    batch_size: int = 20
    """Sequences of a step."""
    sequence_length: int = 128
    """Tokens in a sequence."""
    micro_batch_size: int | None = None
    """Sequences that go through the model at once. With a budget it is chosen, if left out."""
    max_grad_norm: Annotated[float | None, shown(TrainingConfig.max_grad_norm, "FLOAT|none"), NORM_OR_NONE] = 1.0
    """Norm to clip to; none (or 0) for no clipping, which lets an offloaded optimizer update during backward."""
    device: str | None = None
    """The machine to plan for: auto (this one), cpu, or a card such as colab-t4, rtx-3060, a100-40gb, h100. Its memory
    is the budget, if none is given."""
    num_gpus: Annotated[int | Literal["auto"], tyro.conf.arg(metavar="INT|auto")] = 1
    """GPUs of one host that share model and batch by FSDP2, under torchrun: then memory is each GPU's, and --batch-size
    that of all. auto: the least power of two on which anything fits."""
    gpu_memory: str | None = None
    """What the GPU may hold, like 12GB or 11.9GiB; auto for all that the card at hand has."""
    host_memory: str | None = None
    """What the host has, like 15GB, for all processes on it."""
    explain: bool = False
    """Show where every megabyte goes: the formulas' parts beside the traced ones."""
    verify: bool = False
    """Run a real training step here and show what was predicted beside what was measured."""
    ladder: bool = False
    """Show all presets from 4M to 70B, each strategy's need, and how many GPUs it takes where one does not do."""
    figure: Path | None = None
    """With --ladder: write a picture of it, stacked by part, as SVG."""
    model: ModelFlags = field(default_factory=ModelFlags)
    json: bool = False
    """Print the plan as one JSON document on standard output."""

    def run(self) -> None:
        """Plans and prints."""
        if self.num_gpus != 1:
            self._check_several()
        self._check_used()
        if self.foreign is not None:
            from resnet_bk.cli.plan_foreign import plan_foreign

            if (self.micro_batch_size or 0) > self.batch_size:
                raise UserError(
                    f"micro_batch_size {self.micro_batch_size} is more than batch_size {self.batch_size}; lower it"
                )
            rows = self.micro_batch_size or self.batch_size
            device, length = self.planned_device(), self.sequence_length
            plan_foreign(self.foreign, rows, length, self.budget(), device, as_json=self.json)
        elif self.ladder:
            from resnet_bk.cli.plan_ladder import plan_ladder

            shape = (self.batch_size, self.sequence_length)
            plan_ladder(self.planned_device(), *shape, figure=self.figure, as_json=self.json)
        else:
            self._plan()

    def _check_several(self) -> None:
        others = {"--model": self.foreign is not None, "--ladder": self.ladder, "--verify": self.verify}
        for name, wanted in others.items():
            if wanted:
                raise UserError(
                    f"--num-gpus shares a preset's training out, and {name} does not; leave one of them out"
                )
        if self.planned_device().machine.kind != "cuda":
            raise UserError(
                "--num-gpus is for GPUs and the device is a CPU; name a card with --device, or leave --num-gpus out"
            )

    def _check_used(self) -> None:
        """Nothing is given that would have no effect."""
        fields = [f"--{name.replace('_', '-')}" for name in given(self.model)]
        of_presets = dict.fromkeys(fields, True) | {
            "--preset": self.preset != PlanCommand.preset,
            "--explain": self.explain,
            "--verify": self.verify,
        }
        of_steps = {
            "--gpu-memory": self.gpu_memory is not None,
            "--host-memory": self.host_memory is not None,
            "--micro-batch-size": self.micro_batch_size is not None,
        }
        figure = {"--figure": self.figure is not None}
        unused, what, mend = figure, "a plan of one model", "add --ladder, or leave it out"
        if self.foreign is not None:
            unused, what, mend = of_presets | figure | {"--ladder": self.ladder}, "--model", "leave one out"
        elif self.ladder:
            unused, what, mend = of_presets | of_steps, "--ladder", "leave one out"
        for name, is_given in unused.items():
            if is_given:
                raise UserError(f"{name} has no effect on {what}; {mend}")

    def budget(self) -> "Budget":
        """What was said of memory; of a device that was named, all it has."""
        from resnet_bk.memory.plan import Budget

        device = self.planned_device()
        if self.gpu_memory == "auto" and device.machine.kind != "cuda":
            raise UserError(
                "--gpu-memory auto asks for a GPU and there is none here; give an amount, like 12GB, or --device with "
                "the name of a card"
            )
        amounts = Budget.parse(None if self.gpu_memory == "auto" else self.gpu_memory, self.host_memory)
        gpu_bytes, host_bytes = amounts.gpu_bytes, amounts.host_bytes
        if self.device is not None or self.gpu_memory == "auto" or self.num_gpus != 1:
            if gpu_bytes is None and device.machine.kind == "cuda":
                gpu_bytes = device.memory_bytes
            if host_bytes is None:
                host_bytes = device.host_bytes
        return Budget(gpu_bytes=gpu_bytes, host_bytes=host_bytes)

    def planned_device(self) -> "Device":
        """The device that was named; else the card at hand, or an H100 where there is none. A preset's training, by
        one process, is held to the budget, and finds of the card what the driver then leaves."""
        device, held = self._card(), self.gpu_memory is not None and not self.foreign and self.num_gpus == 1
        return device.held_to_a_budget() if held else device

    def _card(self) -> "Device":
        import torch

        from resnet_bk.planner.devices import DEVICES, device_named

        if self.device is not None:
            return device_named(self.device)
        if torch.cuda.is_available() or self.gpu_memory == "auto":
            return device_named("auto")
        return DEVICES[ASSUMED]

    def _plan(self) -> None:
        from resnet_bk.cli import plan_tables as tables

        config, training, budget, device = self._config(), self._training(), self.budget(), self.planned_device()
        plan = self._by_formula(config, training, budget)
        predictions, refusal = self._searched(config, training, budget)
        if self.json:
            print_json(self._document(config, training, budget, plan, predictions) | refusal)
            return
        self._introduce(config, training, plan)
        if predictions:
            tables.print_choice(predictions[0], budget, self._command(predictions[0], budget))
        if refusal:
            tables.print_refusal(**refusal)
        result_console.print(tables.parameter_table(plan))
        if self.preset == "seed" and not given(self.model):
            result_console.print(tables.seed_table(plan))
        tables.print_weights(plan)
        result_console.print(tables.activation_table(plan))
        if device.machine.kind == "cuda":
            result_console.print(tables.strategy_table(plan, device, budget))
        for prediction in predictions:
            if self.explain:
                tables.print_explanation(config, prediction)
        if self.verify:
            tables.print_verification(*self._verified(config, training))
        if not predictions and not refusal:
            result_console.print("Give --gpu-memory, --host-memory or --device to have the fastest way that fits.")

    def _by_formula(self, config: "ResNetBKConfig", training: "TrainingConfig", budget: "Budget") -> "Plan":
        """Every strategy on a GPU. On a CPU, of which formulas know nothing, they have no verdict on the budget."""
        from resnet_bk.memory.plan import Budget, Libraries, make_plan
        from resnet_bk.planner.footprint import workspace_bytes
        from resnet_bk.training.strategy import training_shape

        device, shape = self.planned_device(), training_shape(training)
        if device.machine.kind == "cpu":
            return make_plan(config, shape, Budget())
        libraries = Libraries(
            context_bytes=device.context_bytes,
            cublas_bytes=workspace_bytes(device.machine, small=device.small_workspaces),
        )
        return make_plan(config, shape, budget, libraries)

    def _config(self) -> "ResNetBKConfig":
        from resnet_bk.models import ResNetBKConfig

        try:
            config = ResNetBKConfig.from_preset(self.preset, **given(self.model))
        except ValueError as error:
            raise UserError(str(error)) from None
        limit = config.max_position_embeddings
        if limit is not None and self.sequence_length > limit:
            raise UserError(
                f"sequence_length {self.sequence_length} is more than preset {self.preset}'s position table of "
                f"{limit}; shorten it, or choose a preset without a table"
            )
        return config

    def _training(self) -> "TrainingConfig":
        from resnet_bk.training.config import TrainingConfig

        return TrainingConfig(
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            micro_batch_size=self.micro_batch_size,
            max_grad_norm=self.max_grad_norm or None,
        )

    def _searched(
        self, config: "ResNetBKConfig", training: "TrainingConfig", budget: "Budget"
    ) -> "tuple[list[Prediction], dict[str, Any]]":
        """The fastest way that fits the budget; without a budget, if asked to explain, mixed precision. Where nothing
        fits, why, and what would."""
        from resnet_bk.planner.predict import predict
        from resnet_bk.planner.search import (
            NothingFitsError,
            choose_ranks,
            choose_training,
            numbers_of_gpus,
            what_would_fit,
        )

        device = self.planned_device()
        if budget.gpu_bytes is not None or budget.host_bytes is not None:
            fixed = {"micro_batch_size"} if self.micro_batch_size is not None else set()
            try:
                if self.num_gpus == "auto":
                    return [choose_ranks(config, training, budget, device, fixed=fixed)], {}
                return [choose_training(config, training, budget, device, fixed=fixed, ranks=self.num_gpus)], {}
            except NothingFitsError as error:
                ranks = numbers_of_gpus(training)[-1] if self.num_gpus == "auto" else self.num_gpus
                would_fit = what_would_fit(config, training, budget, device, ranks=ranks)
                return [], {"refusal": str(error), "would_fit": would_fit}
        if not self.explain:
            return [], {}
        half: Precision = "fp32" if device.machine.kind == "cpu" else "bf16" if device.has_bf16 else "fp16"
        return [predict(config, replace(training, precision=half), device)], {}

    def _verified(self, config: "ResNetBKConfig", training: "TrainingConfig") -> Any:
        """A prediction for the present device, and a real step there."""
        from resnet_bk.memory.limits import check_training_fits
        from resnet_bk.planner.devices import device_named
        from resnet_bk.planner.predict import predict
        from resnet_bk.planner.verify import verify_training
        from resnet_bk.training.step import choose_device
        from resnet_bk.training.strategy import strategy_of, training_shape

        device = choose_device("auto")
        check_training_fits(config, training_shape(training), strategy_of(training), device=device)
        remark(f"running two steps on {device.type} ...")
        return predict(config, training, device_named("auto")), verify_training(config, training, device)

    def _introduce(self, config: "ResNetBKConfig", training: "TrainingConfig", plan: "Plan") -> None:
        result_console.print(
            f"preset {self.preset}, mixer {config.mixer}{local_attention_in_words(config)}: "
            f"{plan.counts.total:,} parameters, {plan.counts.active:,} active per token; "
            f"a step of {training.batch_size} x {training.sequence_length} = {training.tokens_per_step:,} tokens",
            soft_wrap=True,
        )
        if self.device is None and self.planned_device().name == ASSUMED:
            result_console.print(f"GPU figures are for an {ASSUMED}; --device plans for another", style="dim")
        if not config.causal:
            result_console.print("causal=False: tokens read the future; a loss of this model is a leak, not skill")

    def _command(self, prediction: "Prediction", budget: "Budget") -> str:
        """What to type to train so; flags that are defaults are left out."""
        from resnet_bk.training.config import TrainingConfig

        chosen, ranks = prediction.training, prediction.ranks
        program = ["resnet-bk"] if ranks == 1 else ["torchrun", "--nproc-per-node", str(ranks), "-m", "resnet_bk"]
        words = [*program, "train", "--preset", self.preset]
        for name, value in given(self.model).items():
            words += [f"--{name.replace('_', '-')}", "none" if value is None else str(value)]
        default = asdict(TrainingConfig())
        for name, value in asdict(chosen).items():
            if value != default[name]:
                words += [f"--{name.replace('_', '-')}", "none" if value is None else str(value)]
        if self.gpu_memory is not None and budget.gpu_bytes is not None:
            words += ["--gpu-memory", f"{budget.gpu_bytes}B" if self.gpu_memory == "auto" else self.gpu_memory]
            if ranks > 1:
                words += ["--strategy", "given"]  # each of them would search ways for a single GPU
        if self.host_memory is not None and ranks == 1:
            words += ["--host-memory", self.host_memory]
        if prediction.device.machine.kind == "cpu":
            words += ["--device", "cpu"]
        return shlex.join([*words, "--out", f"runs/{self.preset}"])

    def _document(
        self,
        config: "ResNetBKConfig",
        training: "TrainingConfig",
        budget: "Budget",
        plan: "Plan",
        predictions: "list[Prediction]",
    ) -> dict[str, Any]:
        from resnet_bk.cli.plan_tables import explanation_document, prediction_document, verification_document
        from resnet_bk.training.strategy import training_shape

        chosen = predictions[0] if predictions else None
        best = plan.fastest_that_fits
        document: dict[str, Any] = {
            "preset": self.preset,
            "model": config.own_fields(),
            "shape": asdict(training_shape(training)),
            "budget": asdict(budget),
            "device": self.planned_device().name,
            "context_bytes": self.planned_device().context_bytes,
            "num_gpus": self.num_gpus,
            "parameters": asdict(plan.counts),
            "weight_bytes": plan.weight_bytes,
            "activations": [asdict(part) for part in plan.activations],
            "half_activations": [asdict(part) for part in plan.half_activations],
            "strategies": [{**asdict(strategy), "fits": strategy.fits} for strategy in plan.strategies],
            "fastest_that_fits": best.strategy.name if best else None,
            "chosen": None
            if chosen is None
            else {**prediction_document(chosen), "command": self._command(chosen, budget)},
        }
        if self.explain and chosen is not None:
            document["explanation"] = explanation_document(config, chosen)
        if self.verify:
            document["verified"] = verification_document(*self._verified(config, training))
        return document
