"""Starting a run: everything is checked before anything is written. And what a run folder records."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_training import (
    TEXT,
    files_of_at_most,
    finish,
    ignore,
    metrics_without_times,
    refused,
    resume,
    start,
    state_without_times,
)

from resnet_bk.cli.main import main
from resnet_bk.errors import UserError
from resnet_bk.models import ResNetBKConfig
from resnet_bk.training.config import DataConfig, TrainingConfig
from resnet_bk.training.data import prepare_dataset, train_tokenizer
from resnet_bk.training.run import RunConfig, open_run
from resnet_bk.training.start import resume_run, start_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shared_token_cache):
    """A folder with a text of its own and a run of 2 steps on it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESNET_BK_CACHE", str(shared_token_cache))
        patch.chdir(folder)
        finish(start(folder / "run", "text.txt", steps=2))
    return folder


@pytest.fixture
def workspace(trained, tmp_path, monkeypatch):
    """The current folder: a copy, so that its text can be changed."""
    folder = shutil.copytree(trained, tmp_path / "workspace")
    monkeypatch.chdir(folder)
    return folder


def everything(folder):
    return {
        path: (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns) for path in folder.rglob("*")
    }


def test_a_new_run_is_whole_before_its_first_step(tmp_path, text_file):
    ready = start(tmp_path / "runs" / "first", text_file, steps=2)
    assert ready.state.step == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["first"]
    run = open_run(tmp_path / "runs" / "first")
    assert run.latest_checkpoint().name == "step-00000000"
    assert state_without_times(run.latest_checkpoint()) == {"step": 0, "scaler": {}}
    assert resume(tmp_path / "runs" / "first").state.step == 0


def test_the_record_is_the_configuration(tmp_path, text_file):
    ready = start(tmp_path / "run", text_file, steps=2, seed=5, model={"num_experts": 3})
    recorded = RunConfig.read(tmp_path / "run" / "run.json")
    assert recorded.training == ready.trainer.config
    assert (recorded.training.seed, recorded.training.num_threads, recorded.model.num_experts) == (5, 1, 3)
    assert recorded.model.own_fields() == ready.trainer.model.config.own_fields()
    assert recorded.data == DataConfig(data=str(text_file), tokenizer="char")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["dataset"] == ready.trainer.dataset.record
    assert record["environment"]


def test_the_number_of_threads_is_recorded_and_set(tmp_path, text_file):
    torch.set_num_threads(2)
    start(tmp_path / "run", text_file, steps=1, num_threads=None)
    assert open_run(tmp_path / "run").config.training.num_threads == 2
    torch.set_num_threads(1)
    resume(tmp_path / "run")
    assert torch.get_num_threads() == 2


def test_equal_seeds_start_with_equal_weights(tmp_path, text_file):
    models = [start(tmp_path / str(n), text_file, seed=seed).trainer.model for n, seed in enumerate((1, 1, 2))]
    first, same, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_an_empty_folder_becomes_the_run(tmp_path, text_file):
    (tmp_path / "run").mkdir()
    start(tmp_path / "run", text_file)
    assert open_run(tmp_path / "run").latest_checkpoint()


def test_a_folder_that_holds_a_run_is_not_touched(workspace):
    before = everything(workspace)
    with refused("already holds a run; continue it with --resume .*run, or choose another --out"):
        start(workspace / "run", "text.txt")
    assert everything(workspace) == before


def test_a_folder_that_holds_other_files_is_not_touched(tmp_path, text_file):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    before = everything(tmp_path)
    with refused("out is not empty; choose another --out"):
        start(tmp_path / "out", text_file)
    assert everything(tmp_path) == before


def test_a_file_is_not_written_over(tmp_path, text_file):
    (tmp_path / "out").write_text("a file")
    with refused("out is a file; choose another place"):
        start(tmp_path / "out", text_file)
    assert (tmp_path / "out").read_text() == "a file"


