"""The study's own parts: mixers equal what they vary, contestants are causal and of one size, tasks have answers."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import quality  # noqa: E402
from quality_study import training  # noqa: E402
from quality_study.cells import Cell, Results, keep, merge, nothing  # noqa: E402
from quality_study.contestants import CONTESTANTS, Contestant, build, config_of  # noqa: E402
from quality_study.delta import delta_chunked, delta_recurrent  # noqa: E402
from quality_study.document import contents, sources, table, write  # noqa: E402
from quality_study.editions import Edition, of_files  # noqa: E402
from quality_study.findings import findings  # noqa: E402
from quality_study.mixers import Change, ChangedResolvent, Decay, PositionedAttention  # noqa: E402
from quality_study.studies import STUDIES  # noqa: E402
from quality_study.summary import Row, rows  # noqa: E402
from quality_study.tasks import Copying, Needle, Recall, Synthetic  # noqa: E402
from resnet_bk.bench.process import Ended  # noqa: E402
from resnet_bk.files import write_json  # noqa: E402
from resnet_bk.layers import LocalAttention, ResolventMixer  # noqa: E402
from resnet_bk.layers.context import SequenceContext  # noqa: E402
from resnet_bk.layers.memories import memories  # noqa: E402
from resnet_bk.layers.resolvent import SHORTEST_MEMORY  # noqa: E402
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM  # noqa: E402
from resnet_bk.ops.loss import IGNORE_INDEX  # noqa: E402

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_layers": 4,
    "num_attention_heads": 2,
    "resolvent_longest_memory": 32.0,
}
AVAILABLE = [contestant for contestant in CONTESTANTS.values() if contestant.is_available]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models of this size gain nothing from two, and lose much on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("length", [1, 5, 16, 37])
def test_the_delta_rule_by_chunks_is_its_definition_with_every_gradient(length: int) -> None:
    generator = torch.Generator().manual_seed(length)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(random(2, length, 3, 8), dim=-1) for _ in range(2))
    arguments = [
        part.requires_grad_()
        for part in (q, k, random(2, length, 3, 5), -random(2, length, 3).exp(), random(2, length, 3).sigmoid())
    ]
    weight = random(2, length, 3, 5)
    expected = delta_recurrent(*arguments)
    gradients = torch.autograd.grad((expected * weight).sum(), arguments)
    found = delta_chunked(*arguments, chunk=16)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad((found * weight).sum(), arguments), gradients)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("every", [0, 4])
def test_without_a_change_the_changed_mixer_is_the_librarys(every: int, is_training: bool) -> None:
    """In training with what dropout takes of writes, queries and reads, which is the same after the same seed."""
    shape = {**SHAPE, "dropout": 0.3}
    contestant = Contestant(name="", label="", fields={"local_attention_every": every})
    model = build(contestant, shape, seed=1).train(is_training)
    ids = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(0))

    def logits() -> torch.Tensor:
        torch.manual_seed(2)
        return model(ids, use_cache=False).logits

    expected, config, exchanged = logits(), config_of(contestant, shape), 0
    for block in model.model.layers:
        if isinstance(block.mixer, ResolventMixer):
            changed = ChangedResolvent(config, Change(lost_queries=None, lost_reads=None)).train(is_training)
            changed.load_state_dict(block.mixer.state_dict())
            block.mixer, exchanged = changed, exchanged + 1
    assert exchanged == (3 if every else 4)
    torch.testing.assert_close(logits(), expected)


def test_ours_is_the_librarys_default() -> None:
    config, default = config_of(CONTESTANTS["ours"], SHAPE), ResNetBKConfig()
    for name in ("mixer", "local_attention_every", "local_attention_window", "conv_size", "resolvent_regime"):
        assert getattr(config, name) == getattr(default, name)
    assert [type(block.mixer) for block in build(CONTESTANTS["ours"], SHAPE, seed=0).model.layers] == [
        *(ResolventMixer, ResolventMixer, LocalAttention, ResolventMixer)
    ]


def test_a_change_begins_with_the_memories_of_the_library() -> None:
    ours, changed = (build(CONTESTANTS[name], SHAPE, seed=1) for name in ("ours", "hybrid-input-gate"))
    for mine, other in zip(ours.model.layers, changed.model.layers, strict=True):
        if isinstance(mine.mixer, ResolventMixer):
            torch.testing.assert_close(other.mixer.log_rate, mine.mixer.log_rate)


@pytest.mark.parametrize("decay", ["gap", "gated"])
def test_decays_that_begin_as_if_all_tokens_were_alike_have_the_memories_then(decay: Decay) -> None:
    config = config_of(CONTESTANTS["resolvent"], SHAPE)
    mixer = ChangedResolvent(config, Change(decay=decay, constant_gap=True))
    mixer.begin()
    rates = -mixer._log_l(mixer._strength(torch.zeros(1, 4000, 64)) * mixer.log_rate.exp())[0, -1]
    torch.testing.assert_close(1 / rates, memories(2, SHORTEST_MEMORY, 32.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["gated", "mamba2", "gated-delta", "hybrid-mamba2", "ours-mamba2"])
def test_rivals_lose_writes_in_training_as_ours_do(name: str) -> None:
    """What a head reads is a sum of writes alone here: where all are dropped, only the skip is left."""
    mixer = build(CONTESTANTS[name], {**SHAPE, "dropout": 0.3}, seed=0).train().model.layers[0].mixer
    assert isinstance(mixer, ChangedResolvent) and mixer.lost_writes == 0.3
    x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    q, k, v = (x.unflatten(-1, (2, 32)) for _ in range(3))
    with torch.no_grad():
        mixer.lost_writes = 1 - 1e-7
        dropped = mixer._carried(q, k, v, x)
        skipped = v if name == "gated-delta" else 32 * v
    torch.testing.assert_close(dropped, skipped)
    assert not torch.equal(mixer.eval()._carried(q, k, v, x), skipped)


def test_without_an_output_gate_what_is_read_is_normed_alone() -> None:
    mixer = build(CONTESTANTS["plain-ungated"], SHAPE, seed=0).model.layers[0].mixer
    assert isinstance(mixer, ChangedResolvent) and not hasattr(mixer, "gate")
    o, x = torch.randn(2, 16, 2, 32), torch.randn(2, 16, 64)
    expected = o / (o.square().mean(-1, keepdim=True) + mixer.norm.eps).sqrt() * mixer.norm.weight
    torch.testing.assert_close(mixer._normed(o, x), expected.flatten(2))


def test_what_is_read_passes_a_gate_that_opens_and_closes() -> None:
    mixer = build(CONTESTANTS["plain-sigmoid"], SHAPE, seed=0).model.layers[0].mixer
    ungated = build(CONTESTANTS["plain-ungated"], SHAPE, seed=0).model.layers[0].mixer
    assert isinstance(mixer, ChangedResolvent) and isinstance(ungated, ChangedResolvent)
    o, x = torch.randn(2, 16, 2, 32), torch.randn(2, 16, 64)
    torch.testing.assert_close(mixer._normed(o, x), ungated._normed(o, x) / (1 + torch.exp(-mixer.gate(x))))


def test_queries_and_reads_are_lost_in_training_by_their_own_shares() -> None:
    contestant = CONTESTANTS["plain-sigmoid-lost-writes"]
    mixer = build(contestant, {**SHAPE, "dropout": 0.3}, seed=0).train().model.layers[0].mixer
    assert isinstance(mixer, ChangedResolvent)
    assert (mixer.lost_writes, mixer.lost_queries, mixer.lost_reads) == (0.4, 0.6, 0.3)
    seen: dict[str, torch.Tensor] = {}
    carried = mixer._carried
    mixer._carried = lambda q, *rest: carried(seen.setdefault("queries", q), *rest)
    mixer.output.register_forward_pre_hook(lambda _, inputs: seen.update(reads=inputs[0]))
    mixer(torch.randn(4, 64, 64), SequenceContext(rotary=None), None)
    assert (seen["queries"] == 0).double().mean().item() == pytest.approx(0.6, abs=0.02)
    assert (seen["reads"] == 0).double().mean().item() == pytest.approx(0.3, abs=0.02)
    mixer.eval()(torch.randn(4, 64, 64), SequenceContext(rotary=None), None)
    assert (seen["reads"] != 0).all()
    without = build(contestant, SHAPE, seed=0).model.layers[0].mixer
    assert (without.lost_writes, without.lost_queries, without.lost_reads) == (0, 0, 0)


def test_coordinates_are_lost_in_whole_rows_where_that_is_asked_for() -> None:
    mixer = (
        build(CONTESTANTS["plain-lost-coordinates"], {**SHAPE, "dropout": 0.3}, seed=0).train().model.layers[0].mixer
    )
    seen: list[torch.Tensor] = []
    carried = mixer._carried
    mixer._carried = lambda q, *rest: carried(seen.append(q) or q, *rest)
    mixer(torch.randn(32, 16, 64), SequenceContext(rotary=None), None)
    is_lost = seen[0] == 0
    assert torch.equal(is_lost, is_lost[:, :1].expand_as(is_lost))
    assert is_lost.double().mean().item() == pytest.approx(0.6, abs=0.05)


def test_memories_are_lost_in_training_alone() -> None:
    mixer = build(CONTESTANTS["plain-lost-memories"], {**SHAPE, "dropout": 0.3}, seed=0).train().model.layers[0].mixer
    log_l = torch.full((64, 128, 4), -0.1)
    assert (mixer._lost(log_l) < -20).double().mean().item() == pytest.approx(1 / 64, abs=0.004)
    assert torch.equal(mixer.eval()._lost(log_l), log_l)
    without = build(CONTESTANTS["plain-lost-memories"], SHAPE, seed=0).train().model.layers[0].mixer
    assert torch.equal(without._lost(log_l), log_l)


def test_heads_read_nothing_and_channels_see_no_earlier_tokens_in_training_alone() -> None:
    shape = {**SHAPE, "num_layers": 3, "dropout": 0.3}
    heads = build(CONTESTANTS["ours-lost-heads"], shape, seed=0).train().model.layers[0].mixer
    o, x = torch.randn(4, 64, 2, 32), torch.randn(4, 64, 64)
    is_lost = (heads._normed(o, x) == 0).unflatten(-1, (2, 32))
    assert torch.equal(is_lost, is_lost[..., :1].expand_as(is_lost))
    assert is_lost.double().mean().item() == pytest.approx(0.2, abs=0.06)
    assert (heads.eval()._normed(o, x) != 0).all()
    taps = build(CONTESTANTS["ours-lost-taps"], shape, seed=0).train().model.layers[0].mixer
    weight = torch.randn(4, 5000)
    kept = taps._kept_taps(weight)
    assert torch.equal(kept[0], weight[0])
    assert (kept[1:] == 0).double().mean().item() == pytest.approx(0.2, abs=0.02)
    torch.testing.assert_close(kept[1:], torch.where(kept[1:] == 0, 0, weight[1:] / 0.8))
    assert torch.equal(taps.eval()._kept_taps(weight), weight)
    for name in ("ours-lost-heads", "ours-lost-taps"):
        mixer = build(CONTESTANTS[name], {**shape, "dropout": 0.0}, seed=0).model.layers[0].mixer
        assert mixer.lost_heads == mixer.lost_taps == 0


def test_a_weak_read_stays_weak_where_that_is_asked_for() -> None:
    mixer = build(CONTESTANTS["ours-quiet"], {**SHAPE, "num_layers": 3}, seed=0).eval().model.layers[0].mixer
    assert isinstance(mixer, ChangedResolvent)
    o, x = torch.randn(2, 16, 2, 32), torch.randn(2, 16, 64)
    floor = mixer.log_floor.exp()[:, None]
    torch.testing.assert_close(floor, torch.full_like(floor, float(mixer.key_size)))
    expected = o / (o.square().mean(-1, keepdim=True) + floor**2).sqrt() * mixer.norm.weight
    torch.testing.assert_close(mixer._normed(o, x), expected.flatten(2) * torch.nn.functional.silu(mixer.gate(x)))


def test_a_transformer_can_lose_queries_and_reads_too() -> None:
    contestant = CONTESTANTS["attention-lost-reads"]
    mixer = build(contestant, {**SHAPE, "dropout": 0.3}, seed=0).train().model.layers[0].mixer
    assert isinstance(mixer, PositionedAttention) and mixer.lost_queries == 0.6
    seen: list[torch.Tensor] = []
    mixer.output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    angles = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0))
    context = SequenceContext(rotary=(angles.cos(), angles.sin()))
    x = torch.randn(4, 64, 64)
    mixer(x, context, None)
    mixer.eval()(x, context, None)
    assert (seen[0] == 0).double().mean().item() == pytest.approx(0.3, abs=0.02)
    assert (seen[1] != 0).all()
    without = build(contestant, SHAPE, seed=0).model.layers[0].mixer
    assert (without.dropout, without.lost_queries, without.lost_reads) == (0, 0, 0)


def test_one_that_keeps_its_writes_has_all_other_dropout() -> None:
    model = build(CONTESTANTS["hybrid-keeps-writes"], {**SHAPE, "dropout": 0.3}, seed=0)
    assert model.model.layers[0].mixer.lost_writes == 0 and model.model.layers[2].mixer.dropout == 0.3
    assert model.model.dropout.p == 0.3


@pytest.mark.parametrize("contestant", AVAILABLE, ids=lambda contestant: contestant.name)
def test_contestants_have_one_size_and_none_reads_ahead(contestant: Any) -> None:
    model = build(contestant, SHAPE, seed=0).eval().double()
    size = sum(parameter.numel() for parameter in model.parameters())
    attention = build(CONTESTANTS["attention"], SHAPE, seed=0)
    limit = sum(parameter.numel() for parameter in attention.parameters())
    assert 0.98 * limit < size <= limit
    ids = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 15] = (ids[:, 15] + 1) % 64
    before, after = (model(tokens, use_cache=False).logits for tokens in (ids, other))
    torch.testing.assert_close(after[:, :15], before[:, :15], rtol=0, atol=1e-12)
    assert (after[:, 15:] - before[:, 15:]).abs().max() > 1e-6
    trained = build(contestant, SHAPE, seed=0).train()
    loss = trained(ids, labels=ids, use_cache=False).loss
    loss.backward()
    without = [name for name, parameter in trained.named_parameters() if parameter.grad is None]
    # With a constant gap, nobody asks what tokens want.
    has_constant_gap = contestant.change is not None and contestant.change.constant_gap
    assert all(has_constant_gap and "potential" in name for name in without)


@pytest.mark.parametrize(
    "task",
    [Recall(pairs=5, filler=7), Copying(length=9), Needle(length=40)],
    ids=["recall", "copying", "needle"],
)
def test_what_is_asked_has_its_answer_before_it(task: Synthetic) -> None:
    tokens, targets = task.batch(6, np.random.default_rng(0))
    assert tokens.shape == targets.shape and int(tokens.max()) < task.vocab_size
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        asked = [place for place, target in enumerate(wanted) if target != IGNORE_INDEX]
        assert asked
        for place in asked:
            if isinstance(task, Copying):
                answer = row[place - task.length] if place > task.length else row[0]
            else:
                answer = row[row.index(row[place]) + 1]
            assert answer == wanted[place]


Said = Callable[..., list[str]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """What benchmarks/quality.py prints when it is called so, line by line."""

    def lines(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["quality.py", *words])
        quality.main()
        return capsys.readouterr().out.splitlines()

    return lines


def test_a_study_runs_and_goes_on_where_it_was_stopped(tmp_path: Path, said: Said) -> None:
    out = tmp_path / "not" / "there" / "quality.json"

    def run(*more: str) -> list[str]:
        return [
            line
            for line in said("run", "--studies", "smoke-recall", "--out", str(out), *more)
            if "smoke-recall/" in line
        ]

    # Two dropouts with the first seed, the better one with the two others.
    assert len(run("--contestants", "resolvent")) == 4
    assert len(run()) == 4
    cells = json.loads(out.read_text())["cells"]
    assert len(cells) == 8 and all(0 <= cell["answers"]["4x"] <= 1 for cell in cells.values())
    for name in ("resolvent", "attention"):
        mine = {Cell.named(key): cell for key, cell in cells.items() if Cell.named(key).contestant == name}
        swept = [cell for cell in mine if cell.seed == 0]
        assert {cell.dropout for cell in swept} == {0.0, 0.1}
        best = min(swept, key=lambda cell: mine[cell]["choosing"])
        assert {cell.dropout for cell in mine if cell.seed} == {best.dropout}


def test_knobs_are_turned_one_after_another_at_the_best_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best, ran = {"rate": 2e-3, "weight_decay": 1.0, "dropout": 0.21, "token_dropout": 0.05}, []

    def pretend(_: Any, arguments: tuple[Any, ...], **__: Any) -> Ended:
        cell = arguments[0]
        ran.append(cell)
        loss = 1 + sum(abs(getattr(cell, knob) - value) for knob, value in best.items())
        return Ended(seconds=0.0, result=json.dumps({"choosing": loss, "test": loss}).encode())

    monkeypatch.setattr(quality, "run_apart", pretend)
    monkeypatch.setattr(quality.Runner, "time_steps", lambda _: None)
    knobs = {"rates": (1e-3, 2e-3), "weight_decays": (0.1, 1.0), "dropouts": (0.1, 0.2, 0.3)}
    study = replace(STUDIES["smoke"], contestants=("ours",), **knobs, token_dropouts=(0.0, 0.05))
    given = {"out": tmp_path / "q.json", "jobs": 1, "threads": 1, "data": None, "contestants": None, "cells": None}
    quality.Runner([study], argparse.Namespace(**given, stop_after=math.inf)).run()
    # Two rates, one more decay, two more dropouts, tokens lost too; then two more seeds of the best.
    swept = [(1e-3, 0.1, 0.1), (2e-3, 0.1, 0.1), (2e-3, 1.0, 0.1), (2e-3, 1.0, 0.2), (2e-3, 1.0, 0.3)]
    settings = [(cell.rate, cell.weight_decay, cell.dropout) for cell in ran]
    assert settings == [*swept, *3 * [(2e-3, 1.0, 0.2)]]
    assert [(cell.token_dropout, cell.seed) for cell in ran] == [*5 * [(0, 0)], (0.05, 0), (0.05, 1), (0.05, 2)]
    # What is there is not run again; a better one that was run beside the sweep is what gets the seeds.
    where = {"rate": 2e-3, "weight_decay": 1.0, "dropout": 0.21, "token_dropout": 0.05}
    beside = Cell(study="smoke", contestant="ours", **where, seed=0)
    ran.clear()
    quality.Runner([study], argparse.Namespace(**given, stop_after=math.inf)).run()
    assert not ran
    named = {**given, "cells": [beside]}
    quality.Runner([study], argparse.Namespace(**named, stop_after=math.inf)).run()
    quality.Runner([study], argparse.Namespace(**given, stop_after=math.inf)).run()
    assert ran == [beside, *(msgspec.structs.replace(beside, seed=seed) for seed in (1, 2))]


def test_a_cell_is_trained_with_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[ResNetBKForCausalLM] = []

    def remembered(*arguments: Any) -> ResNetBKForCausalLM:
        built.append(build(*arguments))
        return built[-1]

    monkeypatch.setattr(training, "build", remembered)
    cell = Cell(study="smoke", contestant="ours", rate=4e-3, dropout=0.1, token_dropout=0.2, seed=0)
    training.run(cell, None, "cpu", 1)
    config = built[0].config
    assert (config.dropout, config.token_dropout) == (0.1, 0.2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smoke/ours", "smoke/ours is no cell"),
        ("smoke/ours/0.1", "is no cell"),
        ("smok/ours/0.1/0", "there is no study smok; choose one of embedded-1m"),
        ("smoke/hybird/0.1/0", "there is no contestant hybird; choose one of ours"),
        ("smoke/ours/0.1/0", "is not of these studies: give --studies smoke"),
    ],
)
def test_a_mistyped_cell_is_one_line(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["quality.py", "run", "--out", str(tmp_path / "q.json"), "--studies", "smoke-recall", "--cells", name]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        quality.main()
    assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        (Cell(study="s", contestant="hybrid", rate=2e-3, dropout=0.2, seed=0), "s/hybrid/0.002/d0.2/0"),
        (Cell(study="s", contestant="hybrid", rate=2e-3, seed=1, share=1.25), "s/hybrid/0.002/d0/1/1.250"),
        (Cell(study="s", contestant="hybrid", rate=2e-3, weight_decay=1.0, seed=1), "s/hybrid/0.002/d0/w1/1"),
        (Cell(study="s", contestant="hybrid", rate=2e-3, token_dropout=0.05, seed=1), "s/hybrid/0.002/d0/t0.05/1"),
    ],
)
def test_a_cells_name_says_all_of_it(cell: Cell, name: str) -> None:
    assert cell.name == name and Cell.named(name) == cell


def test_the_first_studys_names_have_no_dropout() -> None:
    assert Cell.named("s/gated/0.002/1/1.381") == Cell(study="s", contestant="gated", rate=2e-3, seed=1, share=1.381)


def test_results_of_machines_side_by_side_are_put_together(tmp_path: Path, said: Said) -> None:
    def results(machine: str, **cells: Any) -> Results:
        found = nothing()
        for name, cell in cells.items():
            keep(found, "cells", name, cell, {"machine": machine})
        keep(found, "steps", f"on {machine}", {"ours": 1.0}, {"machine": machine})
        return found

    failed = {"failure": {"message": "no"}}
    paths = [tmp_path / f"{name}.json" for name in "abc"]
    write_json(paths[1], results("b", one={"test": 1.0}, two={"test": 2.0}, three=failed))
    write_json(paths[2], results("c", two={"test": 2.5}, three={"test": 3.0}, one={"test": 1.0}))
    words = " ".join(said("merge", "--into", *map(str, paths)))
    merged = json.loads(paths[0].read_text())
    machines = {
        name: merged["environments"][cell["environment"]]["machine"]
        for kind in ("cells", "steps")
        for name, cell in merged[kind].items()
    }
    assert machines == {"one": "b", "two": "b", "three": "c", "on b": "b", "on c": "c"}
    assert merged["cells"]["two"]["test"] == 2.0 and merged["cells"]["three"]["test"] == 3.0
    assert "two" in words and "one" not in words
    # Once more, nothing changes.
    assert merge(merged, json.loads(paths[1].read_text())) == [] and merged == json.loads(paths[0].read_text())


def _edition(study: str = "embedded-1m", **tests: dict[float, list[float]]) -> Edition:
    """A study by contestant and rate, with a test loss for each seed; what chooses is the same loss."""
    results = nothing()
    for contestant, by_rate in tests.items():
        for rate, losses in by_rate.items():
            for seed, loss in enumerate(losses):
                cell = Cell(study=study, contestant=contestant.replace("_", "-"), rate=rate, seed=seed)
                found = {"choosing": loss, "test": loss, "parameters": 1000, "by_position": [loss] * 16}
                keep(results, "cells", cell.name, found, {"machine": "a"})
    return of_files({"quality.json": results})


def test_with_nothing_measured_the_document_says_so() -> None:
    edition = of_files({"quality.json": nothing()})
    for name, content in contents(edition).items():
        assert content.startswith(("Not measured yet", "Nothing is measured yet")), name


def _compared(study: str = "embedded-1m", **tests: dict[float, list[float]]) -> list[str]:
    """The lines of findings' table."""
    return findings(_edition(study, **tests)).splitlines()[2:]


