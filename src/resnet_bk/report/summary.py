"""The first page: what was found, in plain words, losses to the baseline included."""

from resnet_bk.report.blocks import Block, Bullets, Note, Paragraph, Section, Table
from resnet_bk.report.sections.convergence import final_loss
from resnet_bk.report.sections.scaling import crossover_sentence
from resnet_bk.report.sections.stability import worst
from resnet_bk.report.wording import interval, listing, mixer_in_words, verdict
from resnet_bk.schema import SEED_MIXER, Arm, ConvergenceResult, Interval, Report, StabilityResult


def build(report: Report) -> Section:
    """Ratios, then sentences; nothing here that a section does not show."""
    ours, baseline, work = report.ours, report.baseline, report.workload
    blocks: list[Block] = [
        Paragraph(
            text=f"{ours.label} ({ours.parameters:,} parameters) against a {baseline.label} ({baseline.parameters:,} "
            f"parameters) that differs from it in the way tokens mix, on {work.description}, cut into "
            f"{work.vocab_size:,} tokens. {_mixers(report)} Profile {report.profile['name']}: "
            f"{report.profile['purpose']}."
        ),
        *_gates(report),
    ]
    if rows := _ratios(report):
        blocks.append(
            Table(
                caption="The Transformer's figure over ResNet-BK's; above 1 is in ResNet-BK's favour",
                header=["", "ratio", "in words"],
                rows=rows,
                align=["left", "right", "left"],
            )
        )
    findings = _findings(report)
    if findings:
        blocks.append(Bullets(items=findings))
    if missing := _missing(report):
        blocks.append(Note(text=missing, grave=True))
    return Section(title="Summary", blocks=blocks)


def _mixers(report: Report) -> str:
    ours, baseline, *others = report.contestants
    sentence = f"{ours.label} mixes by {mixer_in_words(ours)}, the {baseline.label} by {mixer_in_words(baseline)}."
    for other in others:
        sentence += (
            f" {other.label} ({mixer_in_words(other)}; {other.parameters:,} parameters) stands beside them: it is the "
            "one that this project began with."
        )
    return sentence


def _gates(report: Report) -> list[Block]:
    failed = [gate.name for gate in report.gates if not gate.passed]
    if failed:
        return [Note(text=f"A gate failed, so nothing was measured: {'; '.join(failed)}.", grave=True)]
    if not report.gates:
        return [Note(text="The gates did not run: nothing here is known to be right.", grave=True)]
    return [
        Paragraph(
            text=f"All {len(report.gates)} gates held before anything was timed: the operators' values and gradients "
            "agree with double precision, and in no model does a logit depend on a later token."
        )
    ]


def _ratios(report: Report) -> list[list[str]]:
    """The ratios that every report names: FLOPs, forward, backward, step, memory."""
    results, ours, baseline = report.results, report.ours.label, report.baseline.label
    rows = []
    if results.flops:
        rows.append(["FLOPs of a step", f"{results.flops.ratio:.2f}", _exact(results.flops.ratio, ours, baseline)])
    if results.timing:
        names = {"forward": "forward time", "backward": "backward time", "step": "step time"}
        rows += [
            [names[row.phase], interval(row.ratio), verdict(row.ratio, ours, baseline)]
            for row in results.timing.ratios
            if row.phase in names
        ]
    if results.memory:
        rows.append(
            ["peak memory of a step", f"{results.memory.ratio:.2f}", _exact(results.memory.ratio, ours, baseline)]
        )
    return rows


def _exact(ratio: float, ours: str, baseline: str) -> str:
    if ratio == 1:
        return "the same"
    less, more, factor = (ours, baseline, ratio) if ratio > 1 else (baseline, ours, 1 / ratio)
    return f"{more} needs {factor:.2f} times what {less} does"


def _findings(report: Report) -> list[str]:
    results = report.results
    findings = []
    if results.convergence:
        findings += _convergence(results.convergence)
    if results.timing:
        slower = [row.phase for row in results.timing.ratios if row.ratio.high < 1]
        if slower:
            findings.append(f"{report.ours.label} is slower than the {report.baseline.label} in {listing(slower)}.")
    if results.scaling:
        findings.append(crossover_sentence(report, results.scaling))
        findings += _exponents(report)
    if results.stability:
        findings += _stability(results.stability)
    return findings


