"""Section 6: errors against complex128, extremes, causality, determinism, and training in float16."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_bk.bench.cells import Cell, Outcomes, result_of
from resnet_bk.bench.contestants import Contender, bk_contestant, build_model
from resnet_bk.bench.convergence import learn
from resnet_bk.bench.profiles import rate_of
from resnet_bk.bench.setup import Setup
from resnet_bk.bench.subject import Subject, language_model_loss, logits_of, position_limit, random_tokens
from resnet_bk.memory.limits import is_out_of_memory
from resnet_bk.models import ResNetBKConfig
from resnet_bk.ops import bk_core, bk_tunnel
from resnet_bk.ops.carry import bk_carry
from resnet_bk.schema import AccuracyPoint, CausalityMeasurement, Check, HalfPrecision, StabilityResult
from resnet_bk.training.data import training_batch
from resnet_bk.training.optimizer import build_optimizer
from resnet_bk.training.step import build_scaler

NAME = "stability"
RESULT = StabilityResult
ACCURACY, EXTREMES, CONTESTANT, HALF = "accuracy", "extremes", "contestant", "half"
# In float64: moving a token changes how many an expert gets, and so the last bits of products.
CAUSALITY_LIMIT = 1e-10
SINGLE_CAUSALITY_LIMIT = 1e-4  # for models that only compute in float32
CAUSALITY_TRIALS = 5
CAUSALITY_NOISE = 0.02  # as large as weights usually begin
CAUSALITY_LENGTH = 64
ROWS, HEADS = 2, 2
DETERMINISM_STEPS = 3
EXTREME_SCALE = 1e4  # of embeddings, which are about 0.02 in size


def cells(setup: Setup, _: Outcomes) -> list[Cell]:
    """The operators twice, and every contestant twice."""
    profile = setup.profile
    points = 2 * len(profile.accuracy_lengths) * len(profile.etas) * len(profile.potentials)
    fixed = [(ACCURACY, 2 + 0.1 * points), (EXTREMES, 2.0)]
    contestants = [(f"{CONTESTANT}/{key}", 4.0) for key in setup.contenders]
    halves = [(f"{HALF}/{key}", 4 + 0.6 * profile.half_precision_steps) for key in setup.contenders]
    weights = (*fixed, *contestants, *halves)
    return [Cell(section=NAME, name=name, weight=weight, timed=False) for name, weight in weights]


def measure(setup: Setup, cell: Cell) -> StabilityResult:
    """The part of the section that this cell has; the rest is empty."""
    what, _, key = cell.name.partition("/")
    part = StabilityResult(accuracy=[], extremes=[], causality=[], determinism=[])
    if what == ACCURACY:
        return replace(part, accuracy=accuracies(setup))
    if what == EXTREMES:
        return replace(part, extremes=extremes(setup.device))
    contender = setup.contenders[key]
    if what == HALF:
        return replace(part, half_precision=[half_precision(setup, contender)])
    return replace(
        part,
        extremes=extreme_inputs(setup, contender),
        causality=_causality(setup, contender),
        determinism=[determinism(setup, contender)],
    )


def assemble(setup: Setup, outcomes: Outcomes) -> StabilityResult | None:
    """All parts that were measured, in the order of the cells."""
    parts = [part for cell in cells(setup, {}) if (part := result_of(outcomes, cell.name)) is not None]
    if not outcomes:
        return None
    return StabilityResult(
        accuracy=[point for part in parts for point in part.accuracy],
        extremes=[found for part in parts for found in part.extremes],
        causality=[row for part in parts for row in part.causality],
        determinism=[found for part in parts for found in part.determinism],
        half_precision=[row for part in parts for row in part.half_precision],
    )


def check(name: str, measured: float | None, limit: float, contestant: str | None = None) -> Check:
    """Passed if the figure is a number and at most the limit."""
    measured = None if measured is None or not math.isfinite(measured) else measured
    passed = measured is not None and measured <= limit
    return Check(name=name, measured=measured, limit=limit, passed=passed, contestant=contestant)


def accuracies(setup: Setup) -> list[AccuracyPoint]:
    """Over both forms, and the lengths, etas and potentials of the profile."""
    profile = setup.profile
    strengths = list(product(profile.etas, profile.potentials))
    return [
        point
        for causal in (True, False)
        for length in profile.accuracy_lengths
        for point in accuracies_over(strengths, causal=causal, length=length, device=setup.device)
    ]


def accuracy(*, causal: bool, length: int, eta: float, potential: float, device: torch.device) -> AccuracyPoint:
    """That of one eta and potential."""
    return accuracies_over([(eta, potential)], causal=causal, length=length, device=device)[0]


def accuracies_over(
    strengths: Sequence[tuple[float, float]], *, causal: bool, length: int, device: torch.device
) -> list[AccuracyPoint]:
    """Errors of float32 values and of the gradient of v, relative to the largest magnitude of the exact ones.

    Etas and potentials are heads of one call: the reference goes token by token, and does so on the CPU.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, length, HEADS)
    noise, weight = (
        torch.randn(shape, generator=generator),
        torch.randn(shape, generator=generator, dtype=torch.complex64),
    )
    v = torch.cat([potential * noise for _, potential in strengths], dim=-1)
    weight = weight.repeat(1, 1, len(strengths))
    z = torch.tensor([complex(0.0, eta) for eta, _ in strengths], dtype=torch.complex128).repeat_interleave(HEADS)
    found = _values_and_gradient(v.to(device), weight.to(device), z.to(device), causal, "auto")
    exact = _values_and_gradient(v.double(), weight.to(torch.complex128), z, causal, "reference")
    points = []
    for number, (eta, potential) in enumerate(strengths):
        own = slice(number * HEADS, (number + 1) * HEADS)
        errors = [_relative_error(x[..., own].cpu(), y[..., own]) for x, y in zip(found, exact, strict=True)]
        points.append(
            AccuracyPoint(
                form="causal" if causal else "bidirectional",
                sequence_length=length,
                eta=eta,
                potential=potential,
                value_error=errors[0],
                gradient_error=errors[1],
            )
        )
    return points


