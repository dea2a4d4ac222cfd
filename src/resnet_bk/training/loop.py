"""The training loop: steps, evaluations, checkpoints; and what Ctrl-C does to it."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resnet_bk.errors import UserError
from resnet_bk.frugal.micro_batches import MicroBatches
from resnet_bk.frugal.optimizer import OffloadedAdamW
from resnet_bk.memory.limits import is_out_of_memory
from resnet_bk.training.checkpoint import TrainingState, prune_checkpoints, save_checkpoint
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.data import TokenDataset, training_batch
from resnet_bk.training.distributed import ALONE, World
from resnet_bk.training.evaluate import Evaluation, evaluate
from resnet_bk.training.metrics import MetricsLog
from resnet_bk.training.run import Run
from resnet_bk.training.step import StepResult, train_step
from resnet_bk.training.strategy import PreparedTraining

Observer = Callable[[dict[str, Any]], None]


class TrainingInterruptedError(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came; the state was saved first."""


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """How a run ended. Losses in nats per token; ``seconds`` is the run's whole wall-clock time."""

    step: int
    seconds: float
    checkpoint: Path
    validation: Evaluation


class Trainer:
    """Takes a run from one step to its last.

    ``observer`` hears of every step: ``{"step": s}`` alone, or with what ``metrics.jsonl`` got at logged steps. Of
    several ranks, all of which train, rank 0 writes.
    """

    def __init__(
        self,
        *,
        run: Run,
        prepared: PreparedTraining,
        device: torch.device,
        dataset: TokenDataset,
        observer: Observer,
        world: World = ALONE,
    ) -> None:
        self.run, self.device, self.dataset, self.observer = run, device, dataset, observer
        self.model, self.optimizer, self.scaler = prepared.model, prepared.optimizer, prepared.scaler
        self.by_block = prepared.by_block
        if self.by_block is not None:
            self.by_block.on_unrecorded = lambda why: observer({"no_cuda_graphs": why})
        self.config: TrainingConfig = run.config.training
        self.world = world
        rows = self.config.batch_size // world.size
        self.micro_batches = MicroBatches(
            min(self.config.micro_batch_size or rows, rows),
            # Of several ranks, one that tried again alone would leave the others waiting.
            is_out_of_memory=is_out_of_memory if world.size == 1 else lambda _: False,
            on_smaller=lambda rows: observer({"micro_batch_size": rows}),
        )

    def train(self, start: TrainingState) -> TrainingSummary:
        """Runs to the last step and returns how it ended.

        Raises:
            UserError: the loss stopped being a number, or a checkpoint could not be written; the last one is whole.
            TrainingInterruptedError: Ctrl-C; the state is saved.
        """
        self._prune()
        began = time.perf_counter() - start.seconds
        self.model.train()
        with (
            self._metrics_log(start.step) as metrics,
            stop_requests() as stop_requested,
        ):
            last_logged = start
            for step in range(start.step, self.config.steps):
                result = self._step(step)
                state = TrainingState(step=step + 1, seconds=time.perf_counter() - began)
                if self._due(state.step, self.config.log_every):
                    self._log(metrics, result, state, last_logged)
                    last_logged = state
                else:
                    self.observer({"step": state.step})
                if self._due(state.step, self.config.eval_every):
                    evaluation = self._evaluate(metrics, state, self.config.eval_tokens)
                if self.world.any(stop_requested()) and state.step < self.config.steps:
                    path = self._save(result, state)
                    raise TrainingInterruptedError(
                        f"interrupted after step {state.step}; saved {path}; go on with --resume {self.run.folder}"
                    )
                if self._due(state.step, self.config.save_every):
                    path = self._save(result, state)
            # The last step's was of everything, if there is no more.
            is_whole = evaluation.tokens < self.config.eval_tokens
            return TrainingSummary(
                step=state.step,
                seconds=state.seconds,
                checkpoint=path,
                validation=evaluation if is_whole else self._evaluate(metrics, state, None),
            )

    def _step(self, step: int) -> StepResult:
        return train_step(
            self.model,
            self.optimizer,
            self.scaler,
            self._batches(step),
            self.config,
            step,
            device=self.device,
            micro_batches=self.micro_batches,
            by_block=self.by_block,
            world=self.world,
        )

    def _batches(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        count = self.config.gradient_accumulation_steps
        for micro_step in range(count):
            batch = training_batch(
                self.dataset.train.tokens,
                batch_size=self.config.batch_size,
                sequence_length=self.config.sequence_length,
                seed=self.config.seed,
                step=step * count + micro_step,
            )
            rows = self.world.rows(self.config.batch_size)
            yield batch[0][rows], batch[1][rows]

    def _due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.config.steps

    def _log(self, metrics: MetricsLog | None, result: StepResult, state: TrainingState, last: TrainingState) -> None:
        loss = self._checked_loss(result, state)
        seconds = max(state.seconds - last.seconds, 1e-9)
        load = result.expert_load
        entry = {
            "step": state.step,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "learning_rate": result.learning_rate,
            "grad_norm": self._grad_norm(result),
            "tokens": state.step * self.config.tokens_per_step,
            "tokens_per_second": (state.step - last.step) * self.config.tokens_per_step / seconds,
            "seconds": state.seconds,
            "expert_load_max": float(load.max()),
            "expert_load_min": float(load.min()),
            "expert_load": [[round(share, 4) for share in layer] for layer in load.tolist()],
            "loss_scale": self.scaler.get_scale() if self.scaler.is_enabled() else None,
        }
        self._record(metrics, entry)

    def _evaluate(self, metrics: MetricsLog | None, state: TrainingState, max_tokens: int | None) -> Evaluation:
        evaluation = evaluate(
            self.model,
            self.dataset.validation.tokens,
            batch_size=self.micro_batches.rows * self.world.size,
            sequence_length=self.config.sequence_length,
            max_tokens=max_tokens,
            precision=self.config.precision,
            device=self.device,
            world=self.world,
        )
        entry = {
            "step": state.step,
            "validation_loss": evaluation.loss,
            "validation_tokens": evaluation.tokens,
            "seconds": state.seconds,
        }
        self._record(metrics, entry)
        return evaluation

    def _metrics_log(self, first_step: int) -> AbstractContextManager[MetricsLog | None]:
        return MetricsLog(self.run.metrics_file, first_step=first_step) if self.world.is_main else nullcontext()

    def _record(self, metrics: MetricsLog | None, entry: dict[str, Any]) -> None:
        if metrics is not None:
            metrics.append(entry)
        self.observer(entry)

    def _prune(self) -> None:
        if self.world.is_main:
            prune_checkpoints(self.run.checkpoint_folder, self.config.keep_checkpoints)

    def _save(self, result: StepResult, state: TrainingState) -> Path:
        self._checked_loss(result, state)
        path = save_checkpoint(self.run.checkpoint_folder, self.model, self.optimizer, self.scaler, state, self.world)
        self._prune()
        return path

    def _checked_loss(self, result: StepResult, state: TrainingState) -> float:
        """The loss, unless it or the update is no number: then nothing is saved over what was good."""
        loss = float(result.cross_entropy)
        overflow_is_expected = self.scaler.is_enabled()
        if not math.isfinite(loss) or not (overflow_is_expected or math.isfinite(self._grad_norm(result))):
            raise UserError(
                f"the loss or its gradient is not a number at step {state.step}; lower --learning-rate in a new run "
                f"(the last good checkpoint is {self.run.latest_checkpoint()})"
            )
        return loss

    def _grad_norm(self, result: StepResult) -> float:
        if result.grad_norm is not None:
            return float(result.grad_norm)
        assert isinstance(self.optimizer, OffloadedAdamW)
        return self.optimizer.norm_in_backward()


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C or SIGTERM only asks to stop after the step in hand; a second one acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked: list[int] = []

    def remember(number: int, _frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
