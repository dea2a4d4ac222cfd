"""A run's text is known by its content, wherever it is; and of a text that the tokenizer does not know it is said."""

import json
import shutil

import pytest
from small_run import TEXT, TRAINING, contents


@pytest.fixture
def own(cli, workspace):
    """What ``eval run`` says of the run's own text."""
    return cli("eval", "run", "--json").document


def figures(document):
    return {key: value for key, value in document.items() if key != "data"}


def move_the_book(workspace):
    (workspace / "shelf").mkdir()
    return (workspace / "book.txt").rename(workspace / "shelf" / "novel.txt")


@pytest.mark.parametrize("spelling", ["./book.txt", "{workspace}/book.txt", "copy.txt", "library", "library/*", "link"])
def test_the_runs_own_text_means_its_held_out_part_however_it_is_spelt(cli, workspace, own, spelling):
    shutil.copy("book.txt", "copy.txt")
    (workspace / "library").mkdir()
    shutil.copy("book.txt", "library/book.txt")
    (workspace / "link").symlink_to("book.txt")
    data = spelling.format(workspace=workspace)
    document = cli("eval", "run", "--data", data, "--json").document
    assert (document["split"], document["data"]) == ("validation", data)
    assert figures(document) == figures(own)
    assert f"on the held-out part of {data}," in cli("eval", "run", "--data", data).out


def test_a_folder_that_was_trained_on_is_known_elsewhere(cli, workspace):
    (workspace / "many").mkdir()
    for number in range(25):
        (workspace / "many" / f"{number:02}.txt").write_text(f"{number}: {TEXT[:200]}")
    assert cli("train", "--data", "many", "--out", "new", *TRAINING).code == 0
    here = cli("eval", "new", "--json").document
    shutil.move("many", "elsewhere")
    there = cli("eval", "new", "--data", "elsewhere", "--json").document
    assert there["split"] == "validation" and figures(there) == figures(here)


@pytest.mark.parametrize("spelling", ["book.txt", "./book.txt", "link"])
def test_what_is_in_the_place_of_the_runs_text_and_differs_is_not_taken_whole(cli, workspace, spelling):
    (workspace / "link").symlink_to("book.txt")
    with (workspace / "book.txt").open("a") as file:
        file.write("The end.\n")
    outcome = cli("eval", "run", "--data", spelling)
    assert outcome.code == 2
    assert f"the text of {spelling} is not the one run was trained on; restore it" in outcome.err


def test_a_moved_text_is_evaluated_where_it_is_now(cli, workspace, own):
    place = move_the_book(workspace)
    record = (workspace / "run" / "run.json").read_bytes()
    document = cli("eval", "run", "--data", place, "--json").document
    assert figures(document) == figures(own)
    assert (workspace / "run" / "run.json").read_bytes() == record, "who evaluates writes nothing"


def test_a_run_goes_on_with_its_text_in_another_place_and_records_it(cli, workspace):
    shutil.copytree("run", "same")
    assert cli("train", "--resume", "same", "--steps", "6").code == 0
    before = json.loads((workspace / "run" / "run.json").read_text())
    move_the_book(workspace)
    outcome = cli("train", "--resume", "run", "--steps", "6", "--data", "shelf/novel.txt")
    assert outcome.code == 0
    assert "run now records shelf/novel.txt as the place of its text" in outcome.err.splitlines()
    before["training"]["steps"] = 6
    before["data"]["data"] = before["dataset"]["data"] = "shelf/novel.txt"
    before["dataset"]["description"] = "the text file novel.txt"
    assert json.loads((workspace / "run" / "run.json").read_text()) == before, "the command stays as it was typed"
    weights = "checkpoints/step-00000006/model.safetensors"
    assert (workspace / "run" / weights).read_bytes() == (workspace / "same" / weights).read_bytes()
    assert cli("eval", "run", "--json").document["step"] == 6


def test_a_run_that_is_done_records_the_new_place_too(cli, workspace, own):
    move_the_book(workspace)
    document = cli("train", "--resume", "run", "--data", "shelf/novel.txt", "--json").document
    assert document == {"run": "run", "steps": 4, "finished": True}
    assert figures(cli("eval", "run", "--json").document) == figures(own)


def test_another_text_is_refused_before_it_is_tokenized(cli, workspace, monkeypatch):
    monkeypatch.setenv("RESNET_BK_CACHE", str(workspace / "cache"))
    (workspace / "other.txt").write_text(TEXT[::-1])
    before = contents(workspace)
    outcome = cli("train", "--resume", "run", "--steps", "9", "--data", "other.txt")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert outcome.err.startswith("error: the text of other.txt is not the one run was trained on; give the text that")
    assert contents(workspace) == before


def test_from_another_folder_the_message_says_where_was_looked(cli, workspace, monkeypatch):
    monkeypatch.chdir(workspace / "run")
    outcome = cli("eval", ".")
    assert outcome.code == 2 and f"is not there (seen from {workspace / 'run'}); give --data" in outcome.err
    assert cli("eval", ".", "--data", "../book.txt", "--json").document["split"] == "validation"


@pytest.mark.parametrize(("text", "share"), [("the lazy fox\n" * 20, 0.0), ("the lazy f0x\n" * 20, 1 / 13)])
def test_a_few_unknown_tokens_are_counted_and_no_more(cli, workspace, text, share):
    (workspace / "other.txt").write_text(text)
    outcome = cli("eval", "run", "--data", "other.txt", "--json")
    assert outcome.document["unknown_share"] == pytest.approx(share)
    assert outcome.err == ""


def test_of_a_text_that_is_mostly_unknown_it_is_said(cli, workspace):
    (workspace / "other.txt").write_text("0123456789 " * 20)
    outcome = cli("eval", "run", "--data", "other.txt", "--json")
    assert outcome.document["unknown_share"] == pytest.approx(10 / 11)
    said = "91% of this text's tokens are unknown to the run's tokenizer (char); the loss says little about it\n"
    assert outcome.err == said


def test_a_tokenizer_that_can_write_everything_has_no_unknown_share(cli, workspace):
    assert cli("train", "--data", "book.txt", "--out", "new", *TRAINING, "--tokenizer", "byte").code == 0
    (workspace / "other.txt").write_text("0123456789 é" * 20)
    outcome = cli("eval", "new", "--data", "other.txt", "--json")
    assert (outcome.document["unknown_share"], outcome.err) == (0.0, "")