def carry_errors(regime: str, *, length: int, device: torch.device) -> tuple[float | None, float | None]:
    """Errors of bk_carry's float32 values and gradients, chains included, against every pair in double precision, which
    is computed on the CPU."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(ROWS, length, HEADS, 16, generator=generator) for _ in range(3))
    chain = torch.randn(ROWS, length, HEADS, generator=generator)
    weight = torch.randn(v.shape, generator=generator)

    def values_and_gradients(*, exact: bool) -> tuple[Tensor, list[Tensor]]:
        inputs = [
            (x.double() if exact else x.to(device)).requires_grad_() for x in (y.clone() for y in (q, k, v, chain))
        ]
        queries, keys, contents, potential = inputs
        log_l, angle = _decays(potential, regime, "reference" if exact else "auto")
        o = bk_carry(queries, keys, contents, log_l, angle=angle, form="quadratic" if exact else "chunked")
        assert isinstance(o, Tensor)
        gradients = torch.autograd.grad((o * weight.to(o.device)).sum(), inputs)
        return o.detach().cpu(), [gradient.cpu() for gradient in gradients]

    (found, gradients), (wanted, exact_gradients) = values_and_gradients(exact=False), values_and_gradients(exact=True)
    errors = [_relative_error(*pair) for pair in zip(gradients, exact_gradients, strict=True)]
    finite = [error for error in errors if error is not None]
    return _relative_error(found, wanted), max(finite) if len(finite) == len(errors) else None


def _decays(chain: Tensor, regime: str, backend: str) -> tuple[Tensor, Tensor | None]:
    """log|l| and, in the scattering regime, arg l."""
    if regime == "tunnelling":
        log_l = bk_tunnel(0.01 * F.softplus(chain), backend=backend)  # type: ignore[arg-type]
        assert isinstance(log_l, Tensor)
        return log_l, None
    ratio = bk_core(chain, complex(0.5, 0.5), causal=True, backend=backend)  # type: ignore[arg-type]
    assert isinstance(ratio, Tensor)
    return ratio.abs().log(), ratio.angle()


@dataclass(frozen=True, kw_only=True)
class Causality:
    """How far a token's change reached back, in which type, and what is still rounding there."""

    largest_change: float
    limit: float
    dtype: str


