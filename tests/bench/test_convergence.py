"""Training runs as cells, the choice of rates, and what may be said of several seeds."""

import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from resnet_bk.bench import convergence
from resnet_bk.bench.cells import Outcome
from resnet_bk.bench.contestants import Contender
from resnet_bk.bench.profiles import PROFILES, fixed_rate, rates_to_try
from resnet_bk.bench.reading import losses_by_window
from resnet_bk.bench.seeds import compare
from resnet_bk.bench.setup import Setup
from resnet_bk.chance import incomplete_beta, t_probability, t_quantile
from resnet_bk.errors import UserError
from resnet_bk.report.sections import convergence as section
from resnet_bk.schema import Arm, CellStatus, Comparison, CurvePoint, Failure
from resnet_bk.training.config import DataConfig, TrainingConfig
from resnet_bk.training.data.dataset import TokenDataset

VOCABULARY = 257


class Bigrams(nn.Module):
    """A foreign model: the next token by the last one alone."""

    def __init__(self, vocab_size):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size)

    def forward(self, ids):
        return self.head(self.embedding(ids))


class NotANumber(Bigrams):
    """Its loss is a number until it has learned something."""

    def forward(self, ids):
        logits = super().forward(ids)
        return logits * math.nan if self.training else logits


@pytest.fixture(scope="module")
def setup():
    source = Path(__file__).parents[2] / "src" / "resnet_bk" / "ops"
    return Setup(
        preset="tiny",
        overrides={"mixer": "bk"},
        baseline=None,
        vocab_size=VOCABULARY,
        data=DataConfig(data=str(source / "**" / "*.py"), tokenizer="byte"),
        training=TrainingConfig(batch_size=4, sequence_length=32, device="cpu"),
        profile=PROFILES["smoke"],
    )


@pytest.fixture
def swept(setup):
    return replace(setup, profile=replace(setup.profile, learning_rates=(0.001, 0.01, 0.1), seeds=(0, 1, 2)))


def foreign(setup, model, key="transformer"):
    """The same with another baseline."""
    changed = replace(setup)
    contender = Contender(key=key, label="Foreign", source="here", config=None, build=lambda: model(setup.vocab_size))
    changed.__dict__["all_contenders"] = {**setup.all_contenders, key: contender}
    return changed


def arm(setup, cell, loss, test_loss=None):
    """An outcome as if it had been trained."""
    training = cell.arguments
    point = CurvePoint(step=4, tokens=512, seconds=1.0, loss=loss)
    return Arm(
        key=training["key"],
        label=training["key"],
        seed=training["seed"],
        learning_rate=training["learning_rate"],
        leaks=training["key"] == "bidirectional",
        parameters=10,
        train=[point],
        validation=[point],
        test_loss=loss if test_loss is None else test_loss,
    )


def done(result):
    return Outcome(status=CellStatus(seconds=1.0), result=result)


def failed(kind="out of memory"):
    return Outcome(status=CellStatus(seconds=1.0, failure=Failure(kind=kind, message="none left")), result=None)


def run_all(setup, loss_of, outcomes=None):
    """Every cell that comes up, with losses by a rule."""
    outcomes = dict(outcomes or {})
    while todo := [cell for cell in convergence.cells(setup, outcomes) if cell.name not in outcomes]:
        loss = loss_of(**todo[0].arguments)
        outcomes[todo[0].name] = loss if isinstance(loss, Outcome) else done(arm(setup, todo[0], loss))
    return outcomes


def best_in_the_middle(key, learning_rate, seed):
    centre = {"resnet-bk": 0.02, "transformer": 0.012, "blend": 0.005, "bidirectional": 0.02}[key]
    return 3.0 + abs(math.log(learning_rate / centre)) + 0.01 * seed


@pytest.mark.parametrize(
    ("degrees", "confidence", "quantile"),
    [(1, 0.95, 12.7062), (2, 0.95, 4.30265), (4, 0.95, 2.77645), (9, 0.99, 3.24984), (30, 0.9, 1.69726)],
)
def test_students_t_is_that_of_the_tables(degrees, confidence, quantile):
    assert t_quantile(confidence, degrees) == pytest.approx(quantile, rel=1e-5)
    assert t_probability(quantile, degrees) == pytest.approx(1 - confidence, rel=1e-4)
    assert t_probability(-quantile, degrees) == t_probability(quantile, degrees)