def test_findings_are_those_of_the_losses() -> None:
    good, bad = [2.0, 2.01, 2.02], [3.0, 3.01, 3.02]
    size, ours = "Python's source, about 1.1M parameters", "2.010 ± 0.006, 3 seeds"
    against = "{} | {} ± 0.006, 3 seeds | {} (".format
    said = _compared(ours={8e-3: good}, attention={8e-3: bad}, gated={8e-3: bad}, ours_gated={8e-3: good})
    won, family, hybrid = said
    assert won.startswith(f"| {size} | {ours} | {against('the Transformer', '3.010', '-1.000')}-1.0")
    assert won.endswith(" | -122.5 | **wins** |")
    # What is the line above's stands there alone.
    mamba = CONTESTANTS["gated"].label
    assert family.startswith(f"|  |  | {against(f'the best of Mamba{chr(39)}s family: {mamba}', '3.010', '-1.000')}")
    assert f"the best of it in a hybrid: {CONTESTANTS['ours-gated'].label}" in hybrid
    assert hybrid.endswith("| +0.0 | no difference is shown |")
    lost, family = _compared(ours={8e-3: bad}, attention={8e-3: good}, gated={8e-3: good})
    assert lost.endswith("| +122.5 | **loses** |") and family.endswith("| **loses** |")
    (one,) = _compared(ours={8e-3: good[:1]}, attention={8e-3: bad})
    assert one.endswith("| 2.000, 1 seed | the Transformer | 3.010 ± 0.006, 3 seeds | -1.010 |  | too few seeds |")
    # As are seeds that all come to the same.
    (same,) = _compared(ours={8e-3: [2.0, 2.0]}, attention={8e-3: [3.0, 3.0]})
    assert same.endswith("| -1.000 |  | too few seeds |")


