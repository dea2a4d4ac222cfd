"""Section 4: what contestants learn from the same tokens in the same order.

A cell is one training run. Runs of one seed see the same batches and are evaluated on the same held-out tokens;
evaluation is not timed. Where the profile has learning rates, each arm is trained with several at the first seed and
keeps the one with the lowest validation loss for all seeds; elsewhere each arm has a fixed rate and nothing is tuned.
What is claimed is claimed of a test text that nothing was chosen on. One arm reads its own targets on purpose: its loss
shows what a leak looks like.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resnet_bk.bench.cells import Cell, Outcomes, result_of
from resnet_bk.bench.contestants import BASELINE, bk_contestant, build_model
from resnet_bk.bench.profiles import rate_of, rates_to_try, rounded_rate
from resnet_bk.bench.reading import WINDOW_TIMES, finite, losses_by_window, mean_loss, windows_of
from resnet_bk.bench.seeds import compare
from resnet_bk.bench.setup import Setup
from resnet_bk.bench.subject import language_model_loss, synchronizer
from resnet_bk.errors import UserError
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.ops.loss import IGNORE_INDEX
from resnet_bk.schema import Arm, Comparison, ConvergenceResult, CurvePoint, LossDifference, SweepPoint, WindowLoss
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.data import TokenDataset, training_batch, unigram_entropy
from resnet_bk.training.data.dataset import Tokens
from resnet_bk.training.micro_step import autocast, moved, seed_micro_step
from resnet_bk.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from resnet_bk.training.step import build_scaler, train_step

NAME = "convergence"
RESULT = Arm
BLEND, BIDIRECTIONAL = "blend", "bidirectional"
TRAIN_POINTS = 50
SPIKE_WINDOW = 20  # steps whose median a jump of the training loss is told from
DOCUMENT_SEARCH = 0.1  # of the held-out tokens, around their middle
STEP_SECONDS = {"resolvent": 0.17, "attention": 0.12, "bk": 0.07, BLEND: 0.07, BIDIRECTIONAL: 0.07}
STEP_TOKENS = 20 * 128  # of those seconds, at preset seed on two CPU cores; only for the time that is left
START_SECONDS = 4.0


def held_out(dataset: TokenDataset) -> tuple[Tokens, Tokens]:
    """The held-out tokens in two contiguous parts of about equal size, ``(validation, test)``, 1-D.

    They meet between two documents if there is such a place near the middle. No token is a target in both.

    Raises:
        UserError: there are too few.
    """
    tokens = dataset.validation.tokens
    if len(tokens) < 4:
        raise UserError(
            f"{len(tokens)} held-out tokens cannot be parted into validation and test; give more text or a larger "
            "--validation-fraction"
        )
    cut = _document_border(tokens, dataset.tokenizer.end_of_text_id)
    return tokens[:cut], tokens[cut:]


def cells(setup: Setup, outcomes: Outcomes) -> list[Cell]:
    """The sweeps of all arms first, then other seeds of those whose best rate is known."""
    entrants = _entrants(setup)
    sweeps = [_cell(entrant, rate, None, setup) for entrant in entrants for rate in _swept_rates(entrant, outcomes)]
    runs = []
    for entrant in entrants:
        rate = _best_rate(entrant, outcomes)
        if rate is not None:
            seeds = entrant.seeds[1:] if entrant.rates and not entrant.swept_at_once else entrant.seeds
            runs += [_cell(entrant, rate, seed, setup) for seed in seeds]
    return sweeps + runs


def measure(setup: Setup, cell: Cell) -> Arm:
    """One run. Its test loss is there in any case, as any run of a sweep may become the one that counts."""
    entrant = next(found for found in _entrants(setup) if found.key == cell.arguments["key"])
    training = _training(setup, cell.arguments["learning_rate"], cell.arguments["seed"])
    return _Run(entrant, training, setup).whole()


def assemble(setup: Setup, outcomes: Outcomes) -> ConvergenceResult | None:
    """Runs whose rate is settled, the sweeps so far, and what may be said of all seeds."""
    if not outcomes:
        return None
    entrants = _entrants(setup)
    arms = [arm for entrant in entrants for arm in _arms(entrant, outcomes)]
    differences, gradient = _differences(setup, entrants, arms)
    training = _training(setup, 1.0, setup.profile.seeds[0])
    validation, test = (
        _evaluated(tokens, training, setup.profile.evaluated_tokens) for tokens in held_out(setup.dataset)
    )
    return ConvergenceResult(
        steps=training.steps,
        tokens_per_step=training.tokens_per_step,
        seeds=list(setup.profile.seeds),
        learning_rates=sorted({rate for entrant in entrants for rate in _swept_rates(entrant, outcomes)}),
        validation_tokens=len(validation),
        test_tokens=len(test),
        unigram_entropy=unigram_entropy(test),
        arms=arms,
        sweep=[point for entrant in entrants for point in _sweep_points(entrant, outcomes)],
        differences=differences,
        gradient_difference=gradient,
        failures={
            name: outcome.status.failure for name, outcome in outcomes.items() if outcome.status.failure is not None
        },
    )


def learn(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batch: tuple[Tensor, Tensor],
    training: TrainingConfig,
    step: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """One training step of any language model: its cross-entropy, and its gradient's norm before clipping.

    Ours take the step that trains them everywhere. Others get an equal one: the same batch, schedule, precision,
    clipping and random numbers.
    """
    if isinstance(model, ResNetBKForCausalLM):
        result = train_step(model, optimizer, scaler, [batch], training, step)
        assert result.grad_norm is not None
        return result.cross_entropy.detach(), result.grad_norm.detach()
    set_learning_rate(optimizer, learning_rate(training, step))
    optimizer.zero_grad(set_to_none=True)
    seed_micro_step(training.seed, step, 0)
    input_ids, targets = (moved(tokens, device) for tokens in batch)
    with autocast(device, training.precision):
        loss = language_model_loss(model, input_ids, targets)
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm or math.inf)
    scaler.step(optimizer)
    scaler.update()
    return loss.detach(), norm.detach()


def largest_jump(losses: list[float]) -> float | None:
    """The largest rise of a step's loss over the median of the ``SPIKE_WINDOW`` before it; None of too few steps."""
    rises = [
        losses[place] - statistics.median(losses[place - SPIKE_WINDOW : place])
        for place in range(SPIKE_WINDOW, len(losses))
    ]
    return max(rises, default=None)