def causality(model: nn.Module, vocab_size: int, device: torch.device, config: ResNetBKConfig | None) -> Causality:
    """:func:`largest_change_before` where the model computes in float64, and the same in float32 where it does not."""
    try:
        change = largest_change_before(copy.deepcopy(model), vocab_size, device, config)
        return Causality(largest_change=change, limit=CAUSALITY_LIMIT, dtype="float64")
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        if config is not None or is_out_of_memory(error):
            raise
    # Whatever else is wrong with the model shows here again, with its own message.
    change = _largest_change_before(model.float(), vocab_size, device)
    return Causality(largest_change=change, limit=SINGLE_CAUSALITY_LIMIT, dtype="float32")


def largest_change_before(
    model: nn.Module, vocab_size: int, device: torch.device, config: ResNetBKConfig | None
) -> float:
    """The most that changing a token moved a logit before it, over a few random rows and places; in float64.

    In evaluation mode, and in training mode too where that draws no random numbers; with the model's weights as they
    are and with noise on them, which opens branches that begin at zero. The model is changed. NaN if any of those
    logits is not finite.

    Args:
        model: a causal language model, which :func:`logits_of` can ask.
        config: the model's if it is one of ours, for its position table.
    """
    return _largest_change_before(model.double(), vocab_size, device, config)


def _largest_change_before(
    model: nn.Module, vocab_size: int, device: torch.device, config: ResNetBKConfig | None = None
) -> float:
    model = model.to(device)
    length = _short_length(model, config)
    generator = torch.Generator().manual_seed(0)
    changes = []
    for noise in (0.0, CAUSALITY_NOISE):
        _add_noise(model, noise, generator)
        model.eval()
        changes += [_change_before(model, vocab_size, length, device, generator) for _ in range(CAUSALITY_TRIALS)]
        if _draws_nothing(model.train(), vocab_size, length, device):
            changes.append(_change_before(model, vocab_size, length, device, generator))
    return max(changes) if all(map(math.isfinite, changes)) else math.nan