def test_the_incomplete_beta_function_where_it_is_a_polynomial():
    for x in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert incomplete_beta(2, 3, x) == pytest.approx(6 * x**2 - 8 * x**3 + 3 * x**4)


def test_a_difference_over_seeds_is_paired():
    first = {0: 5.1, 1: 7.2, 2: 3.0}
    found = compare({"arm": (first, {0: 5.0, 1: 7.0, 2: 2.7})})["arm"]
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx(
        (0.2 - 4.30265 * 0.1 / 3**0.5, 0.2 + 4.30265 * 0.1 / 3**0.5), rel=1e-4
    )
    assert found.p == pytest.approx(0.0742, abs=1e-4)
    assert not found.claimed


@pytest.mark.parametrize(
    "second", [{0: 1.0}, {0: 1.0, 1: None}, {}, {5: 1.0, 6: 1.0}], ids=["one", "diverged", "none", "others"]
)
def test_seeds_that_cannot_carry_a_difference_give_none(second):
    assert compare({"arm": ({0: 2.0, 1: 2.0}, second)}) == {}


def test_a_model_that_equals_the_baseline_is_no_different():
    losses = {0: 5.1, 1: 5.2, 2: 5.0}
    assert compare({"arm": (losses, losses)})["arm"] == Comparison(value=0, low=0, high=0, p=1, claimed=False)


def test_equal_models_are_told_apart_no_more_often_than_said():
    generator = np.random.default_rng(0)
    claims = 0
    for _ in range(400):
        base, *arms = generator.normal(5.0, 0.1, size=(4, 3))
        pairs = {str(n): (dict(enumerate(base)), dict(enumerate(losses))) for n, losses in enumerate(arms)}
        claims += any(found.claimed for found in compare(pairs).values())
    assert claims <= 0.05 * 400 + 3 * (400 * 0.05 * 0.95) ** 0.5


def test_a_comparison_alone_may_be_claimed_and_among_others_not():
    """Its p is 0.0351: less than 0.05, more than a third of it."""
    base = dict.fromkeys(range(3), 5.0)
    found = base, {0: 4.9, 1: 4.8, 2: 4.85}
    other = base, {0: 5.3, 1: 4.8, 2: 5.1}
    alone, among = compare({"a": found}), compare({"a": found, "b": other, "c": other})
    assert alone["a"].p == among["a"].p == pytest.approx(0.0351, abs=1e-4)
    assert alone["a"].claimed and not among["a"].claimed


def test_every_measured_kind_sweeps_as_many_rates_around_its_own_and_a_foreign_one_more():
    standard = PROFILES["standard"]
    grids = {kind: rates_to_try(standard, kind, 64) for kind in ("resolvent", "attention", "bk", "blend")}
    for kind, grid in grids.items():
        assert [rate / fixed_rate(kind, 64) for rate in grid] == pytest.approx([0.5, 1, 2])
    own = rates_to_try(standard, None, None)
    assert len(own) > 3 and own[0] < min(map(min, grids.values())) and own[-1] >= 0.02
    assert rates_to_try(PROFILES["quick"], "bk", 64) == []


@pytest.mark.parametrize("end_of_text", [None, 7])
def test_the_held_out_parts_share_no_target(end_of_text):
    tokens = np.arange(100, 1100, dtype=np.uint16)
    if end_of_text is not None:
        tokens[[480, 530, 10]] = end_of_text
    dataset = fake_dataset(tokens, end_of_text)
    validation, test = convergence.held_out(dataset)
    assert [*validation, *test] == [*tokens]
    assert len(validation) == (500 if end_of_text is None else 481)
    plain_targets = [set(part[1:]) - {end_of_text} for part in (validation, test)]
    assert not plain_targets[0] & plain_targets[1]