def test_at_equal_time_the_quicker_one_has_more_steps() -> None:
    """Whichever it is."""

    def longer(name: str) -> list[str]:
        edition = _edition(ours={8e-3: [2.0, 2.1]}, attention={8e-3: [3.0, 3.1]})
        for seed in (0, 1):
            cell = Cell(study="embedded-1m", contestant=name, rate=8e-3, seed=seed, share=1.25)
            found = {"choosing": 1.0, "test": 1.0 + 0.1 * seed, "parameters": 1000, "by_position": [1.0] * 16}
            keep(edition.results, "cells", cell.name, found, {"machine": "a"})
        return findings(edition).splitlines()[2:]

    with_equal_steps, theirs = longer("attention")
    assert "| the Transformer | 3.050" in with_equal_steps
    assert theirs.startswith(
        "|  |  | the Transformer at equal time, 1.25 times the steps | 1.050 ± 0.050, 2 seeds | +1."
    )
    _, ours = longer("ours")
    assert ours.startswith(
        "|  | 1.25 times the steps: 1.050 ± 0.050, 2 seeds | the Transformer at equal time | 3.050 ±"
    )


def test_findings_say_what_ours_comes_to_in_other_settings_and_against_the_best_transformer() -> None:
    worst, bad, good, best = ([loss, loss + 0.01, loss + 0.02] for loss in (4.0, 3.0, 2.5, 2.0))
    losses = {"ours": {4e-3: worst}, "attention": {4e-3: bad}, "ours_short_text": {4e-3: good}}
    said = "\n".join(_compared("shakespeare-30m", **losses, attention_plain={4e-3: best}))
    plain = "the best Transformer: Transformer, no convolution | 2.010 ± 0.006, 3 seeds"
    short = "ours for short texts: 2.510 ± 0.006, 3 seeds | the Transformer | 3.010 ± 0.006, 3 seeds | -0.500 ("
    assert short in said and f"|  |  | {plain} | +0.500 (" in said and "+61.2 | **loses**" in said
    # The default too.
    assert f"|  |  | {plain} | +2.000 (" in said
    said = "\n".join(_compared("shakespeare-30m", **losses, attention_plain={4e-3: worst}))
    assert short in said and "the best Transformer" not in said


