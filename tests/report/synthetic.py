"""A complete report without a measurement: figures of a realistic size, the same at every call."""

from dataclasses import replace

import numpy as np

from resnet_bk.schema import (
    KIND,
    SECTIONS,
    VERSION,
    AccuracyPoint,
    Arm,
    AxisScaling,
    CausalityMeasurement,
    CellStatus,
    Check,
    Comparison,
    ComponentFlops,
    Contestant,
    ConvergenceResult,
    CurvePoint,
    Exponent,
    Failure,
    FlopsResult,
    HalfPrecision,
    Interval,
    LossDifference,
    MemoryPart,
    MemoryResult,
    ModelFlops,
    ModelMemory,
    Peaks,
    PhaseRatio,
    PhaseTime,
    Report,
    Results,
    ScalingPoint,
    ScalingResult,
    StabilityResult,
    Summary,
    SweepPoint,
    TimingResult,
    Utilisation,
    WindowLoss,
    Workload,
)

OURS, BASELINE, SEED_MIXER = "resnet-bk", "transformer", "seed-mixer"
MILLISECONDS = {  # of ours, the baseline, the seed's mixer
    "forward": (104.0, 62.0, 81.0),
    "backward": (92.0, 103.0, 70.0),
    "optimizer": (3.1, 3.1, 3.0),
    "step": (201.0, 170.0, 155.0),
    "prefill": (41.0, 30.0, 35.0),
    "decode": (2.1, 2.9, 1.6),
    "forward, cold cache": (131.0, 84.0, 99.0),
}
MARGIN = 0.02


def report_of(
    *,
    seeds=3,
    contestants=3,
    foreign=False,
    sections=SECTIONS,
    failing=False,
    slower=1.0,
    noise=0,
    label=None,
    failures=0,
):
    """The report of a run. ``foreign`` has a Hugging Face baseline, which has no formulas; ``failing`` all that can
    go wrong; ``slower`` is by how much ours is, ``noise`` which noise the samples have. ``failures`` are further cells
    that failed, each with much to say."""
    keys = [OURS, BASELINE, SEED_MIXER][:contestants]
    models = [_contestant(key, foreign and key == BASELINE, label) for key in keys]
    labels = {model.key: model.label for model in models}
    generator = np.random.default_rng(noise)
    built = {
        "flops": lambda: _flops(keys, foreign),
        "timing": lambda: _timing(keys, slower, generator),
        "memory": lambda: _memory(keys, foreign, failing),
        "convergence": lambda: _convergence(labels, seeds, failing),
        "scaling": lambda: _scaling(keys, failing),
        "stability": lambda: _stability(labels, failing),
    }
    return Report(
        kind=KIND,
        version=VERSION,
        created="2026-11-26T00:55:29+00:00",
        command=["bench", "--profile", "standard", "--preset", "seed", "--data", "my books/*.txt"],
        profile={
            "name": "standard" if seeds > 1 else "quick",
            "purpose": "three seeds, each contestant at the best of four learning rates"
            if seeds > 1
            else "a first look, with one seed and learning rates fixed beforehand",
        },
        environment=_environment(),
        workload=_workload(),
        contestants=models,
        gates=_gates(labels),
        cells=_cells(sections, failing, failures),
        results=Results(**{name: built[name]() for name in sections}),
    )


def with_result(report, name, **changes):
    """The report with fields of one section's result exchanged."""
    result = replace(getattr(report.results, name), **changes)
    return replace(report, results=replace(report.results, **{name: result}))


def summary_of(samples):
    """As the benchmark summarizes, with quartiles for the interval."""
    values = np.asarray(samples, dtype=float)
    first, median, third = (float(value) for value in np.percentile(values, [25, 50, 75]))
    return Summary(
        samples=values.tolist(),
        mean=float(values.mean()),
        std=float(values.std(ddof=1)) if values.size > 1 else 0.0,
        minimum=float(values.min()),
        maximum=float(values.max()),
        median=median,
        first_quartile=first,
        third_quartile=third,
        low=first,
        high=third,
    )