def _add_noise(model: nn.Module, size: float, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(size * noise.to(parameter.device, parameter.dtype))


def _change_before(
    model: nn.Module, vocab_size: int, length: int, device: torch.device, generator: torch.Generator
) -> float:
    row = torch.randint(vocab_size, (1, length), generator=generator)
    place = int(torch.randint(length // 4, length, (), generator=generator))
    changed = row.clone()
    changed[0, place] = (changed[0, place] + 1) % vocab_size
    with torch.no_grad():
        before, after = (logits_of(model, ids.to(device))[:, :place] for ids in (row, changed))
    return float((before - after).abs().max())


def _draws_nothing(model: nn.Module, vocab_size: int, length: int, device: torch.device) -> bool:
    """Whether two passes with other random numbers are the same: with dropout or noise a change would mean nothing."""
    ids, _ = random_tokens(vocab_size, 1, length, device)
    passes = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with torch.no_grad():
            passes.append(logits_of(model, ids))
    return torch.equal(*passes)


def _short_length(model: nn.Module, config: ResNetBKConfig | None = None) -> int:
    """No more than the model's position table has."""
    return min(CAUSALITY_LENGTH, position_limit(model, config) or CAUSALITY_LENGTH)


def extremes(device: torch.device) -> list[Check]:
    """Values that leave float32 in a careless formula; the measure is how many results are not finite."""
    length = 256
    ones = torch.ones(1, length, 1, device=device)
    alternating = ones * (1 - 2 * (torch.arange(length, device=device) % 2)).view(1, -1, 1)
    cases = {
        "v = 0 in the middle of the band, eta = 1e-6": (0 * ones, 1e-6),
        "v = 1e18": (1e18 * ones, 1.0),
        "v = 1e38": (1e38 * ones, 1.0),
        "v = +-1e30 alternating": (1e30 * alternating, 1.0),
        "v = 1e-45 (subnormal)": (1e-45 * ones, 1.0),
    }
    checks = []
    for name, (v, eta) in cases.items():
        for causal in (True, False):
            values, gradient = _values_and_gradient(v, torch.ones_like(v) + 0j, complex(-2.0, eta), causal, "auto")
            form = "causal" if causal else "bidirectional"
            checks.append(_finite_check(f"bk_core {form}, {name}", [values, gradient]))
    for name, gap in (("w = 0 (memory without end)", 0 * ones), ("w = 1e38", 1e38 * ones)):
        w = gap.clone().requires_grad_()
        log_l = bk_tunnel(w)
        assert isinstance(log_l, Tensor)
        checks.append(_finite_check(f"bk_tunnel, {name}", [log_l, *_gradients(log_l, [w])]))
    return checks + _carry_extremes(length, device, alternating)


def _carry_extremes(length: int, device: torch.device, alternating: Tensor) -> list[Check]:
    """Exact results are within float32 in all of these."""
    zeros = torch.zeros(1, length, 1, device=device)
    cases = {
        "no decay (log l = 0), values of 1e30": (1.0, 1e30, zeros),
        "log l = -1e4: nothing is carried": (1.0, 1.0, zeros - 1e4),
        "log l = -1e30": (1.0, 1.0, zeros - 1e30),
        "log l = 0 and -1e4 alternating": (1.0, 1.0, -5e3 * (1 + alternating)),
        "queries and keys of 1e12, values of 1e6": (1e12, 1e6, zeros - 0.1),
    }
    checks = []
    for name, (size, value, log_l) in cases.items():
        inputs = [torch.full((1, length, 1, 16), x, device=device) for x in (size, size, value)]
        inputs = [x.requires_grad_() for x in (*inputs, log_l.clone())]
        o = bk_carry(*inputs)
        assert isinstance(o, Tensor)
        checks.append(_finite_check(f"bk_carry, {name}", [o, *_gradients(o, inputs)]))
    return checks


def extreme_inputs(setup: Setup, contender: Contender) -> list[Check]:
    """Logits and gradients of a whole model where its input is as it should not be."""
    training = setup.training

    def enlarged(model: nn.Module) -> None:
        with torch.no_grad():
            for table in [module for module in model.modules() if isinstance(module, nn.Embedding)]:
                table.weight.mul_(EXTREME_SCALE)

    cases: dict[str, tuple[Callable[[nn.Module], None], bool]] = {
        f"embeddings {EXTREME_SCALE:g} times as large": (enlarged, False),
        "one token again and again": (lambda _: None, True),
    }
    checks = []
    for name, (change, repeated) in cases.items():
        model = contender.with_seed(training.seed).to(setup.device).train()
        change(model)
        ids, targets = random_tokens(setup.vocab_size, ROWS, _short_length(model, contender.config), setup.device)
        if repeated:
            ids, targets = torch.zeros_like(ids), torch.zeros_like(targets)
        loss = language_model_loss(model, ids, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            logits = logits_of(model.eval(), ids)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        checks.append(_finite_check(f"{contender.label}, {name}", [loss, logits, *gradients], contender.key))
    return checks


def determinism(setup: Setup, contender: Contender) -> Check:
    """Weights that differ between two runs of a few steps."""
    runs = []
    for _ in range(2):
        model = contender.with_seed(setup.training.seed)
        batch = random_tokens(setup.vocab_size, ROWS, _short_length(model, contender.config), setup.device)
        subject = Subject.of(model, setup.training, batch)
        for step in range(DETERMINISM_STEPS):
            torch.manual_seed(step)
            subject.step()
        runs.append([parameter.detach() for parameter in subject.model.parameters()])
    different = sum(int((a != b).sum()) for a, b in zip(*runs, strict=True))
    return check(
        f"{contender.label}: weights that differ between two runs of {DETERMINISM_STEPS} steps",
        float(different),
        0.0,
        contender.key,
    )


def half_precision(setup: Setup, contender: Contender) -> HalfPrecision:
    """Training on the text in float16 with dynamic loss scaling, at the rate that is used where none is tuned."""
    steps, config = setup.profile.half_precision_steps, contender.config
    rate = rate_of(None, None) if config is None else rate_of(config.mixer, config.hidden_size)
    training = replace(setup.training, precision="fp16", learning_rate=rate, steps=steps, decay_steps=steps)
    training = replace(training, warmup_steps=max(1, steps // 10))
    model = contender.with_seed(training.seed).to(setup.device).train()
    optimizer, scaler = build_optimizer(model, training), build_scaler(setup.device, training.precision)
    skipped, loss = 0, math.nan
    for step in range(steps):
        batch = training_batch(
            setup.dataset.train.tokens,
            batch_size=training.batch_size,
            sequence_length=training.sequence_length,
            seed=training.seed,
            step=step,
        )
        before = scaler.get_scale()
        cross_entropy, _ = learn(model, optimizer, scaler, batch, training, step, setup.device)
        # The scale falls when, and only when, a step was skipped.
        skipped += scaler.get_scale() < before
        loss = float(cross_entropy)
    return HalfPrecision(
        contestant=contender.key,
        steps=steps,
        skipped=skipped,
        scale=scaler.get_scale(),
        loss=loss if math.isfinite(loss) else None,
    )


def _causality(setup: Setup, contender: Contender) -> list[CausalityMeasurement]:
    """Of a contestant, and of the form of the seed's that is known to read ahead."""
    models = [(contender.label, contender.config, contender.with_seed(setup.training.seed))]
    if contender.key == bk_contestant(setup.configs) and contender.config is not None:
        leaking = ResNetBKConfig(**{**contender.config.own_fields(), "causal": False})
        models.append((f"{contender.label} (bidirectional)", leaking, build_model(leaking, setup.training.seed)))
    rows = []
    for label, config, model in models:
        found = causality(model, setup.vocab_size, setup.device, config)
        rows.append(
            CausalityMeasurement(
                label=label,
                causal=config is None or config.causal,
                largest_change=found.largest_change if math.isfinite(found.largest_change) else None,
                limit=found.limit,
            )
        )
    return rows


def _values_and_gradient(
    v: Tensor, weight: Tensor, z: complex | Tensor, causal: bool, backend: str
) -> tuple[Tensor, Tensor]:
    v = v.detach().requires_grad_()
    g = bk_core(v, z, causal=causal, backend=backend)  # type: ignore[arg-type]
    assert isinstance(g, Tensor)
    (weight * g).real.sum().backward()  # type: ignore[no-untyped-call]
    assert v.grad is not None
    return g.detach(), v.grad


def _gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(output.sum(), inputs))


def _relative_error(found: Tensor, exact: Tensor) -> float | None:
    error = float((found.to(exact.dtype) - exact).abs().max() / exact.abs().max())
    return error if math.isfinite(error) else None


def _finite_check(name: str, tensors: list[Tensor], contestant: str | None = None) -> Check:
    wrong = sum(_not_finite(x.detach()) for x in tensors)
    return check(f"{name}: values that are not finite", float(wrong), 0.0, contestant)


def _not_finite(x: Tensor) -> int:
    return int((~torch.isfinite(torch.view_as_real(x) if x.is_complex() else x)).sum())