def test_sources_name_a_machine_once_with_its_commits() -> None:
    results = nothing()
    hardware = {"cpu": "A CPU", "cores": 2, "threads": 2, "gpu": None}
    versions = {"python": "3.12", "packages": {"torch": "2.11"}}
    for place, (cpu, commit) in enumerate([("A CPU", "abc"), ("Another", "abc"), ("A CPU", "def"), ("A CPU", "abc")]):
        environment = {"hardware": {**hardware, "cpu": cpu}, **versions, "commit": commit, "at": place}
        keep(results, "cells", f"embedded-1m/ours/0.008/{place}", {"choosing": 1.0}, environment)
    first, second = sources(of_files({"quality.json": results})).splitlines()
    assert "A CPU" in first and first.endswith(", commits abc, def")
    assert "Another" in second and second.endswith(", commit abc")


def _recall(**shares: dict[float, list[float]]) -> Edition:
    """By contestant and rate, each seed's share of right answers at all lengths; all have learned what chooses."""
    results = nothing()
    for contestant, by_rate in shares.items():
        for rate, of_seeds in by_rate.items():
            for seed, share in enumerate(of_seeds):
                cell = Cell(study="recall", contestant=contestant.replace("_", "-"), rate=rate, seed=seed)
                found = {"choosing": -1.0, "answers": dict.fromkeys(STUDIES["recall"].tests, share)}
                keep(results, "cells", cell.name, found, {"machine": "a"})
    return of_files({"quality.json": results})