def test_too_little_held_out_text_is_said():
    with pytest.raises(UserError, match="3 held-out tokens"):
        convergence.held_out(fake_dataset(np.arange(3), None))


def fake_dataset(tokens, end_of_text):
    class Split:
        pass

    split, tokenizer = Split(), Split()
    split.tokens, tokenizer.end_of_text_id = tokens, end_of_text
    return TokenDataset(train=split, validation=split, tokenizer=tokenizer, record={})


def test_without_rates_each_arm_is_one_run_at_its_own(setup):
    cells = convergence.cells(setup, {})
    assert [cell.name for cell in cells] == [
        "run/resnet-bk/0.02/seed-0",
        "run/transformer/0.012/seed-0",
        "run/blend/0.005/seed-0",
        "run/bidirectional/0.02/seed-0",
    ]
    assert all(cell.weight > 0 for cell in cells)


def test_other_seeds_come_when_the_sweep_is_whole_and_its_best_run_is_not_trained_again(swept):
    first = convergence.cells(swept, {})
    assert [cell.name for cell in first if cell.arguments["key"] == "transformer"] == [
        f"sweep/transformer/{rate:g}" for rate in (0.006, 0.012, 0.024)
    ]
    assert all(cell.arguments["seed"] == 0 for cell in first)
    partial = {cell.name: done(arm(swept, cell, best_in_the_middle(**cell.arguments))) for cell in first[:5]}
    assert [name for name in names(convergence.cells(swept, partial)) if name.startswith("run/")] == [
        "run/resnet-bk/0.02/seed-1",
        "run/resnet-bk/0.02/seed-2",
        "run/bidirectional/0.02/seed-0",
    ]
    outcomes = run_all(swept, best_in_the_middle)
    result = convergence.assemble(swept, outcomes)
    assert [(found.key, found.seed) for found in result.arms if found.key != "blend"] == [
        *(("resnet-bk", seed) for seed in (0, 1, 2)),
        *(("transformer", seed) for seed in (0, 1, 2)),
        ("bidirectional", 0),
    ]
    assert "run/resnet-bk/0.02/seed-0" not in outcomes
    assert len(result.sweep) == 9


@pytest.mark.parametrize(
    ("processors", "gigabytes", "at_once"), [(64, 80, 4), (8, 80, 2), (2, 80, 1), (64, 5, 2), (64, 1, 1)]
)
def test_a_gpu_takes_as_many_cells_as_there_are_processors_and_memory_for(
    setup, monkeypatch, processors, gigabytes, at_once
):
    card = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(processors)))
    on_gpu = replace(setup, training=replace(setup.training, device="cuda"))
    assert on_gpu.at_once == at_once
    assert foreign(on_gpu, Bigrams).at_once == 1, "nobody knows what another model takes"
    assert setup.at_once == 1, "on a CPU each has all processors"


def test_a_sweep_whose_runs_are_beside_each_other_is_timed_again_with_its_best_rate(swept, monkeypatch):
    monkeypatch.setattr(Setup, "at_once", 2)
    cells = {cell.name: cell for cell in convergence.cells(swept, {})}
    assert {cell.timed for name, cell in cells.items() if name.startswith("sweep/")} == {False}
    outcomes = run_all(swept, best_in_the_middle)
    again = [name for name in outcomes if name.startswith("run/transformer/")]
    assert again == [f"run/transformer/0.012/seed-{seed}" for seed in (0, 1, 2)]
    assert all(cell.timed for cell in convergence.cells(swept, outcomes) if cell.name in again)
    outcomes[again[0]] = replace(outcomes[again[0]], result=replace(outcomes[again[0]].result, test_loss=7.0))
    arms = [found for found in convergence.assemble(swept, outcomes).arms if found.key == "transformer"]
    assert [found.seed for found in arms] == [0, 1, 2] and arms[0].test_loss == 7.0


def names(cells):
    return [cell.name for cell in cells]