@dataclass(frozen=True, kw_only=True)
class _Entrant:
    """What is trained: a contestant, or a variant of one. Without ``rates`` to try it has ``fixed_rate``.

    The best run of a sweep is the first seed's, unless others ran beside it: then that seed is trained again, alone.
    """

    key: str
    label: str
    kind: str | None
    config: ResNetBKConfig | None
    build: Callable[[int], nn.Module]
    rates: tuple[float, ...]
    fixed_rate: float
    seeds: tuple[int, ...]
    extensions: int
    swept_at_once: bool

    @property
    def leaks(self) -> bool:
        return self.config is not None and not self.config.causal


def _entrants(setup: Setup) -> list[_Entrant]:
    found = [
        _entrant(setup, key, contender.label, contender.config, contender.with_seed)
        for key, contender in setup.contenders.items()
    ]
    if key := bk_contestant(setup.configs):
        exact, label = setup.configs[key], setup.contenders[key].label
        for variant, words, changes in (
            (BLEND, "analytic gradient", {"bk_grad": "blend"}),
            (BIDIRECTIONAL, "bidirectional", {"causal": False}),
        ):
            config = ResNetBKConfig(**{**exact.own_fields(), **changes})
            found.append(_entrant(setup, variant, f"{label} ({words})", config, partial(build_model, config)))
    return found


def _entrant(
    setup: Setup, key: str, label: str, config: ResNetBKConfig | None, build: Callable[[int], nn.Module]
) -> _Entrant:
    # A learning rate depends on the mixer, or on what was changed about it.
    kind = None if config is None else key if key in (BLEND, BIDIRECTIONAL) else config.mixer
    width = None if config is None else config.hidden_size
    # A loss that is a leak is compared with nothing: one run shows it.
    leaks = config is not None and not config.causal
    profile = setup.profile
    return _Entrant(
        key=key,
        label=label,
        kind=kind,
        config=config,
        build=build,
        rates=() if leaks else tuple(rates_to_try(profile, kind, width)),
        fixed_rate=rate_of(kind, width),
        seeds=profile.seeds[:1] if leaks else profile.seeds,
        extensions=profile.sweep_extensions,
        swept_at_once=setup.at_once > 1,
    )


def _sweep_name(entrant: _Entrant, rate: float) -> str:
    return f"sweep/{entrant.key}/{rate:g}"


def _run_name(entrant: _Entrant, rate: float, seed: int) -> str:
    # With the rate: a sweep that is mended later may settle on another one, and then this run does not count.
    return f"run/{entrant.key}/{rate:g}/seed-{seed}"