def test_of_rates_that_chose_alike_the_smallest_counts_and_a_seed_that_failed_is_seen() -> None:
    edition = _recall(ours_half={3e-3: [0.8, 0.8], 1e-3: [1.0, 0.0]}, attention={1e-3: [0.98, 0.96]})
    lines = table(edition, STUDIES["recall"]).splitlines()
    assert "| 0.001 | 2 | 50.0% (lowest 0.0%) |" in lines[2] and "| 0.001 | 2 | 97.0% |" in lines[3]
    said = findings(edition)
    assert "50.0% of the values rightly (seeds: 100.0%, 0.0%), which is **worse**" in said
    assert "which is no worse than" in findings(_recall(ours_half={1e-3: [1.0]}, attention={1e-3: [1.0]}))


def test_several_seeds_choose_better_than_one() -> None:
    """What the first seed prefers stands, unless what has three seeds is better on their average."""
    study = STUDIES["embedded-1m"]

    def best(**losses: list[float]) -> Row:
        results = nothing()
        for rate, of_seeds in losses.items():
            for seed, choosing in enumerate(of_seeds):
                cell = Cell(study=study.name, contestant="ours", rate=float(rate.removeprefix("r")), seed=seed)
                found = {"choosing": choosing, "test": 10 + choosing, "parameters": 1000}
                keep(results, "cells", cell.name, found, {"machine": "a"})
        (row,) = rows(results, study)
        return row

    assert best(r1=[2.0], r2=[2.1, 1.8, 1.8]).best.rate == 2.0
    assert best(r1=[2.0], r2=[2.1, 1.8, 1.8]).losses == [12.1, 11.8, 11.8]
    assert best(r1=[2.0, 2.0], r2=[2.1, 1.8]).best.rate == 1.0
    assert best(r1=[2.0], r2=[2.1, 2.0, 2.0]).best.rate == 1.0
    # A single seed that is better than others' average was not better than the first seed of theirs.
    assert best(r1=[2.0, 2.4, 2.4], r2=[2.1]).best.rate == 1.0


