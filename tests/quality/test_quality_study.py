"""The study's own parts: mixers equal what they vary, contestants are causal and of one size, tasks have answers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from quality_study.contestants import CONTESTANTS, build, config_of  # noqa: E402
from quality_study.delta import delta_chunked, delta_recurrent  # noqa: E402
from quality_study.mixers import Change, ChangedResolvent  # noqa: E402
from quality_study.tasks import Copying, Needle, Recall, Synthetic  # noqa: E402
from resnet_bk.layers import ResolventMixer  # noqa: E402
from resnet_bk.ops.loss import IGNORE_INDEX  # noqa: E402

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_layers": 4,
    "num_attention_heads": 2,
    "resolvent_longest_memory": 32.0,
}
AVAILABLE = [contestant for contestant in CONTESTANTS.values() if contestant.is_available]


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


def test_without_a_change_the_changed_mixer_is_the_librarys() -> None:
    model = build(CONTESTANTS["resolvent"], SHAPE, seed=1).eval()
    ids = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    config = config_of(CONTESTANTS["resolvent"], SHAPE)
    for block in model.model.layers:
        assert isinstance(block.mixer, ResolventMixer)
        changed = ChangedResolvent(config, Change())
        changed.load_state_dict(block.mixer.state_dict())
        block.mixer = changed
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)


def test_a_change_begins_with_the_memories_of_the_library() -> None:
    ours, changed = (build(CONTESTANTS[name], SHAPE, seed=1) for name in ("resolvent", "input-gate"))
    for mine, other in zip(ours.model.layers, changed.model.layers, strict=True):
        torch.testing.assert_close(other.mixer.log_gap, mine.mixer.log_gap)


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
    assert all(contestant.name == "constant-gap" and "potential" in name for name in without)


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


def test_a_study_runs_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    out = tmp_path / "quality.json"

    def run(*more: str) -> list[str]:
        command = [sys.executable, str(BENCHMARKS / "quality.py"), "run", "--studies", "smoke-recall"]
        command += ["--out", str(out), *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        return [line for line in done.stdout.splitlines() if "smoke-recall/" in line]

    assert len(run("--contestants", "resolvent")) == 3
    assert len(run()) == 3
    assert run() == []
    cells = json.loads(out.read_text())["cells"]
    assert len(cells) == 6 and all(0 <= cell["answers"]["4x"] <= 1 for cell in cells.values())