def _cell(entrant: _Entrant, rate: float, seed: int | None, setup: Setup) -> Cell:
    """A run of the sweep if ``seed`` is None."""
    profile, training = setup.profile, setup.training
    step = STEP_SECONDS[entrant.kind or "attention"] * training.batch_size * training.sequence_length / STEP_TOKENS
    passes = profile.evaluations + 3 + len(WINDOW_TIMES)
    evaluated = passes * profile.evaluated_tokens / STEP_TOKENS / 3  # a third of a step's work
    return Cell(
        section=NAME,
        name=_sweep_name(entrant, rate) if seed is None else _run_name(entrant, rate, seed),
        arguments={
            "key": entrant.key,
            "learning_rate": rate,
            "seed": entrant.seeds[0] if seed is None else seed,
        },
        weight=START_SECONDS + step * profile.convergence_steps + STEP_SECONDS[entrant.kind or "attention"] * evaluated,
        timed=seed is not None or not entrant.swept_at_once,
    )


def _swept_rates(entrant: _Entrant, outcomes: Outcomes) -> list[float]:
    """What the sweep is known to need by now: its rates, and beyond an end that turned out best."""
    rates = list(entrant.rates)
    for _ in range(entrant.extensions):
        best = _best_of(entrant, rates, outcomes)
        if best is None or len(rates) < 2 or best not in (rates[0], rates[-1]):
            break
        if best == rates[-1]:
            rates.append(rounded_rate(best * rates[-1] / rates[-2]))
        else:
            rates.insert(0, rounded_rate(best * rates[0] / rates[1]))
    return rates


def _best_of(entrant: _Entrant, rates: list[float], outcomes: Outcomes) -> float | None:
    """The rate with the lowest validation loss; None until all have been tried, and where none gave a number."""
    if not all(_sweep_name(entrant, rate) in outcomes for rate in rates):
        return None
    losses = {rate: _last(result_of(outcomes, _sweep_name(entrant, rate))) for rate in rates}
    finite = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(finite, key=finite.__getitem__) if finite else None


def _best_rate(entrant: _Entrant, outcomes: Outcomes) -> float | None:
    return _best_of(entrant, _swept_rates(entrant, outcomes), outcomes) if entrant.rates else entrant.fixed_rate


def _last(arm: Arm | None) -> float | None:
    return None if arm is None else arm.validation[-1].loss


def _arms(entrant: _Entrant, outcomes: Outcomes) -> Iterator[Arm]:
    """By seed."""
    rate = _best_rate(entrant, outcomes)
    if rate is None:
        return
    names = [_run_name(entrant, rate, seed) for seed in entrant.seeds]
    if entrant.rates and not entrant.swept_at_once:
        names[0] = _sweep_name(entrant, rate)
    for name in names:
        if (arm := result_of(outcomes, name)) is not None:
            yield arm


def _sweep_points(entrant: _Entrant, outcomes: Outcomes) -> Iterator[SweepPoint]:
    for rate in _swept_rates(entrant, outcomes):
        outcome = outcomes.get(_sweep_name(entrant, rate))
        if outcome is not None:
            yield SweepPoint(
                key=entrant.key,
                label=entrant.label,
                learning_rate=rate,
                loss=_last(outcome.result),
                failure=outcome.status.failure,
            )


def _differences(
    setup: Setup, entrants: list[_Entrant], arms: list[Arm]
) -> tuple[list[LossDifference], Comparison | None]:
    """The baseline less each contestant, and the analytic gradient less the exact one: one family of comparisons."""
    losses = {entrant.key: {arm.seed: arm.test_loss for arm in arms if arm.key == entrant.key} for entrant in entrants}
    labels = {entrant.key: entrant.label for entrant in entrants}
    pairs = {
        key: (losses[BASELINE], losses[key])
        for key in setup.contenders
        if key != BASELINE and BASELINE in losses and not next(e for e in entrants if e.key == key).leaks
    }
    if exact := bk_contestant(setup.configs):
        pairs[BLEND] = (losses[BLEND], losses[exact])
    found = compare(pairs)
    gradient = found.pop(BLEND, None)
    return [LossDifference(key=key, label=labels[key], difference=each) for key, each in found.items()], gradient