def test_a_place_that_cannot_be_written_is_refused(tmp_path, text_file):
    (tmp_path / "file").write_text("in the way")
    before = everything(tmp_path)
    with refused("cannot write .*file/run: .*; choose another place"):
        start(tmp_path / "file" / "run", text_file)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("limit", [1_000, 30_000])
def test_a_full_disk_leaves_nothing_of_a_new_run(tmp_path, text_file, limit):
    start(tmp_path / "warm-up", text_file)  # so that the token cache is there
    with refused("cannot write .*; free some space or choose another place"), files_of_at_most(limit):
        start(tmp_path / "run", text_file)
    assert [path.name for path in tmp_path.iterdir()] == ["warm-up"]


def config_for(text_file, *, model=(), **training):
    data = DataConfig(data=str(text_file), tokenizer="char")
    dataset = prepare_dataset(data)
    model = ResNetBKConfig.from_preset("tiny", **{"vocab_size": dataset.tokenizer.vocab_size, **dict(model)})
    return RunConfig(model=model, training=TrainingConfig(**training), data=data), dataset


@pytest.mark.parametrize(
    ("model", "training", "message"),
    [
        ({}, {"sequence_length": 5000}, r"fewer than sequence_length \+ 1 = 5,001; give more text or a shorter"),
        (
            {"max_position_embeddings": 8},
            {"sequence_length": 16},
            "sequence_length 16 is more than the model's position table of 8; shorten it",
        ),
        ({"vocab_size": 10}, {"sequence_length": 16}, "vocab_size 10 is less than the tokenizer's .*; leave"),
        ({}, {"sequence_length": 16, "device": "cuda:99"}, "device cuda:99 is not available"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, text_file, model, training, message):
    config, dataset = config_for(text_file, model=model, **training)
    with refused(message):
        start_run(tmp_path / "run", config, dataset, command=[], observer=ignore)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", -1),
        ("sequence_length", 0),
        ("gradient_accumulation_steps", 0),
        ("save_every", 0),
        ("keep_checkpoints", 0),
        ("decay_steps", 0),
        ("num_threads", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("max_grad_norm", 0.0),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("seed", -1),
        ("min_learning_rate_ratio", 1.5),
        ("beta2", float("nan")),
        ("precision", "fp8"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(field, value):
    with refused(f"^{field} is "):
        TrainingConfig(**{field: value})


def test_changed_text_is_refused_on_resume(workspace):
    (workspace / "text.txt").write_text(TEXT.replace("Jack", "Jill"))
    before = everything(workspace)
    with refused("the text of text.txt is not the one run was trained on; restore it, or start a new run"):
        resume(Path("run"))
    assert everything(workspace) == before


def test_a_text_that_is_gone_is_refused_on_resume(workspace):
    (workspace / "text.txt").unlink()
    with refused("text.txt does not exist"):
        resume(Path("run"))


def test_a_vocabulary_that_has_changed_is_refused_on_resume(tmp_path, text_file, monkeypatch):
    vocabulary = tmp_path / "words.json"
    train_tokenizer("word:20", [TEXT]).save(vocabulary)
    finish(start(tmp_path / "run", text_file, steps=1, tokenizer=str(vocabulary)))
    train_tokenizer("word:21", [TEXT]).save(vocabulary)
    with refused("the vocabulary of .* is not the one .* was trained on; restore it, or start a new run"):
        resume(tmp_path / "run")


def test_a_run_whose_tokenizer_file_is_another_is_refused_by_the_command(workspace, capsys):
    other = train_tokenizer("char", [TEXT.replace("J", "K")])
    other.save(workspace / "run" / "tokenizer.json")
    with refused("tokenizer.json is not the vocabulary this run was trained with; restore it"):
        open_run(workspace / "run").tokenizer()
    before = everything(workspace)
    assert main(["train", "--resume", "run", "--steps", "3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: run/tokenizer.json is not the vocabulary")
    assert everything(workspace) == before


def test_the_run_keeps_the_tokenizer_it_was_trained_with(workspace):
    run = open_run(workspace / "run")
    assert run.tokenizer().decode(run.tokenizer().encode(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("kind"), "is not a run.json"),
        (lambda record: record.update(version=99), "has version 99, this program reads 1; update it"),
        (lambda record: record.pop("training"), "it has no section training"),
        (lambda record: record["model"].update(hidden_size="wide"), "model's hidden_size: Expected `int`, got `str`"),
        (lambda record: record["training"].update(colour="red"), "does not describe a run .*colour"),
        (lambda record: record["data"].update(colour="red"), "does not describe a run .*colour"),
        (lambda record: record["training"].update(steps="many"), "does not describe a run"),
        (lambda record: record["training"].update(steps=0), "steps is 0; give a number of at least 1"),
        (lambda record: record["model"].update(mixer="blender"), "does not describe a run .*blender"),
        (lambda record: record.update(model=None), "does not describe a run"),
        (lambda record: record.pop("dataset"), "does not record its data; restore it"),
        (lambda record: record["dataset"].pop("corpus_sha256"), "does not record its data; restore it"),
    ],
)
def test_a_damaged_record_is_refused(workspace, change, message):
    path = workspace / "run" / "run.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with refused(message):
        open_run(workspace / "run")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"null"])
def test_a_record_that_is_not_json_of_a_run_is_refused(workspace, content):
    (workspace / "run" / "run.json").write_bytes(content)
    with refused("run.json"):
        open_run(workspace / "run")


def test_a_folder_without_a_record_or_a_checkpoint_is_refused(workspace):
    with refused("is not a run folder .it has no run.json.; start one with"):
        open_run(workspace)
    shutil.rmtree(workspace / "run" / "checkpoints")
    with refused("holds no checkpoint; train again with another --out"):
        resume(Path("run"))


def test_extending_a_run_changes_its_steps_and_nothing_else(workspace):
    before = json.loads((workspace / "run" / "run.json").read_text())
    training = open_run(workspace / "run").config.training
    extended = open_run(workspace / "run").changed(steps=50)
    assert extended.config.training == replace(training, steps=50)
    assert open_run(workspace / "run").config.training == extended.config.training
    after = json.loads((workspace / "run" / "run.json").read_text())
    before["training"]["steps"] = 50
    assert after == before
    with pytest.raises(UserError):
        open_run(workspace / "run").changed(steps=0)


def test_metrics_have_what_was_seen(workspace):
    (workspace / "new").mkdir()
    seen = []
    finish(
        start(
            workspace / "new" / "run",
            "text.txt",
            observer=seen.append,
            steps=4,
            log_every=2,
            eval_every=3,
            eval_tokens=33,
            gradient_accumulation_steps=2,
        )
    )
    entries = metrics_without_times(workspace / "new" / "run")
    assert [(entry["step"], "loss" in entry) for entry in entries] == [
        (2, True),
        (3, False),
        (4, True),
        (4, False),
        (4, False),
    ]
    assert [entry["step"] for entry in seen] == [1, 2, 3, 3, 4, 4, 4]
    logged = [entry for entry in entries if "loss" in entry]
    for entry in logged:
        assert entry["tokens"] == entry["step"] * 2 * 2 * 16
        assert torch.tensor(entry["expert_load"]).sum(1).tolist() == pytest.approx([1, 1], abs=1e-3)
        assert entry["expert_load_max"] == pytest.approx(max(map(max, entry["expert_load"])), abs=1e-4)
    validation_tokens = len(prepare_dataset(DataConfig(data="text.txt", tokenizer="char")).validation.tokens) - 1
    assert [entry["validation_tokens"] for entry in entries if "loss" not in entry] == [48, 48, validation_tokens], (
        "33 rounded up to whole windows of 16, twice, then all of them"
    )


def test_resuming_does_not_train_on_a_dataset_that_is_not_the_runs(workspace, text_file):
    (workspace / "other.txt").write_text(TEXT[::-1])
    other = prepare_dataset(DataConfig(data="other.txt", tokenizer="char"))
    with refused("is not the one"):
        resume_run(open_run(workspace / "run"), other, observer=ignore)
