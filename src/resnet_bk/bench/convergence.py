"""Section 4: what contestants learn from the same tokens in the same order.

Every arm starts from the same seed, sees the same batches and is evaluated on the same held-out tokens; evaluation is
not timed. Where the profile has learning rates, each arm is trained with every one of them at the first seed and keeps
the one with the lowest held-out loss for all seeds; elsewhere each arm has a fixed rate and nothing is tuned. One arm
reads its own targets on purpose: its loss shows what a leak looks like.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from resnet_bk.bench.contestants import LABELS, bk_contestant, build_model
from resnet_bk.bench.profiles import Profile, fixed_rate
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.ops.loss import IGNORE_INDEX
from resnet_bk.schema import Arm, ConvergenceResult, CurvePoint
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.data import TokenDataset, evaluation_batches, training_batch, unigram_entropy
from resnet_bk.training.evaluate import evaluate
from resnet_bk.training.optimizer import build_optimizer
from resnet_bk.training.step import build_scaler, train_step

TRAIN_POINTS = 50


@dataclass(frozen=True, kw_only=True)
class _Variant:
    key: str
    label: str
    config: ResNetBKConfig

    @property
    def kind(self) -> str:
        """What a fixed learning rate depends on: the mixer, or what was changed about it."""
        return self.key if self.key in ("blend", "bidirectional") else self.config.mixer


def measure_convergence(
    configs: dict[str, ResNetBKConfig],
    training: TrainingConfig,
    dataset: TokenDataset,
    profile: Profile,
    device: torch.device,
    on_progress: Callable[[str], None],
) -> ConvergenceResult:
    """Trains every arm, with every seed."""
    training = replace(training, steps=profile.convergence_steps, decay_steps=profile.convergence_steps)
    training = replace(training, warmup_steps=max(1, profile.convergence_steps // 10))
    arms: list[Arm] = []
    for variant in _variants(configs):
        rates = profile.learning_rates or (fixed_rate(variant.kind, variant.config.hidden_size),)
        tried = [
            _train(variant, replace(training, learning_rate=rate, seed=profile.seeds[0]), dataset, profile, device)
            for rate in rates
        ]
        best = min(tried, key=_final_loss)
        arms.append(best)
        for seed in profile.seeds[1:]:
            again = replace(training, learning_rate=best.learning_rate, seed=seed)
            arms.append(_train(variant, again, dataset, profile, device))
        on_progress(f"  {variant.label}: held-out loss {_final_loss(best):.3f} after {training.steps} steps")
    evaluated = _evaluated_tokens(dataset, training, profile)
    return ConvergenceResult(
        steps=training.steps,
        tokens_per_step=training.tokens_per_step,
        seeds=list(profile.seeds),
        learning_rates=list(profile.learning_rates),
        evaluated_tokens=len(evaluated),
        unigram_entropy=unigram_entropy(evaluated),
        arms=arms,
    )


def _variants(configs: dict[str, ResNetBKConfig]) -> list[_Variant]:
    variants = [_Variant(key=key, label=LABELS[key], config=config) for key, config in configs.items()]
    if key := bk_contestant(configs):
        exact, label = configs[key], LABELS[key]
        variants += [
            _Variant(key="blend", label=f"{label} (analytic gradient)", config=_changed(exact, bk_grad="blend")),
            _Variant(key="bidirectional", label=f"{label} (bidirectional)", config=_changed(exact, causal=False)),
        ]
    return variants


def _changed(config: ResNetBKConfig, **changes: object) -> ResNetBKConfig:
    return ResNetBKConfig(**{**config.own_fields(), **changes})


def _train(
    variant: _Variant, training: TrainingConfig, dataset: TokenDataset, profile: Profile, device: torch.device
) -> Arm:
    model = build_model(variant.config, training.seed).to(device).train()
    optimizer, scaler = build_optimizer(model, training), build_scaler(device, training.precision)
    log_every = max(1, training.steps // TRAIN_POINTS)
    evaluate_at = {round(training.steps * k / profile.evaluations) for k in range(profile.evaluations + 1)}
    seconds = 0.0
    train: list[CurvePoint] = []
    validation = [_point(0, training, 0.0, _evaluate(model, dataset, training, profile))]
    for step in range(training.steps):
        began = time.perf_counter()
        batch = training_batch(
            dataset.train.tokens,
            batch_size=training.batch_size,
            sequence_length=training.sequence_length,
            seed=training.seed,
            step=step,
        )
        loss = float(train_step(model, optimizer, scaler, [batch], training, step).cross_entropy)
        seconds += time.perf_counter() - began
        done = step + 1
        if done % log_every == 0 or done == training.steps:
            train.append(_point(done, training, seconds, loss))
        if done in evaluate_at:
            validation.append(_point(done, training, seconds, _evaluate(model, dataset, training, profile)))
    return Arm(
        key=variant.key,
        label=variant.label,
        seed=training.seed,
        learning_rate=training.learning_rate,
        leaks=not variant.config.causal,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        train=train,
        validation=validation,
    )


def _evaluated_tokens(dataset: TokenDataset, training: TrainingConfig, profile: Profile) -> NDArray[np.int64]:
    """The targets of :func:`_evaluate`, so that the unigram entropy is that of the same tokens."""
    batches = evaluation_batches(
        dataset.validation.tokens,
        batch_size=training.batch_size,
        sequence_length=training.sequence_length,
        max_tokens=profile.evaluated_tokens,
    )
    targets = torch.cat([targets.flatten() for _, targets in batches])
    return np.asarray(targets[targets != IGNORE_INDEX], dtype=np.int64)


def _evaluate(model: ResNetBKForCausalLM, dataset: TokenDataset, training: TrainingConfig, profile: Profile) -> float:
    return evaluate(
        model,
        dataset.validation.tokens,
        batch_size=training.batch_size,
        sequence_length=training.sequence_length,
        max_tokens=profile.evaluated_tokens,
        precision=training.precision,
    ).loss


def _point(step: int, training: TrainingConfig, seconds: float, loss: float) -> CurvePoint:
    finite = loss if math.isfinite(loss) else None
    return CurvePoint(step=step, tokens=step * training.tokens_per_step, seconds=seconds, loss=finite)


def _final_loss(arm: Arm) -> float:
    loss = arm.validation[-1].loss
    return math.inf if loss is None else loss
