"""``resnet-bk generate`` reads long prompts in pieces and writes text as it comes."""

import sys

import pytest


@pytest.mark.parametrize("size", ["1", "7", str(10**30)])
def test_a_prompt_in_pieces_gives_the_same_text(cli, workspace, size):
    words = ("generate", "run", "--prompt", "The quick brown fox", "--greedy", "--max-new-tokens", "12", "--json")
    assert cli(*words, "--prefill-chunk-size", size).document["text"] == cli(*words).document["text"]


@pytest.mark.parametrize("size", ["0", "-3", "many"])
def test_a_size_of_pieces_that_is_none_is_one_line(cli, workspace, size):
    outcome = cli("generate", "run", "--prefill-chunk-size", size)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Traceback" not in outcome.err
    if size != "many":
        assert outcome.err == f"error: prefill_chunk_size is {size}; give a number of tokens, at least 1\n"


def test_text_is_written_as_it_comes(cli, workspace, monkeypatch):
    pieces, write = [], sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda text: (pieces.append(text), write(text))[1])
    assert cli("generate", "run", "--prompt", "The", "--greedy", "--max-new-tokens", "8").code == 0
    assert pieces[0] == "The"
    assert len(pieces) == 1 + 8 + 1, "the prompt, each token of a character, and the end of the line"
