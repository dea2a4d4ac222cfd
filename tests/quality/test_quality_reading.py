"""How held-out text is read: each token once, with what stands before it in its window, and of the right kind."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from quality_study import training  # noqa: E402
from quality_study.cells import Cell, keep, nothing  # noqa: E402
from quality_study.contestants import CONTESTANTS, build  # noqa: E402
from quality_study.document_reading import by_kind, by_window  # noqa: E402
from quality_study.editions import Edition, of_files  # noqa: E402
from quality_study.reading import KINDS, SEE_ALL, kinds_of, loss_by_kind, loss_in_windows, losses_by_window  # noqa: E402
from quality_study.tasks import Text  # noqa: E402
from resnet_bk.bench.windowed_attention import windowed  # noqa: E402
from resnet_bk.models import ResNetBKConfig, ResNetBKForCausalLM  # noqa: E402
from resnet_bk.ops.loss import IGNORE_INDEX  # noqa: E402
from resnet_bk.training.evaluate import evaluate  # noqa: E402

VOCAB = 7
LENGTH = 16


@pytest.fixture(scope="module")
def model() -> ResNetBKForCausalLM:
    torch.manual_seed(0)
    return ResNetBKForCausalLM(
        ResNetBKConfig(vocab_size=VOCAB, hidden_size=16, num_layers=3, num_attention_heads=2, num_experts=1)
    ).eval()


def _tokens(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(VOCAB, size=count)


@torch.no_grad()
@pytest.mark.parametrize(("length", "stride"), [(16, 16), (16, 2), (16, 5), (64, 64), (1000, 1000), (100, 3)])
def test_each_token_is_said_once_in_the_first_window_that_has_it(
    model: ResNetBKForCausalLM, length: int, stride: int
) -> None:
    tokens = _tokens(101)
    nats = []
    starts = sorted({min(start, max(0, 100 - length)) for start in range(0, 100, stride)})
    for place in range(1, 101):
        start = next(start for start in starts if start < place <= start + length)
        logits = model(torch.from_numpy(tokens[start:place])[None]).logits[0, -1]
        nats.append(float(cross_entropy(logits.double(), torch.tensor(tokens[place]))))
    found = loss_in_windows(model, tokens, length, stride, "fp32")
    assert found == pytest.approx(np.mean(nats), abs=1e-5)


def test_windows_as_long_as_trainings_are_those_of_evaluation(model: ResNetBKForCausalLM) -> None:
    tokens = _tokens(8 * LENGTH + 1)
    found = losses_by_window(model, tokens, LENGTH, "fp32")
    assert list(found) == ["16", "64", "256", "sliding", "windowed"] and len(set(found.values())) == 5
    wanted = evaluate(model, tokens, batch_size=3, sequence_length=LENGTH).loss
    assert found["16"] == pytest.approx(wanted, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["attention", "attention-plain", "attention-less-lost-reads", "ours", "ours-short-text"]
)
def test_a_window_of_attention_hides_what_is_before_it(name: str) -> None:
    """Through one block of attention a token feels itself and ``window - 1`` more; within a window nothing changes."""
    window, every = 5, {"local_attention_every": 1} if name.startswith("ours") else {}
    contestant = replace(CONTESTANTS[name], fields={**CONTESTANTS[name].fields, "conv_size": 0, **every})
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}
    mine = build(contestant, shape, 0).eval()
    ids = torch.from_numpy(_tokens(24))[None]
    before = mine(ids, use_cache=False).logits
    with windowed(mine, window, SEE_ALL):
        found = mine(ids, use_cache=False).logits
        for place in range(24):
            alone = mine(ids[:, max(0, place - window + 1) : place + 1], use_cache=False).logits[:, -1]
            torch.testing.assert_close(found[:, place], alone)
    torch.testing.assert_close(found[:, :window], before[:, :window])
    assert not torch.allclose(found[:, window:], before[:, window:])
    torch.testing.assert_close(mine(ids, use_cache=False).logits, before, rtol=0, atol=0)


def test_a_convolution_stays_where_attention_gets_a_window() -> None:
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_layers": 3, "num_attention_heads": 2}
    for name in ("attention", "ours", "attention-conv-less-lost-reads"):
        mine = build(CONTESTANTS[name], shape, 0).eval()
        ids = torch.from_numpy(_tokens(24))[None]
        with torch.no_grad(), windowed(mine, 24, SEE_ALL):
            found = mine(ids, use_cache=False).logits
        torch.testing.assert_close(found, mine(ids, use_cache=False).logits)


def test_attention_with_other_positions_gets_no_window() -> None:
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_layers": 3, "num_attention_heads": 2}
    mine = build(CONTESTANTS["hybrid-forgetting"], shape, 0).eval()
    assert "windowed" not in losses_by_window(mine, _tokens(40), LENGTH, "fp32")


@settings(deadline=None)
@given(phrase=st.integers(2, 4), length=st.integers(4, 9), seed=st.integers(0, 50), windows=st.integers(1, 4))
def test_kinds_are_their_definition(phrase: int, length: int, seed: int, windows: int) -> None:
    test = np.random.default_rng(seed).integers(3, size=windows * length + 1)
    train = np.random.default_rng(seed + 1).integers(3, size=12)
    text = Text(vocab_size=3, phrase=phrase, train=train, choosing=test, test=test)
    starts = np.arange(windows) * length
    found = kinds_of(test, starts, length, text)
    learned = {tuple(train[start : start + phrase]) for start in range(len(train) - phrase + 1)}
    for row, start in enumerate(starts):
        for column in range(length):
            end = start + column + 2  # behind the predicted token
            if end - phrase < start:
                assert found[row, column] == IGNORE_INDEX
                continue
            mine = tuple(test[end - phrase : end])
            earlier = {tuple(test[begin : begin + phrase]) for begin in range(start, end - phrase)}
            name = {(True, True): 0, (True, False): 1, (False, True): 2, (False, False): 3}[
                mine in learned, mine in earlier
            ]
            assert found[row, column] == name


def test_kinds_losses_are_all_of_the_loss(model: ResNetBKForCausalLM) -> None:
    """Of phrases of two every token ends one; weighted by their shares the kinds' losses are the mean."""
    test = _tokens(8 * LENGTH + 1)
    text = Text(vocab_size=VOCAB, phrase=2, train=_tokens(20, seed=1), choosing=test, test=test)
    found = loss_by_kind(model, test, text, LENGTH, "fp32")
    assert list(found) == list(KINDS)
    assert sum(kind["share"] for kind in found.values()) == pytest.approx(1)
    mean = sum(kind["share"] * kind["loss"] for kind in found.values())
    assert mean == pytest.approx(loss_in_windows(model, test, LENGTH, LENGTH, "fp32"), abs=1e-5)