def test_a_best_rate_at_an_end_is_followed_once_more(swept):
    outcomes = run_all(swept, lambda key, learning_rate, seed: 1 / learning_rate if key == "transformer" else 1.0)
    assert [name for name in outcomes if "transformer" in name and "sweep" in name] == [
        f"sweep/transformer/{rate:g}" for rate in (0.006, 0.012, 0.024, 0.048)
    ]
    shown = text_of(swept, convergence.assemble(swept, outcomes))
    assert "The best rate" in shown and "transformer" in shown


def test_rates_are_chosen_on_validation_and_claims_made_on_test(swept):
    best = {"resnet-bk": 0.02, "transformer": 0.012, "blend": 0.005, "bidirectional": 0.02}
    test_losses = {"resnet-bk": 4.0, "transformer": 5.0, "blend": 8.0, "bidirectional": 0.1}
    outcomes = {}
    while todo := [cell for cell in convergence.cells(swept, outcomes) if cell.name not in outcomes]:
        key, rate, seed = (todo[0].arguments[name] for name in ("key", "learning_rate", "seed"))
        noise = 0.01 * seed**2 + (0.001 * seed if key == "transformer" else 0)
        # The test loss of a rate that validation does not choose is the lower one, and must not be looked at.
        losses = (1.0, test_losses[key] + noise) if rate == best[key] else (2.0, 0.5)
        outcomes[todo[0].name] = done(arm(swept, todo[0], *losses))
    result = convergence.assemble(swept, outcomes)
    assert {found.test_loss for found in result.arms if found.key == "resnet-bk"} == {4.0, 4.01, 4.04}
    (difference,) = result.differences
    assert (difference.key, difference.difference.claimed) == ("resnet-bk", True)
    assert difference.difference.value == pytest.approx(1.001)
    assert result.gradient_difference.value == pytest.approx(4.0)
    assert result.gradient_difference.claimed
    shown = text_of(swept, result)
    assert "ResNet-BK is better by 1.001" in shown and "The exact gradient is better by 4.000" in shown


@pytest.mark.parametrize("outcome", [failed(), failed("timeout"), None], ids=["memory", "timeout", "diverged"])
def test_a_rate_that_fails_is_not_chosen_and_is_shown(swept, outcome):
    def rule(key, learning_rate, seed):
        if (key, learning_rate) == ("transformer", 0.024):
            return outcome or done(diverged)
        return best_in_the_middle(key, learning_rate, seed)

    cell = next(c for c in convergence.cells(swept, {}) if c.name == "sweep/transformer/0.024")
    diverged = replace(arm(swept, cell, None), test_loss=None)
    result = convergence.assemble(swept, run_all(swept, rule))
    point = next(p for p in result.sweep if (p.key, p.learning_rate) == ("transformer", 0.024))
    assert point.loss is None and (point.failure is None) == (outcome is None)
    assert {found.learning_rate for found in result.arms if found.key == "transformer"} == {0.012}
    assert set(result.failures) == (set() if outcome is None else {cell.name})
    assert ("not a number" if outcome is None else outcome.status.failure.kind) in text_of(swept, result)


def test_an_arm_that_never_ended_is_a_failure_and_the_others_stand(swept):
    def rule(key, learning_rate, seed):
        return failed() if key == "transformer" else best_in_the_middle(key, learning_rate, seed)

    result = convergence.assemble(swept, run_all(swept, rule))
    assert {found.key for found in result.arms} == {"resnet-bk", "blend", "bidirectional"}
    assert result.differences == [] and result.gradient_difference is not None
    assert len(result.failures) == 3
    assert "out of memory" in text_of(swept, result)


def test_only_failures_are_a_result_too_and_nothing_is_none(swept):
    assert convergence.assemble(swept, {}) is None
    result = convergence.assemble(swept, run_all(swept, lambda **_: failed()))
    assert result.arms == [] and result.failures
    assert "none left" in text_of(swept, result)