def test_tables_say_which_rates_and_dropouts_are_at_an_edge() -> None:
    edition = _edition(ours={4e-3: [3.0], 8e-3: [2.0], 1.6e-2: [3.0]}, attention={4e-3: [2.0], 8e-3: [3.0]})
    lines = table(edition, STUDIES["embedded-1m"]).splitlines()
    assert "| 0.008 |" in lines[2] and "| 0.004 (edge) |" in lines[3]

    def at_edge(dropout: float, *tried: float) -> bool:
        best = Cell(study="s", contestant="a", rate=1.0, dropout=dropout, seed=0)
        row = Row(best=best, tried={"rate": (1.0,), "dropout": tried, "weight_decay": (0.1,)}, cells=())
        assert not row.is_at_edge("weight_decay")
        return row.is_at_edge("dropout")

    assert at_edge(0.3, 0.2, 0.3) and at_edge(0.2, 0.2, 0.3) and at_edge(0.1, 0.0, 0.1)
    assert not (at_edge(0.0, 0.0, 0.1) or at_edge(0.2, 0.2) or at_edge(0.2, 0.1, 0.2, 0.3))


def test_tables_say_how_many_tokens_were_lost_where_that_was_tried() -> None:
    edition = _edition(ours={8e-3: [2.0]}, attention={8e-3: [3.0]})
    study = STUDIES["embedded-1m"]
    assert "token dropout" not in table(edition, study)
    losing = Cell(study="embedded-1m", contestant="ours", rate=8e-3, token_dropout=0.1, seed=0)
    keep(edition.results, "cells", losing.name, {"choosing": 1.5, "test": 1.5, "parameters": 1000}, {"machine": "a"})
    lines = table(edition, study).splitlines()
    assert "| rate | token dropout | test loss" in lines[0]
    assert "| 0.008 | 0.1 (edge) | 1.500 |" in lines[2] and "| 0.008 | 0 | 3.000 |" in lines[3]


def test_the_document_is_that_of_its_results() -> None:
    assert write(check=True) == 0


def test_the_published_studies_have_contestants_that_there_are() -> None:
    for study in STUDIES.values():
        assert set(study.contestants) <= set(CONTESTANTS) and len(set(study.contestants)) == len(study.contestants)
        assert study.base in study.contestants