def test_what_is_read_is_read_by_the_weights_that_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two evaluations is the better one: the model is taken from there."""
    seen: list[dict[str, torch.Tensor]] = []

    def losses(model: ResNetBKForCausalLM, *_: Any) -> dict[str, float]:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"choosing": float(len(seen)), "test": 10.0 + len(seen), "held_out": 20.0 + len(seen)}

    def read(model: ResNetBKForCausalLM, *_: Any) -> dict[str, Any]:
        assert all(torch.equal(value, seen[0][name]) for name, value in model.state_dict().items())
        assert any(not torch.equal(value, seen[1][name]) for name, value in model.state_dict().items())
        return {"read": True}

    monkeypatch.setattr(training, "_losses", losses)
    monkeypatch.setattr(training, "_read", read)
    found = training.run(Cell(study="smoke", contestant="ours", rate=4e-3, seed=0), None, "cpu", 1)
    assert found["read"] and found["test"] == 11.0 and found["best_step"] == 2 and len(seen) == 2


def _edition(study: str = "embedded-1m", **by_contestant: list[SimpleNamespace]) -> Edition:
    results = nothing()
    for contestant, cells in by_contestant.items():
        for seed, cell in enumerate(cells):
            found: dict[str, Any] = {"choosing": 1.0, "test": 2.0, "parameters": 1000, "by_position": [1.0] * 16}
            name = Cell(study=study, contestant=contestant.replace("_", "-"), rate=8e-3, seed=seed).name
            keep(results, "cells", name, {**found, **vars(cell)}, {"machine": "a"})
    return of_files({"quality.json": results})


def _read_in(choosing: dict[str, float], test: dict[str, float], known: float) -> SimpleNamespace:
    kinds = {"in both": {"share": 0.25, "loss": known}, "in neither": {"share": 0.75, "loss": 4 * known}}
    return SimpleNamespace(by_window={"choosing": choosing, "test": test}, by_kind=kinds)


def test_the_window_is_chosen_by_the_half_that_chooses() -> None:
    mine = [
        _read_in({"128": 3, "512": 2, "sliding": 1}, {"128": 5 + tip, "512": 6 + tip, "sliding": 5 + tip}, 1 + tip)
        for tip in (0, 0.01)
    ]
    theirs = [
        _read_in({"128": 2, "512": 3, "sliding": 1}, {"128": 7 + tip, "512": 1, "sliding": 6.5 + tip}, 1.5 + tip)
        for tip in (0, 0.01)
    ]
    edition = _edition(ours=[*mine, SimpleNamespace()], attention=theirs)
    said = by_window(edition)
    assert "| ResNet-BK (ours) | 2 | 5.005 ± 0.005 | **6.005 ± 0.005** | 5.005 ± 0.005 |" in said
    assert "| Transformer | 2 | **7.005 ± 0.005** | 1.000 ± 0.000 | 6.505 ± 0.005 |" in said
    ours, theirs = "| 6.005 ± 0.005, 2 seeds |", "7.005 ± 0.005, 2 seeds | -1.000 ("
    assert f"{ours} the Transformer | {theirs}" in said and "| **wins** |" in said
    assert f"{ours} the Transformer with 8 times the work | 6.505 ± 0.005, 2 seeds | -0.500 (" in said
    assert "best Transformer" not in said
    kinds = by_kind(edition)
    assert "| in neither | 75.0% | 4.020 ± 0.020 | 6.020 ± 0.020 | -2.000 (" in kinds and "| -1.5000 |" in kinds
    assert "| in both | 25.0% |" in kinds and "| -0.1250 |" in kinds and "in the window" not in kinds


def test_a_window_of_attention_is_chosen_as_any_other_by_the_seeds_that_were_read_so() -> None:
    """Two of three Transformers were; the third has the best of the other windows, and counts there."""
    ours, short, long = ({"128": loss, "512": loss + 1} for loss in (3.0, 4.0, 1.0))
    mine = [_read_in(ours, {name: loss + tip for name, loss in ours.items()}, 1.0 + tip) for tip in (0, 0.02)]
    seen = [{**short, "windowed": 3.5 + tip, "sliding": 3.4 + tip} for tip in (0, 0.02)]
    theirs = [_read_in(one, one, 1.5) for one in (*seen, {**long, "sliding": 3.41})]
    said = by_window(_edition(ours=mine, attention=theirs))
    assert "| 128 tokens | 512 tokens | 2,048 tokens, attention to the last 128 | 128 tokens, 8 times over |" in said
    assert "| ResNet-BK (ours) | 2 | **3.010 ± 0.010** | 4.010 ± 0.010 |  |  |" in said
    assert "| Transformer | 3 | 3.000 ± 1.000 | 4.000 ± 1.000 | **3.510 ± 0.010 (2 seeds)** | 3.410 ± 0.006 |" in said
    assert "| 3.010 ± 0.010, 2 seeds | the Transformer | 3.510 ± 0.010, 2 seeds | -0.500 (" in said


def test_ours_meets_the_best_transformer_too() -> None:
    def at(loss: float) -> list[SimpleNamespace]:
        losses = [{"256": loss + tip, "sliding": loss + tip} for tip in (0, 0.01)]
        return [_read_in(one, one, one["256"]) for one in losses]

    said = by_window(_edition("shakespeare-30m", ours=at(2.0), attention=at(3.0), attention_plain=at(1.5)))
    assert "| the Transformer | 3.005 ± 0.005, 2 seeds | -1.000 (" in said
    assert "| the best Transformer: Transformer, no convolution | 1.505 ± 0.005, 2 seeds | +0.500 (" in said
    assert said.count("**wins**") == 2 and said.count("**loses**") == 1  # with overlapping windows too


def test_of_contestants_that_were_not_read_so_there_is_no_table() -> None:
    edition = _edition(ours=[SimpleNamespace()], attention=[SimpleNamespace()])
    assert by_window(edition) == by_kind(edition) == "Not measured yet."
