"""Checkpoints: whole or refused, and written so that a failure leaves what was there."""

import hashlib
import json
import random
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from small_training import (
    assert_same_state,
    files_of_at_most,
    finish,
    refused,
    resume,
    start,
    state_without_times,
    tensors,
    with_training,
)
from transformers import AutoModelForCausalLM

from resnet_bk.errors import UserError
from resnet_bk.training.checkpoint import (
    TrainingState,
    checkpoints,
    load_model_checkpoint,
    prune_checkpoints,
    restore_optimizer,
    save_checkpoint,
    step_of,
    verify_checkpoint,
)
from resnet_bk.training.optimizer import build_optimizer
from resnet_bk.training.run import find_checkpoint, open_run
from resnet_bk.training.step import build_scaler

FILES = [
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_file, shared_token_cache):
    """A run of 4 steps with checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESNET_BK_CACHE", str(shared_token_cache))
        finish(start(out, text_file, steps=4, save_every=2))
    return out


@pytest.fixture
def run_folder(trained, tmp_path):
    """A copy to damage."""
    return shutil.copytree(trained, tmp_path / "run")


def checkpoint_of(run_folder, step=4):
    return run_folder / "checkpoints" / f"step-{step:08d}"


def all_files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_holds_these_files_and_no_pickle(trained):
    for step in (2, 4):
        assert sorted(path.name for path in checkpoint_of(trained, step).iterdir()) == FILES
        verify_checkpoint(checkpoint_of(trained, step))
    manifest = json.loads((checkpoint_of(trained) / "manifest.json").read_text())
    assert sorted(manifest) == [name for name in FILES if name != "manifest.json"]


def test_checkpoints_are_found_by_run_and_by_name(trained):
    assert [step_of(path) for path in checkpoints(trained / "checkpoints")] == [2, 4]
    for path, step in ((trained, 4), (checkpoint_of(trained, 2), 2)):
        run, checkpoint = find_checkpoint(path)
        assert (run.folder, checkpoint) == (trained, checkpoint_of(trained, step))


def test_a_checkpoint_is_found_from_inside(trained, monkeypatch):
    monkeypatch.chdir(checkpoint_of(trained, 2))
    run, checkpoint = find_checkpoint(Path())
    assert (run.folder, checkpoint.resolve()) == (trained, checkpoint_of(trained, 2).resolve())


def test_from_pretrained_gives_the_same_logits(trained):
    ids = torch.arange(20)[None]
    ours = load_model_checkpoint(checkpoint_of(trained))
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint_of(trained))
    assert not ours.training and not theirs.training
    assert torch.equal(theirs(ids).logits, ours(ids).logits)
    older = load_model_checkpoint(checkpoint_of(trained, 2))
    assert not torch.equal(older(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_restored_is_what_was_saved(tmp_path, text_file, tied):
    ready = start(tmp_path / "run", text_file, steps=3, precision="fp16", model={"tie_word_embeddings": tied})
    finish(ready)
    trainer = ready.trainer
    (saved,) = [path for path in checkpoints(trainer.run.checkpoint_folder) if step_of(path) == 3]
    model = load_model_checkpoint(saved)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    optimizer = build_optimizer(model, trainer.config)
    scaler = build_scaler(torch.device("cpu"), "fp16")
    scaler.load_state_dict({**scaler.state_dict(), "scale": 3.0, "_growth_tracker": 7})
    state = restore_optimizer(saved, model, optimizer, scaler)
    assert state.step == 3 and state.seconds > 0
    assert scaler.state_dict() == trainer.scaler.state_dict()
    for (name, ours), theirs in zip(model.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        restored, original = optimizer.state[ours], trainer.optimizer.state[theirs]
        assert restored.keys() == original.keys()
        assert all(torch.equal(restored[key], original[key]) for key in original), name
    again = save_checkpoint(tmp_path / "again", model, optimizer, scaler, state)
    assert_same_state(again, saved)


def truncate(path, generator):
    content = path.read_bytes()
    # The line break at a JSON file's end is not content.
    path.write_bytes(content[: generator.randrange(len(content.rstrip()))])


def flip_a_byte(path, generator):
    content = bytearray(path.read_bytes())
    place = generator.choice([place for place, byte in enumerate(content) if not chr(byte).isspace()])
    content[place] ^= generator.randrange(1, 256)
    path.write_bytes(content)


def delete(path, generator):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, delete])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_refused_and_the_older_checkpoint_still_loads(run_folder, file, damage):
    newest, older = checkpoint_of(run_folder), checkpoint_of(run_folder, 2)
    original = (newest / file).read_bytes()
    for seed in range(4):
        (newest / file).write_bytes(original)
        damage(newest / file, random.Random(seed))
        with refused(r"(restore it|is not a checkpoint)"):
            load_model_checkpoint(newest)
    before = all_files(run_folder)
    with refused(r"(restore it|is not a checkpoint)"):
        resume(run_folder)
    assert all_files(run_folder) == before
    load_model_checkpoint(older)


def test_no_byte_of_the_manifest_can_change_unnoticed(run_folder):
    path, generator = checkpoint_of(run_folder) / "manifest.json", random.Random(0)
    content = path.read_bytes()
    for place, byte in enumerate(content):
        if not chr(byte).isspace():
            # "e" in particular: in the middle of a size it makes a number that no integer is.
            for new in {generator.randrange(256), ord("e"), byte ^ 1} - {byte}:
                path.write_bytes(content[:place] + bytes([new]) + content[place + 1 :])
                with pytest.raises(UserError):
                    verify_checkpoint(path.parent)
    path.write_bytes(content)
    verify_checkpoint(path.parent)


@pytest.mark.parametrize("content", ["[]", "{}", '{"state.json": 5}', '{"state.json": {"sha256": "0"}}', "null"])
def test_a_manifest_of_another_shape_is_refused(run_folder, content):
    (checkpoint_of(run_folder) / "manifest.json").write_text(content)
    with refused("manifest.json does not list files and checksums; restore it from a copy, or delete step-00000004"):
        load_model_checkpoint(checkpoint_of(run_folder))


@pytest.mark.parametrize("content", ["{}", "[]", '{"scaler": null, "steps": 4}'])
def test_a_state_of_another_shape_is_refused_though_its_checksum_is_right(run_folder, content):
    folder = checkpoint_of(run_folder)
    (folder / "state.json").write_text(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = {"sha256": hashlib.sha256(content.encode()).hexdigest(), "bytes": len(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with refused("state.json is not the state of a training; restore it from a copy"):
        resume(run_folder)


def test_the_message_says_which_file_and_how_to_go_on(run_folder):
    newest = checkpoint_of(run_folder)
    flip_a_byte(newest / "model.safetensors", random.Random(0))
    with refused(
        r"step-00000004/model.safetensors does not have its checksum: a byte has changed; "
        r"restore it from a copy, or delete step-00000004 to continue from step-00000002"
    ):
        resume(run_folder)
    shutil.rmtree(checkpoint_of(run_folder, 2))
    with refused("restore it from a copy, or train again$"):
        resume(run_folder)


def test_going_on_from_the_older_checkpoint_ends_the_same(run_folder, trained):
    shutil.rmtree(checkpoint_of(run_folder))
    ready = resume(run_folder)
    assert ready.state.step == 2
    finish(ready)
    assert_same_state(checkpoint_of(run_folder), checkpoint_of(trained))


def test_a_checkpoint_of_another_model_is_refused(run_folder, tmp_path, text_file):
    finish(start(tmp_path / "wider", text_file, steps=4, model={"hidden_size": 48}))
    shutil.rmtree(checkpoint_of(run_folder))
    shutil.copytree(checkpoint_of(tmp_path / "wider"), checkpoint_of(run_folder))
    with refused("step-00000004 holds another model than .* records; restore one of them"):
        resume(run_folder)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with refused("is not a checkpoint .it has no manifest.json.; give a run folder or a step-... folder"):
        load_model_checkpoint(tmp_path)
    with refused("is not a run folder"):
        find_checkpoint(tmp_path / "nowhere")


def test_only_the_newest_checkpoints_are_kept(tmp_path, text_file):
    finish(start(tmp_path / "run", text_file, steps=5, save_every=1, keep_checkpoints=3))
    assert [step_of(path) for path in checkpoints(tmp_path / "run" / "checkpoints")] == [3, 4, 5]


def test_pruning_clears_away_what_killed_processes_left(run_folder):
    parent = run_folder / "checkpoints"
    for name in (".step-00000006.x1y2", ".step-00000001.deleted"):
        (parent / name).mkdir()
        (parent / name / "model.safetensors").write_text("half")
    (parent / "notes.txt").write_text("the user's own")
    (parent / "step-00000003-copy").mkdir()
    prune_checkpoints(parent, keep=2)
    assert sorted(path.name for path in parent.iterdir()) == [
        "notes.txt",
        "step-00000002",
        "step-00000003-copy",
        "step-00000004",
    ]


def size_of(run_folder, file):
    return (checkpoint_of(run_folder) / file).stat().st_size


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "optimizer.safetensors"])
def test_a_disk_that_fills_leaves_the_last_checkpoint_and_no_half_one(run_folder, file):
    """The system refuses the last byte of ``file`` when the run saves next."""
    before = all_files(run_folder / "checkpoints")
    with ExitStack() as stack:

        def fill_the_disk_before_the_save(entry):
            if "validation_loss" in entry:
                stack.enter_context(files_of_at_most(size_of(run_folder, file) - 1))

        ready = resume(run_folder, steps=6, observer=fill_the_disk_before_the_save)
        with refused("cannot write .*step-00000006.*; free some space or choose another place"):
            finish(ready)
    assert all_files(run_folder / "checkpoints") == before
    assert sorted(path.name for path in (run_folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    load_model_checkpoint(checkpoint_of(run_folder))
    assert finish(resume(run_folder)).step == 6


@pytest.mark.parametrize("name", ["write_json", "save_file"])
def test_a_failure_at_any_other_point_leaves_no_half_checkpoint(run_folder, monkeypatch, name):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    ready = resume(run_folder, steps=6)
    with monkeypatch.context() as patch:
        patch.setattr(f"resnet_bk.training.checkpoint.{name}", full)
        with refused("cannot write .*step-00000006: No space left on device; free some space"):
            finish(ready)
    assert sorted(path.name for path in (run_folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    load_model_checkpoint(checkpoint_of(run_folder))


def test_an_interrupt_in_the_middle_of_a_save_leaves_no_half_checkpoint(run_folder, monkeypatch):
    def interrupted(*_args):
        raise KeyboardInterrupt

    ready = resume(run_folder, steps=6)
    monkeypatch.setattr("resnet_bk.training.checkpoint.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finish(ready)
    assert sorted(path.name for path in (run_folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def test_saving_again_what_is_saved_changes_nothing(run_folder):
    ready = resume(run_folder)
    before = all_files(run_folder)
    trainer = ready.trainer
    path = save_checkpoint(
        trainer.run.checkpoint_folder, trainer.model, trainer.optimizer, trainer.scaler, TrainingState(step=4)
    )
    assert path == checkpoint_of(run_folder)
    assert all_files(run_folder) == before


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(run_folder, trained):
    ready = resume(run_folder, steps=8)
    trainer = ready.trainer
    trainer.run = with_training(trainer.run, log_every=100)
    trainer.config = trainer.run.config.training

    def poison(entry):
        if entry["step"] == 5:
            trainer.model.lm_head.weight.data[0, 0] = float("nan")

    trainer.observer = poison
    with refused(
        r"the loss or its gradient is not a number at step 6; lower --learning-rate in a new run "
        r"\(the last good checkpoint is .*step-00000004\)"
    ):
        finish(ready)
    assert [step_of(path) for path in checkpoints(run_folder / "checkpoints")] == [2, 4]
    assert tensors(checkpoint_of(run_folder)) == tensors(checkpoint_of(trained))


def test_the_state_says_how_far_training_is(trained):
    assert state_without_times(checkpoint_of(trained, 2)) == {"step": 2, "scaler": {}}
    assert open_run(trained).latest_checkpoint() == checkpoint_of(trained)