def _convergence(result: ConvergenceResult) -> list[str]:
    first = {arm.key: arm for arm in result.arms if arm.seed == result.seeds[0]}
    ours, baseline = first.get("resnet-bk"), first.get("transformer")
    sentences = []
    if ours and baseline:
        sentences.append(_comparison(result, ours, baseline))
    if (seeds := first.get(SEED_MIXER)) and (loss := final_loss(seeds)) is not None:
        sentences.append(f"With the seed's mixer in its place the loss is {loss:.3f} (first seed).")
    if (blend := first.get("blend")) and (exact := first.get(SEED_MIXER) or ours):
        a, b = final_loss(exact), final_loss(blend)
        if a is not None:
            told = "is not a number" if b is None else f"is {b:.3f}"
            sentences.append(
                f"With the analytic gradient of the earlier work {exact.label}'s loss {told}, with the exact one "
                f"{a:.3f}."
            )
    if leak := first.get("bidirectional"):
        loss = final_loss(leak)
        told = "" if loss is None else f" ({loss:.3f})"
        sentences.append(
            f"The loss of the bidirectional variant{told} is a leak: it reads its own targets. It is no result."
        )
    return sentences


def _comparison(result: ConvergenceResult, ours: Arm, baseline: Arm) -> str:
    losses = {key: _losses(result, key) for key in (ours.key, baseline.key)}
    if not all(losses.values()):
        return f"{ours.label} or the {baseline.label} diverged; see the section on convergence."
    a, b = (sum(found) / len(found) for found in losses.values())
    tokens = result.steps * result.tokens_per_step
    lead = f"After {tokens:,} tokens the held-out loss is {a:.3f} ({ours.label}) against {b:.3f} ({baseline.label})"
    unigram = f"Without any context it would be {result.unigram_entropy:.3f}."
    if len(result.seeds) == 1:
        rates = "" if len(result.learning_rates) > 1 else " and learning rates that are not tuned"
        return f"{lead} nats a token. With one seed{rates} this does not say which model learns better. {unigram}"
    ahead = ours.label if a < b else baseline.label
    seeds = f"the mean of {len(result.seeds)} seeds"
    return f"{lead} nats a token, {seeds}: {ahead} is ahead by {abs(a - b):.3f}. {unigram}"


def _losses(result: ConvergenceResult, key: str) -> list[float]:
    losses = [final_loss(arm) for arm in result.arms if arm.key == key]
    finite = [loss for loss in losses if loss is not None]
    return finite if len(finite) == len(losses) else []


def _exponents(report: Report) -> list[str]:
    assert report.results.scaling
    labels = {contestant.key: contestant.label for contestant in report.contestants}
    times: list[tuple[str, int, Interval]] = [
        (labels[row.contestant], row.from_length, row.exponent)
        for row in report.results.scaling.exponents
        if row.quantity == "time"
    ]
    if not times:
        return []
    told = listing([f"{label} as N^{exponent.value:.2f}" for label, _, exponent in times])
    return [f"Time grows with the length, from N = {times[0][1]:,} on: {told}."]


def _stability(result: StabilityResult) -> list[str]:
    largest = worst(result.accuracy)
    told = "is not finite" if largest is None else f"is at most {largest:.1e}"
    sentences = [f"BK-Core's float32 error against complex128 {told} over all lengths, energies and potentials tried."]
    checks = [*result.extremes, *result.determinism]
    failed = [check.name for check in checks if not check.passed]
    sentences.append(
        f"Failed: {'; '.join(failed)}." if failed else f"All {len(checks)} checks of extremes and determinism passed."
    )
    return sentences


def _missing(report: Report) -> str:
    sentences = []
    if failed := [f"{name} ({status.failure})" for name, status in report.status.items() if status.failure]:
        sentences.append(f"These sections failed: {'; '.join(failed)}.")
    if absent := [name for name in vars(report.results) if name not in report.status]:
        sentences.append(f"Not measured: {listing(absent)}.")
    return " ".join(sentences)