def _contestant(key, foreign, label):
    if foreign:
        return Contestant(
            key=key,
            label=label or "gpt2",
            source="hf:/data/models/checkpoints/a-long-folder-name/gpt2-small-with-a-long-name",
            parameters=612_352,
            active_parameters=None,
            config={"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 2048},
        )
    mixer = {OURS: "resolvent", BASELINE: "attention", SEED_MIXER: "bk"}[key]
    names = {OURS: "ResNet-BK", BASELINE: "Transformer", SEED_MIXER: "Seed's mixer"}
    return Contestant(
        key=key,
        label=(label if key == BASELINE else None) or names[key],
        source="preset seed",
        parameters={OURS: 530_656, BASELINE: 529_536, SEED_MIXER: 526_728}[key],
        active_parameters=395_488,
        config={
            "vocab_size": 2048,
            "hidden_size": 64,
            "num_layers": 4,
            "num_experts": 4,
            "intermediate_size": 88,
            "mixer": mixer,
            "conv_size": 0 if key == SEED_MIXER else 4,
            "num_resolvent_heads": 4,
            "num_bk_heads": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": None,
            "tie_word_embeddings": False,
        },
    )


def _environment():
    return {
        "hardware": {"cpu": "AMD EPYC", "cores": 2, "threads": 2, "memory_bytes": 25_276_510_208, "gpu": None},
        "system": "Linux 6.18",
        "python": "3.12.7",
        "packages": {"resnet-bk": "0.1.0", "torch": "2.13.0+cpu", "numpy": "2.4.6", "typst": "0.15.2"},
        "commit": "10ebb4950779",
    }


def _workload():
    return Workload(
        preset="seed",
        data="stdlib",
        description="the source text of Python's standard library, 511 files",
        tokenizer="bpe:2048",
        vocab_size=2048,
        train_tokens=2_907_633,
        validation_tokens=170_275,
        test_tokens=170_275,
        split="by document, lowest content hashes",
        batch_size=20,
        sequence_length=128,
        precision="fp32",
        device="cpu",
        threads=2,
        seed=0,
    )


def _gates(labels):
    operators = [("bk_core's values against complex128", 1.5e-7), ("bk_carry's gradients, against all pairs", 4.5e-7)]
    found = [Check(name=name, measured=error, limit=1e-4, passed=True) for name, error in operators]
    for key, label in labels.items():
        name = f"{label}: no logit depends on a later token"
        found.append(Check(name=name, measured=4e-16, limit=1e-10, passed=True, contestant=key))
    return found


def _cells(sections, failing, failures):
    names = {
        "flops": ["resnet-bk", "transformer"],
        "timing": ["build-0", "build-1"],
        "memory": ["resnet-bk", "transformer"],
        "convergence": ["resnet-bk-0", "transformer-0"],
        "scaling": ["sequence_length", "batch_size"],
        "stability": ["accuracy", "causality"],
    }
    cells = {"gates/operators": CellStatus(seconds=3.0, waited=0.0)}
    for section in sections:
        cells |= {f"{section}/{name}": CellStatus(seconds=12.5, waited=0.004) for name in names[section]}
    if failing:
        cells |= {
            "timing/build-1": CellStatus(seconds=13.0, waited=0.21),
            "scaling/sequence_length-transformer-16384": _failed("out of memory", "34.4 GB were asked for"),
            "scaling/num_experts": _failed("timeout", "stopped after 900 s"),
            "convergence/transformer-2": _failed("crash", "the process ended with signal 11"),
            "flops/seed-mixer": _failed("error", "no FLOP formula for resnet_bk::bk_causal; register one"),
            "timing/seed-mixer": _failed("withheld", "a gate failed (Seed's mixer: no logit depends on a later token)"),
        }
    for number in range(failures):
        cells[f"scaling/num_experts-transformer-{number}"] = _failed("error", "the kernel said no " * 12)
    return cells


def _failed(kind, message):
    return CellStatus(seconds=31.0, failure=Failure(kind=kind, message=message), waited=0.001)


def _flops(keys, foreign):
    models = []
    for key, forward, backward in zip(
        keys, (2_899_476_480, 3_104_000_000, 2_105_000_000), (5_892_843_520, 6_204_000_000, 4_108_000_000), strict=False
    ):
        ours = not (foreign and key == BASELINE)
        parts = [
            ComponentFlops(component=name, forward=int(forward * share), backward=int(backward * share))
            for name, share in (("mixer", 0.5), ("experts", 0.3), ("head", 0.2))
        ]
        models.append(
            ModelFlops(
                contestant=key,
                forward=forward,
                backward=backward,
                optimizer=8_490_496,
                forward_per_token=forward / 2560,
                step_per_token=(forward + backward) / 2560,
                counted_as_zero=["aten.add", "aten.silu", "aten.sort"],
                components=parts if ours else [],
                formula_forward=forward if ours else None,
                formula_backward=backward if ours else None,
                seed_forward=1_204_000_000 if ours and key != BASELINE else None,
            )
        )
    ours, theirs = models[0], models[1]
    return FlopsResult(models=models, ratio=theirs.step / ours.step, forward_ratio=theirs.forward / ours.forward)


def _timing(keys, slower, generator):
    phases, ratios = [], []
    for phase, times in MILLISECONDS.items():
        drawn = {}
        for place, key in enumerate(keys):
            factor = slower if place == 0 else 1.0
            drawn[key] = 1e-3 * factor * times[place] * np.exp(0.03 * generator.standard_normal(50))
            phases.append(PhaseTime(phase=phase, contestant=key, seconds=summary_of(drawn[key])))
        ratios.append(PhaseRatio(phase=phase, ratio=_ratio(drawn[BASELINE] / drawn[OURS])))
    return TimingResult(
        builds=5,
        rounds=50,
        warmup_rounds=[3, 3, 4, 3, 3],
        margin=MARGIN,
        phases=phases,
        ratios=ratios,
        peaks=Peaks(flops=9.1e10, copy_bandwidth=1.3e10),
        utilisation=[
            Utilisation(
                contestant=key,
                tokens_per_second=2560 / (1e-3 * MILLISECONDS["step"][place]),
                first_step_seconds=1.2,
                step_flops=0.46,
                optimizer_bandwidth=0.37,
                decode_bandwidth=0.11,
            )
            for place, key in enumerate(keys)
        ],
    )


def _ratio(ratios):
    value = float(np.median(ratios))
    spread = 1.96 * 1.25 * float(np.std(np.log(ratios))) / np.sqrt(ratios.size)
    low, high = value * float(np.exp(-spread)), value * float(np.exp(spread))
    claimed = low > 1 + MARGIN or high < 1 - MARGIN
    return Comparison(value=value, low=low, high=high, p=0.0005 if claimed else 0.4, claimed=claimed)


def _memory(keys, foreign, failing):
    models = []
    for place, key in enumerate(keys):
        peak = (98_539_208, 101_147_000, 74_727_512)[place]
        traced = not (foreign and key == BASELINE)
        models.append(
            ModelMemory(
                contestant=key,
                after_load=2_122_624,
                optimizer=4_245_504,
                after_forward=peak - 42_000_000,
                peak_forward=peak,
                peak_backward=peak - 41_000_000,
                peak_step=peak,
                reserved=None,
                process=peak + 60_000_000,
                grown_per_step=1_300_000.0 if failing and place == 0 else 0.0,
                predicted_peak=int(peak * (0.9 if failing and place == 1 else 1.007)) if traced else None,
                predicted_reserved=None,
                parts=[
                    MemoryPart(kind="activations", num_bytes=int(peak * 0.6)),
                    MemoryPart(kind="gradients", num_bytes=int(peak * 0.2)),
                ]
                if traced
                else [],
            )
        )
    return MemoryResult(
        counter="bytes of live tensors, each one watched",
        models=models,
        ratio=models[1].peak_step / models[0].peak_step,
    )


def _curve(final, scale, diverged=False):
    points = []
    for step in range(0, 1001, 100):
        loss = final + (7.6 - final) * float(np.exp(-step / 130))
        points.append(
            CurvePoint(
                step=step,
                tokens=2560 * step,
                seconds=scale * step,
                loss=None if diverged and step > 700 else loss,
                gradient_norm=None,
            )
        )
    return points


def _by_window(key, final):
    """Ours reads on, the Transformer with a window alone; others have no attention."""
    change = {OURS: -0.05, BASELINE: 0.6}.get(key, 0.0)
    found = [WindowLoss(length=length, loss=final + times * change) for times, length in enumerate((128, 512, 2048))]
    if key in (OURS, BASELINE):
        found.append(WindowLoss(length=2048, attention_window=128, loss=final - 0.07))
    return found


def _arm(key, label, seed, final, *, leaks=False, diverged=False):
    return Arm(
        key=key,
        label=label,
        seed=seed,
        learning_rate=0.004,
        leaks=leaks,
        parameters=530_000,
        train=[
            replace(point, gradient_norm=0.4 + 3 * float(np.exp(-point.step / 200))) for point in _curve(final, 0.2)
        ],
        validation=_curve(final, 0.2, diverged),
        test_loss=None if diverged else final + 0.02,
        by_window=[] if diverged or leaks else _by_window(key, final),
        largest_jump=0.31,
        largest_gradient_norm=4.2,
    )


def _convergence(labels, seeds, failing):
    finals = {OURS: 4.61, BASELINE: 4.93, SEED_MIXER: 4.99}
    arms = []
    for seed in range(seeds):
        for key, label in labels.items():
            diverged = failing and key == BASELINE and seed == 1
            arms.append(_arm(key, label, seed, finals[key] + 0.01 * (seed - 1), diverged=diverged))
        if SEED_MIXER in labels:
            arms.append(_arm("blend", "Seed's mixer, analytic gradient", seed, 6.2 + 0.02 * seed))
            arms.append(_arm("bidirectional", "Seed's mixer (bidirectional)", seed, 4.4, leaks=True))
    differences = []
    if seeds > 1:
        claims = {OURS: (0.32, 0.27, 0.37, True), SEED_MIXER: (-0.06, -0.2, 0.08, False)}
        for key in labels:
            if key != BASELINE:
                value, low, high, claimed = claims[key]
                shown = Comparison(value=value, low=low, high=high, p=0.001 if claimed else 0.3, claimed=claimed)
                differences.append(LossDifference(key=key, label=labels[key], difference=shown))
    rates = [1e-3, 2e-3, 4e-3, 8e-3] if seeds > 1 else []
    return ConvergenceResult(
        steps=1000,
        tokens_per_step=2560,
        seeds=list(range(seeds)),
        learning_rates=rates,
        validation_tokens=100_000,
        test_tokens=100_000,
        unigram_entropy=6.196,
        arms=arms,
        sweep=[
            SweepPoint(
                key=key,
                label=label,
                learning_rate=rate,
                loss=finals[key] + 0.1 * abs(float(np.log(rate / 4e-3))),
            )
            for key, label in labels.items()
            for rate in rates
        ],
        differences=differences,
        failures={"transformer-2": Failure(kind="crash", message="the process ended with signal 11")}
        if failing
        else {},
    )


def _scaling(keys, failing):
    return ScalingResult(
        axes=[
            _axis("sequence_length", [128, 256, 512, 1024, 2048, 4096, 8192], keys, {"batch_size": 1}, failing),
            _axis("batch_size", [1, 2, 4, 8, 16, 32], keys, {"sequence_length": 128}, False),
            _axis("num_layers", [1, 2, 4], keys, {"sequence_length": 128, "batch_size": 1}, False),
        ]
    )


def _axis(axis, values, keys, fixed, failing):
    long = axis == "sequence_length"
    points = []
    for key in keys:
        for value in values:
            if failing and key == BASELINE and value == values[-1]:
                failure = Failure(kind="out of memory", message="34.4 GB were asked for")
                points.append(
                    ScalingPoint(contestant=key, value=value, seconds=None, peak_memory=None, failure=failure)
                )
                continue
            seconds = 2e-4 * value + (4e-8 * value**2 - 1e-5 * value if key == BASELINE and long else 0) + 4e-3
            if key != BASELINE:
                seconds *= 1.4
            points.append(
                ScalingPoint(
                    contestant=key,
                    value=value,
                    seconds=summary_of(seconds * np.array([0.98, 0.99, 1.0, 1.01, 1.03])),
                    peak_memory=8_000_000 + 90_000 * value,
                    parameters=530_000,
                )
            )
    exponents = [
        Exponent(
            contestant=key,
            quantity=quantity,
            from_value=values[-3],
            exponent=Interval(value=slope, low=slope - 0.04, high=slope + 0.05),
        )
        for key in keys
        for quantity, slope in (("time", 1.72 if key == BASELINE and long else 0.98), ("memory", 1.0))
    ]
    return AxisScaling(axis=axis, fixed=fixed, points=points, exponents=exponents, crossover=4096 if long else None)


def _stability(labels, failing):
    accuracy = [
        AccuracyPoint(
            form=form,
            sequence_length=length,
            eta=eta,
            potential=potential,
            value_error=1.2e-7 * length**0.5 / eta**0.5,
            gradient_error=2.1e-7 * length**0.5 / eta,
        )
        for form in ("causal", "bidirectional")
        for length in (128, 1024)
        for eta in (1.0, 0.1, 0.01)
        for potential in (0.1, 1.0, 10.0)
    ]
    extremes = [
        Check(name="bk_core: numbers that are not finite at |v| = 1e18", measured=0.0, limit=0.0, passed=True),
        Check(
            name="bk_core: numbers that are not finite at eta = 1e-6",
            measured=None if failing else 0.0,
            limit=0.0,
            passed=not failing,
        ),
    ]
    causality = [
        CausalityMeasurement(label=label, causal=True, largest_change=0.3 if failing and key == SEED_MIXER else 4e-16)
        for key, label in labels.items()
    ]
    return StabilityResult(
        accuracy=accuracy,
        extremes=extremes,
        causality=[
            *causality,
            CausalityMeasurement(label="Seed's mixer (bidirectional)", causal=False, largest_change=0.21),
        ],
        determinism=[
            Check(name=f"{label}: losses that differ in a second run", measured=0.0, limit=0.0, passed=True)
            for label in labels.values()
        ],
        half_precision=[HalfPrecision(contestant=key, steps=50, skipped=2, scale=16384.0, loss=5.1) for key in labels],
    )
