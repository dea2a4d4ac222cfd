"""Section 6, and the gates: errors against complex128, extremes, causality, determinism.

The gates are checks of this kind that run before anything is timed: a wrong operator or a model that reads ahead makes
every other figure worthless.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_bk.bench.contestants import LABELS, Subject, bk_contestant, build_model, random_batch
from resnet_bk.bench.profiles import Profile
from resnet_bk.models import ResNetBKConfig
from resnet_bk.ops import bk_core, bk_tunnel
from resnet_bk.ops.carry import bk_carry
from resnet_bk.schema import AccuracyPoint, CausalityMeasurement, Check, StabilityResult
from resnet_bk.training.config import TrainingConfig

GATE_ERROR = 1e-4  # of float32 against complex128 at eta = 1, where about 1e-6 is expected
CAUSALITY_LIMIT = 1e-10  # in float64: moving a token changes how many an expert gets, and so the last bits of products
CAUSALITY_TRIALS = 5
CAUSALITY_LENGTH = 64
ROWS, HEADS = 2, 2
DETERMINISM_STEPS = 3


def run_gates(configs: dict[str, ResNetBKConfig], device: torch.device) -> list[Check]:
    """What must hold before anything else is measured."""
    point = accuracy(causal=True, length=512, eta=1.0, potential=1.0, device=device)
    errors = (("values", point.value_error), ("gradients", point.gradient_error))
    gates = [_check(f"bk_core's {what} against complex128", error, GATE_ERROR) for what, error in errors]
    for regime in sorted({config.resolvent_regime for config in configs.values() if config.mixer == "resolvent"}):
        found = zip(("values", "gradients"), carry_errors(regime, length=512, device=device), strict=True)
        gates += [_check(f"bk_carry's {what}, {regime}, against all pairs", error, GATE_ERROR) for what, error in found]
    for key, config in configs.items():
        change = largest_change_before(config, device)
        gates.append(_check(f"{LABELS[key]}: no logit depends on a later token", change, CAUSALITY_LIMIT))
    return gates


def measure_stability(
    configs: dict[str, ResNetBKConfig],
    training: TrainingConfig,
    profile: Profile,
    device: torch.device,
    on_progress: Callable[[str], None],
) -> StabilityResult:
    """Everything that this section has."""
    points = [
        accuracy(causal=causal, length=length, eta=eta, potential=potential, device=device)
        for causal in (True, False)
        for length in profile.accuracy_lengths
        for eta in profile.etas
        for potential in profile.potentials
    ]
    on_progress(f"  {len(points)} errors against complex128")
    return StabilityResult(
        accuracy=points,
        extremes=extremes(device),
        causality=_causality(configs, device),
        determinism=[_determinism(key, config, training, device) for key, config in configs.items()],
    )


def accuracy(*, causal: bool, length: int, eta: float, potential: float, device: torch.device) -> AccuracyPoint:
    """Errors of float32 values and of the gradient of v, relative to the largest magnitude of the exact ones."""
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, length, HEADS)
    v = (potential * torch.randn(shape, generator=generator)).to(device)
    weight = torch.randn(shape, generator=generator, dtype=torch.complex64).to(device)
    values, gradient = _values_and_gradient(v, weight, eta, causal, "auto")
    exact_values, exact_gradient = _values_and_gradient(
        v.double(), weight.to(torch.complex128), eta, causal, "reference"
    )
    return AccuracyPoint(
        form="causal" if causal else "bidirectional",
        sequence_length=length,
        eta=eta,
        potential=potential,
        value_error=_relative_error(values, exact_values),
        gradient_error=_relative_error(gradient, exact_gradient),
    )


def carry_errors(regime: str, *, length: int, device: torch.device) -> tuple[float | None, float | None]:
    """Errors of bk_carry's float32 values and gradients, chains included, against every pair in double precision."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(ROWS, length, HEADS, 16, generator=generator).to(device) for _ in range(3))
    chain = torch.randn(ROWS, length, HEADS, generator=generator).to(device)
    weight = torch.randn(v.shape, generator=generator).to(device)

    def values_and_gradients(*, exact: bool) -> tuple[Tensor, list[Tensor]]:
        inputs = [(x.double() if exact else x).requires_grad_() for x in (x.clone() for x in (q, k, v, chain))]
        queries, keys, contents, potential = inputs
        log_l, angle = _decays(potential, regime, "reference" if exact else "auto")
        o = bk_carry(queries, keys, contents, log_l, angle=angle, form="quadratic" if exact else "chunked")
        assert isinstance(o, Tensor)
        return o.detach(), list(torch.autograd.grad((o * weight).sum(), inputs))

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


