"""What must hold before anything is timed: a wrong operator, or a model that reads ahead or cannot take a step, makes
every other figure worthless."""

import math

import torch

from resnet_bk.bench.cells import Cell, Outcomes, result_of
from resnet_bk.bench.contestants import Contender
from resnet_bk.bench.setup import Setup
from resnet_bk.bench.stability import accuracy, carry_errors, causality, check
from resnet_bk.schema import Check

NAME = "gates"
RESULT = list[Check]
OPERATORS = "operators"
GATE_ERROR = 1e-4  # of float32 against complex128 at eta = 1, where about 1e-6 is expected


def cells(setup: Setup, _: Outcomes) -> list[Cell]:
    """The operators, and every contestant."""
    names = [OPERATORS, *setup.all_contenders]
    return [Cell(section=NAME, name=name, weight=3, timed=False) for name in names]


def measure(setup: Setup, cell: Cell) -> list[Check]:
    """Each has a limit."""
    return operators(setup) if cell.name == OPERATORS else contestant(setup, setup.all_contenders[cell.name])


def assemble(setup: Setup, outcomes: Outcomes) -> list[Check]:
    """All that were measured."""
    return [found for cell in cells(setup, outcomes) for found in result_of(outcomes, cell.name) or []]


def operators(setup: Setup) -> list[Check]:
    """Values and gradients in float32 against double precision."""
    point = accuracy(causal=True, length=512, eta=1.0, potential=1.0, device=setup.device)
    errors = (("values", point.value_error), ("gradients", point.gradient_error))
    found = [check(f"bk_core's {what} against complex128", error, GATE_ERROR) for what, error in errors]
    regimes = {config.resolvent_regime for config in setup.configs.values() if config.mixer == "resolvent"}
    for regime in sorted(regimes):
        pairs = zip(("values", "gradients"), carry_errors(regime, length=512, device=setup.device), strict=True)
        found += [check(f"bk_carry's {what}, {regime}, against all pairs", error, GATE_ERROR) for what, error in pairs]
    return found


def contestant(setup: Setup, contender: Contender) -> list[Check]:
    """It does not read ahead, and a training step leaves it finite."""
    key, label = contender.key, contender.label
    model = contender.with_seed(setup.training.seed)
    found = causality(model, setup.vocab_size, setup.device, contender.config)
    weaker = "" if found.dtype == "float64" else f" (in {found.dtype}, as it does not run in float64)"
    subject = setup.subject(key)
    loss = float(subject.forward().detach())
    subject.step()
    wrong = sum(int((~torch.isfinite(parameter)).sum()) for parameter in subject.model.parameters())
    return [
        check(f"{label}: no logit depends on a later token{weaker}", found.largest_change, found.limit, key),
        check(
            f"{label}: numbers that are not finite after a training step",
            float(wrong) + (0 if math.isfinite(loss) else 1),
            0.0,
            key,
        ),
    ]


def reasons_to_withhold(setup: Setup, outcomes: Outcomes) -> tuple[dict[str, str], dict[str, str]]:
    """Contestants that cannot be measured at all, and those whose speed and losses would mean nothing."""
    broken: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for key in setup.all_contenders:
        failure = outcomes[key].status.failure if key in outcomes else None
        if failure is not None:
            broken[key] = f"its gate did not end ({failure.kind}: {failure.message})"
    for found in assemble(setup, outcomes):
        if not found.passed:
            for key in [found.contestant] if found.contestant else list(setup.all_contenders):
                wrong[key] = f"a gate failed ({found.name})"
    if outcomes[OPERATORS].status.failure is not None:
        wrong = dict.fromkeys(setup.all_contenders, "the operators' gate did not end") | wrong
    return broken, wrong