def test_a_run_of_another_rate_does_not_count_once_the_sweep_has_changed(swept):
    cells = {cell.name: cell for cell in convergence.cells(swept, {})}
    first = cells["sweep/transformer/0.006"]
    outcomes = run_all(swept, best_in_the_middle)
    outcomes[first.name] = done(arm(swept, first, 0.5))
    outcomes = run_all(swept, lambda **arguments: 0.6, outcomes)
    found = [a for a in convergence.assemble(swept, outcomes).arms if a.key == "transformer"]
    assert {a.learning_rate for a in found} == {0.006} and len(found) == 3


def test_a_run_is_repeated_exactly_and_goes_through_json(setup):
    cell = convergence.cells(setup, {})[0]
    first, second = convergence.measure(setup, cell), convergence.measure(setup, cell)
    assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(first)), convergence.RESULT) == first
    assert [p.loss for p in first.train] == [p.loss for p in second.train]
    assert first.test_loss == second.test_loss
    assert [point.step for point in first.validation] == [0, 2, 4]
    assert first.train[-1].tokens == 4 * 4 * 32
    assert all(point.gradient_norm > 0 for point in first.train)
    assert first.largest_gradient_norm >= max(point.gradient_norm for point in first.train)


def test_a_foreign_model_learns_by_the_same_rules(setup):
    profile = replace(setup.profile, convergence_steps=30, evaluations=1)
    changed = foreign(replace(setup, profile=profile), Bigrams)
    cell = next(cell for cell in convergence.cells(changed, {}) if "transformer" in cell.name)
    cell = replace(cell, arguments={**cell.arguments, "learning_rate": 0.05})
    found = convergence.measure(changed, cell)
    assert (found.label, found.leaks, found.parameters) == ("Foreign", False, 257 * 8 + 8 * 257 + 257)
    assert found.validation[-1].loss < found.validation[0].loss - 0.5
    assert found.largest_jump is not None


def test_every_window_reads_the_same_tokens_once(setup):
    """To a model that sees one token the length of the window is all the same; to ours it is not. They are of pieces
    from all over the text."""

    class Told(Bigrams):
        config = SimpleNamespace(max_position_embeddings=512)

    longer = replace(setup, profile=replace(setup.profile, evaluated_tokens=600))
    changed = foreign(longer, Told)
    cell = next(cell for cell in convergence.cells(changed, {}) if "transformer" in cell.name)
    found = convergence.measure(changed, cell).by_window
    assert [point.length for point in found] == [32, 128, 512]
    assert [point.loss for point in found] == pytest.approx([found[0].loss] * 3, abs=1e-5)
    ours, transformer = (
        convergence.measure(longer, next(cell for cell in convergence.cells(longer, {}) if name in cell.name)).by_window
        for name in ("resnet-bk", "transformer")
    )
    assert len({point.loss for point in ours}) == len(ours) == 3
    # It alone has attention, which can be given a window.
    assert len({point.loss for point in transformer}) == len(transformer) == 4
    assert (transformer[-1].length, transformer[-1].attention_window) == (512, 32)


def test_every_window_reads_the_same_pieces_from_all_over_the_text(setup):
    """Tokens are their places: three of six pieces are read, every second one."""
    seen = {}

    class Told(nn.Module):
        config = SimpleNamespace(max_position_embeddings=64)

        def forward(self, ids):
            seen.setdefault(ids.shape[1], []).extend(ids.flatten().tolist())
            return torch.zeros(*ids.shape, 6 * 64 + 1)

    training = replace(setup.training, batch_size=2, sequence_length=4)
    losses = losses_by_window(Told(), np.arange(6 * 64 + 1), training, 3 * 64 - 1, torch.device("cpu"))
    assert [(point.length, point.attention_window) for point in losses] == [(4, None), (16, None), (64, None)]
    pieces = [place for piece in (0, 2, 4) for place in range(64 * piece, 64 * piece + 64)]
    assert seen == {4: pieces, 16: pieces, 64: pieces}
    assert [point.loss for point in losses] == pytest.approx([math.log(6 * 64 + 1)] * 3)