def largest_change_before(config: ResNetBKConfig, device: torch.device) -> float:
    """The most that changing token j moved a logit before j, over a few random models, rows and places; in float64."""
    length = min(CAUSALITY_LENGTH, config.max_position_embeddings or CAUSALITY_LENGTH)
    worst = 0.0
    for trial in range(CAUSALITY_TRIALS):
        model = build_model(config, trial).double().eval().to(device)
        row = torch.randint(config.vocab_size, (1, length))
        place = int(torch.randint(length // 4, length, ()))
        changed = row.clone()
        changed[0, place] = (changed[0, place] + 1) % config.vocab_size
        with torch.no_grad():
            before, after = (model(ids.to(device), use_cache=False).logits[:, :place] for ids in (row, changed))
        worst = max(worst, float((before - after).abs().max()))
    return worst


def extremes(device: torch.device) -> list[Check]:
    """Values that leave float32 in a careless formula; the measure is how many results are not finite."""
    length = 256
    ones = torch.ones(1, length, 1, device=device)
    cases = {
        "v = 0 in the middle of the band, eta = 1e-6": (0 * ones, 1e-6),
        "v = 1e18": (1e18 * ones, 1.0),
        "v = 1e38": (1e38 * ones, 1.0),
        "v = +-1e30 alternating": (
            1e30 * ones * (1 - 2 * (torch.arange(length, device=device) % 2)).view(1, -1, 1),
            1.0,
        ),
        "v = 1e-45 (subnormal)": (1e-45 * ones, 1.0),
    }
    checks = []
    for name, (v, eta) in cases.items():
        for causal in (True, False):
            values, gradient = _values_and_gradient(v, torch.ones_like(v) + 0j, eta, causal, "auto", energy=-2.0)
            wrong = _not_finite(values) + _not_finite(gradient)
            form = "causal" if causal else "bidirectional"
            checks.append(_check(f"bk_core {form}, {name}: values that are not finite", float(wrong), 0.0))
    for name, gap in (("w = 0 (memory without end)", 0 * ones), ("w = 1e38", 1e38 * ones)):
        log_l = bk_tunnel(gap)
        assert isinstance(log_l, Tensor)
        checks.append(_check(f"bk_tunnel, {name}: values that are not finite", float(_not_finite(log_l)), 0.0))
    return checks


def _causality(configs: dict[str, ResNetBKConfig], device: torch.device) -> list[CausalityMeasurement]:
    variants = {LABELS[key]: config for key, config in configs.items()}
    if key := bk_contestant(configs):
        variants[f"{LABELS[key]} (bidirectional)"] = ResNetBKConfig(**{**configs[key].own_fields(), "causal": False})
    return [
        CausalityMeasurement(label=label, causal=config.causal, largest_change=largest_change_before(config, device))
        for label, config in variants.items()
    ]


def _determinism(key: str, config: ResNetBKConfig, training: TrainingConfig, device: torch.device) -> Check:
    """Weights that differ between two runs of a few steps."""
    length = min(CAUSALITY_LENGTH, config.max_position_embeddings or CAUSALITY_LENGTH)
    runs = []
    for _ in range(2):
        subject = Subject.build(config, training, random_batch(config, 2, length, device))
        for _ in range(DETERMINISM_STEPS):
            subject.step()
        runs.append([parameter.detach() for parameter in subject.model.parameters()])
    different = sum(int((a != b).sum()) for a, b in zip(*runs, strict=True))
    return _check(
        f"{LABELS[key]}: weights that differ between two runs of {DETERMINISM_STEPS} steps", float(different), 0.0
    )


def _values_and_gradient(
    v: Tensor, weight: Tensor, eta: float, causal: bool, backend: str, energy: float = 0.0
) -> tuple[Tensor, Tensor]:
    v = v.detach().requires_grad_()
    g = bk_core(v, complex(energy, eta), causal=causal, backend=backend)  # type: ignore[arg-type]
    assert isinstance(g, Tensor)
    (weight * g).real.sum().backward()  # type: ignore[no-untyped-call]
    assert v.grad is not None
    return g.detach(), v.grad


def _relative_error(found: Tensor, exact: Tensor) -> float | None:
    error = float((found.to(exact.dtype) - exact).abs().max() / exact.abs().max())
    return error if math.isfinite(error) else None


def _not_finite(x: Tensor) -> int:
    return int((~torch.isfinite(torch.view_as_real(x) if x.is_complex() else x)).sum())


def _check(name: str, measured: float | None, limit: float) -> Check:
    measured = None if measured is None or not math.isfinite(measured) else measured
    return Check(name=name, measured=measured, limit=limit, passed=measured is not None and measured <= limit)