def _training(setup: Setup, rate: float, seed: int) -> TrainingConfig:
    steps = setup.profile.convergence_steps
    return replace(
        setup.training,
        steps=steps,
        decay_steps=steps,
        warmup_steps=max(1, steps // 10),
        learning_rate=rate,
        seed=seed,
    )


class _Run:
    """Trains and evaluates one model. A loss that is not a number ends it: that is a result."""

    def __init__(self, entrant: _Entrant, training: TrainingConfig, setup: Setup) -> None:
        self._entrant, self._training = entrant, training
        self._profile, self._device = setup.profile, setup.device
        self._tokens = setup.dataset.train.tokens
        self._validation, self._test = held_out(setup.dataset)
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._seconds = 0.0

    def whole(self) -> Arm:
        """From fresh weights to the test loss."""
        self._warm_up()
        self._begin()
        steps, evaluations = self._training.steps, self._profile.evaluations
        evaluate_at = {round(steps * place / evaluations) for place in range(1, evaluations + 1)}
        logged_at = {round(steps * place / TRAIN_POINTS) for place in range(1, TRAIN_POINTS + 1)} - {0}
        train: list[CurvePoint] = []
        validation = [self._point(0, self._evaluate(self._validation))]
        for first, last in pairwise(sorted({0, steps} | logged_at | evaluate_at)):
            losses, norms = self._steps(first, last)
            train.append(self._point(last, statistics.fmean(losses), statistics.fmean(norms)))
            if not all(map(math.isfinite, losses)):
                validation.append(self._point(last, math.nan))
                break
            if last in evaluate_at:
                validation.append(self._point(last, self._evaluate(self._validation)))
        ended_well = validation[-1].loss is not None
        return Arm(
            key=self._entrant.key,
            label=self._entrant.label,
            seed=self._training.seed,
            learning_rate=self._training.learning_rate,
            leaks=self._entrant.leaks,
            parameters=sum(parameter.numel() for parameter in self._model.parameters()),
            train=train,
            validation=validation,
            test_loss=finite(self._evaluate(self._test)) if ended_well else None,
            by_window=self._by_window() if ended_well and not self._entrant.leaks else [],
            largest_jump=largest_jump([loss for loss in self._losses if math.isfinite(loss)]),
            largest_gradient_norm=max(self._norms) if all(map(math.isfinite, self._norms)) else None,
        )

    def _warm_up(self) -> None:
        """What compiles or loads at a first step is done before the clock runs, on weights that are thrown away."""
        self._begin()
        self._steps(0, 1)
        del self._model, self._optimizer
        self._losses, self._norms, self._seconds = [], [], 0.0

    def _begin(self) -> None:
        self._model = self._entrant.build(self._training.seed).to(self._device).train()
        self._optimizer = build_optimizer(self._model, self._training)
        self._scaler = build_scaler(self._device, self._training.precision)

    def _steps(self, first: int, last: int) -> tuple[list[float], list[float]]:
        synchronizer(self._device)()
        began = time.perf_counter()
        seen = [self._step(step) for step in range(first, last)]
        losses, norms = (torch.stack(column).float().tolist() for column in zip(*seen, strict=True))
        self._seconds += time.perf_counter() - began
        self._losses += losses
        self._norms += norms
        return losses, norms

    def _step(self, step: int) -> tuple[Tensor, Tensor]:
        training = self._training
        batch = training_batch(
            self._tokens,
            batch_size=training.batch_size,
            sequence_length=training.sequence_length,
            seed=training.seed,
            step=step,
        )
        return learn(self._model, self._optimizer, self._scaler, batch, training, step, self._device)

    def _evaluate(self, tokens: Tokens) -> float:
        windows = windows_of(tokens, self._training, self._profile.evaluated_tokens)
        return mean_loss(self._model, windows, self._training, self._device)

    def _by_window(self) -> list[WindowLoss]:
        evaluated = self._profile.evaluated_tokens
        return losses_by_window(self._model, self._test, self._training, evaluated, self._device)

    def _point(self, step: int, loss: float, gradient_norm: float | None = None) -> CurvePoint:
        return CurvePoint(
            step=step,
            tokens=step * self._training.tokens_per_step,
            seconds=self._seconds,
            loss=finite(loss),
            gradient_norm=None if gradient_norm is None else finite(gradient_norm),
        )


def _evaluated(tokens: Tokens, training: TrainingConfig, max_tokens: int) -> NDArray[np.int64]:
    """The targets of the evaluation, so that the unigram entropy is that of the same tokens."""
    targets = torch.cat([targets.flatten() for _, targets in windows_of(tokens, training, max_tokens)])
    return np.asarray(targets[targets != IGNORE_INDEX], dtype=np.int64)


def _document_border(tokens: Tokens, end_of_text: int | None) -> int:
    middle, reach = len(tokens) // 2, int(DOCUMENT_SEARCH * len(tokens))
    if end_of_text is None or not reach:
        return middle
    borders = np.flatnonzero(np.asarray(tokens[middle - reach : middle + reach]) == end_of_text) + middle - reach + 1
    return int(borders[np.abs(borders - middle).argmin()]) if borders.size else middle