@pytest.mark.parametrize(("limit", "lengths"), [(None, [32, 128, 512]), (127, [32]), (32, [32])])
def test_windows_are_no_longer_than_a_model_and_the_text_take(setup, limit, lengths):
    changed = replace(setup, overrides={**setup.overrides, "max_position_embeddings": limit})
    cells = convergence.cells(changed, {})
    found = convergence.measure(changed, cells[0])
    assert [point.length for point in found.by_window] == lengths
    leak = next(cell for cell in cells if "bidirectional" in cell.name)
    assert convergence.measure(changed, leak).by_window == []


def test_a_foreign_module_that_says_no_limit_reads_what_it_was_trained_on(setup):
    class Short(Bigrams):
        def forward(self, ids):
            assert ids.shape[1] <= 32, "behind its table"
            return super().forward(ids)

    changed = foreign(setup, Short)
    cell = next(cell for cell in convergence.cells(changed, {}) if "transformer" in cell.name)
    assert [point.length for point in convergence.measure(changed, cell).by_window] == [32]


def test_a_foreign_loop_equals_ours(setup):
    """Ours behind a wrapper is a foreign model: the two loops must then do the same."""
    without_balancing = replace(setup, overrides={**setup.overrides, "router_aux_loss_coef": 0.0})
    ours = without_balancing.all_contenders["transformer"]

    class Wrapped(nn.Module):
        def __init__(self, _):
            super().__init__()
            self.inner = ours.build()

        def forward(self, ids):
            return self.inner(ids, use_cache=False, return_logits=True).logits

    cell = next(c for c in convergence.cells(without_balancing, {}) if "transformer" in c.name)
    changed = foreign(without_balancing, Wrapped)
    mine, theirs = convergence.measure(without_balancing, cell), convergence.measure(changed, cell)
    assert [p.loss for p in mine.train] == pytest.approx([p.loss for p in theirs.train], rel=1e-4)
    assert mine.test_loss == pytest.approx(theirs.test_loss, rel=1e-4)
    assert mine.largest_gradient_norm == pytest.approx(theirs.largest_gradient_norm, rel=1e-3)


def test_a_loss_that_is_not_a_number_is_a_result(setup):
    changed = foreign(setup, NotANumber)
    cell = next(cell for cell in convergence.cells(changed, {}) if "transformer" in cell.name)
    found = convergence.measure(changed, cell)
    assert found.test_loss is None and found.validation[-1].loss is None and found.train[-1].loss is None
    assert found.validation[0].loss is not None
    result = convergence.assemble(changed, {cell.name: done(found)})
    assert "Diverged" in text_of(changed, result)


def test_the_largest_jump_is_over_the_median_before_it():
    losses = [5.0] * 30 + [7.5] + [5.0] * 10 + [4.0] * 30
    assert convergence.largest_jump(losses) == pytest.approx(2.5)
    assert convergence.largest_jump([5.0] * 20) is None
    assert convergence.largest_jump([10 - 0.1 * step for step in range(50)]) < 0


def test_the_report_names_the_leak_and_claims_nothing_of_one_seed(setup):
    outcomes = run_all(setup, best_in_the_middle)
    result = convergence.assemble(setup, outcomes)
    assert result.differences == []
    blocks = section.build(report_of(setup), result).blocks
    grave = [block.text for block in blocks if getattr(block, "grave", False)]
    assert any("is a leak, not skill" in text for text in grave)
    shown = text_of(setup, result)
    assert "One seed" in shown and "nothing is claimed" in shown and "is better" not in shown


def test_final_loss_is_that_of_the_test_text(setup):
    cell = convergence.cells(setup, {})[0]
    assert section.final_loss(arm(setup, cell, 3.0, 4.0)) == 4.0


def text_of(setup, result):
    parts = []
    for block in section.build(report_of(setup), result).blocks:
        parts += [getattr(block, "text", "")]
        parts += [" | ".join(row) for row in getattr(block, "rows", [])]
    return "\n".join(parts)


def report_of(setup):
    """All of a report that the section reads."""

    class Stub:
        pass

    report, work = Stub(), Stub()
    report.workload = work
    work.description, work.tokenizer, work.split, work.device = "this source", "byte", "by document", "cpu"
    report.baseline = Stub()
    report.baseline.label = "Transformer"
    return report
