"""The tokenizers: what they give back, what is unknown to them, what they refuse."""

import re
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import given, settings
from hypothesis import strategies as st
from small_training import TEXT, refused
from tokenizers import Tokenizer, models

from resnet_bk.training.data import TextTokenizer, train_tokenizer
from resnet_bk.training.data.tokenizer import END_OF_TEXT, UNKNOWN, check_tokenizer

SPECS = ["byte", "char", "word:60", "bpe:300"]
ANY_TEXT = st.text(max_size=60) | st.lists(
    st.sampled_from(
        [END_OF_TEXT, UNKNOWN, "<|", "endoftext", "\r\n", "\0", "é", "e\u0301", "😀", " the house", "\u2028"]
    )
).map("".join)


@pytest.fixture(scope="module")
def tokenizers():
    return {spec: train_tokenizer(spec, [TEXT]) for spec in SPECS}


@pytest.mark.parametrize("spec", ["byte", "bpe:300"])
@given(text=ANY_TEXT)
@settings(deadline=None, max_examples=200)
def test_byte_and_bpe_give_every_text_back(tokenizers, spec, text):
    tokenizer = tokenizers[spec]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text_id not in ids, "a text that names the special token is text"
    assert [list(ids) for ids in tokenizer.encode_many([text, text])] == [ids, ids]
    stream = tokenizer.stream_decoder()
    whole = "".join(stream.step(token) for token in ids)
    assert text.startswith(whole) if text.endswith("\ufffd") else text == whole


@given(text=st.text(max_size=60))
@settings(deadline=None)
def test_a_byte_token_is_a_byte(tokenizers, text):
    assert len(tokenizers["byte"].encode(text)) == len(text.encode())


@given(text=st.text(alphabet=sorted(set(TEXT)), max_size=60))
@settings(deadline=None)
def test_char_gives_texts_of_known_characters_back_one_token_each(tokenizers, text):
    ids = tokenizers["char"].encode(text)
    assert len(ids) == len(text)
    assert tokenizers["char"].decode(ids) == text


@given(text=ANY_TEXT)
@settings(deadline=None)
def test_characters_that_training_did_not_see_are_unknown(tokenizers, text):
    tokenizer, known = tokenizers["char"], set(TEXT)
    ids = tokenizer.encode(text)
    assert [token == tokenizer.unknown_id for token in ids] == [character not in known for character in text]
    assert tokenizer.decode(ids) == "".join(character for character in text if character in known)


def test_words_that_training_did_not_see_are_unknown(tokenizers):
    tokenizer = tokenizers["word:60"]
    ids = tokenizer.encode("the zebra, the cat.")
    assert [token == tokenizer.unknown_id for token in ids] == [False, True, True, False, False, False]
    assert tokenizer.decode(ids) == "the the cat ."


def test_word_n_keeps_the_most_frequent_words():
    tokenizer = train_tokenizer("word:4", ["red red red green green blue"])
    assert tokenizer.vocab_size == 4  # two words, the unknown token and the end of text
    ids = tokenizer.encode("red green blue")
    assert len(set(ids)) == 3
    assert [token == tokenizer.unknown_id for token in ids] == [False, False, True]


def test_bpe_n_has_n_tokens_and_merges_what_is_frequent(tokenizers):
    tokenizer = tokenizers["bpe:300"]
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 1.5


def test_sizes_of_byte_and_char(tokenizers):
    assert tokenizers["byte"].vocab_size == 256 + 1
    assert tokenizers["char"].vocab_size == len(set(TEXT)) + 2
    assert tokenizers["byte"].unknown_id is None


@pytest.mark.parametrize("spec", SPECS)
def test_training_twice_gives_the_same_vocabulary(tokenizers, spec):
    assert train_tokenizer(spec, [TEXT]).fingerprint == tokenizers[spec].fingerprint
    assert train_tokenizer(spec, [TEXT]).encode(TEXT) == tokenizers[spec].encode(TEXT)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("named_by", ["file", "folder", "other name"])
def test_a_saved_tokenizer_is_the_same_one(tokenizers, tmp_path, spec, named_by):
    path = tmp_path / ("vocabulary" if named_by == "other name" else "tokenizer.json")
    tokenizers[spec].save(path)
    loaded = train_tokenizer(str(tmp_path if named_by == "folder" else path), ["none of this is read"])
    text = f"{TEXT} {END_OF_TEXT} zebra é"
    assert loaded.fingerprint == tokenizers[spec].fingerprint
    assert loaded.encode(text) == tokenizers[spec].encode(text)
    assert loaded.unknown_id == tokenizers[spec].unknown_id
    assert loaded.end_of_text_id == tokenizers[spec].end_of_text_id is not None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("word", "tokenizer word needs a size of at least 3, as in word:4096"),
        ("word:2", "needs a size of at least 3"),
        ("word:-5", "needs a size of at least 3"),
        ("word:many", "needs a size of at least 3"),
        ("bpe:", "tokenizer bpe: needs a size of at least 257, as in bpe:4096"),
        ("bpe:256", "needs a size of at least 257"),
        ("bpe:1e4", "needs a size of at least 257"),
        ("bpe:1000001", "larger than 1,000,000 tokens; choose a smaller size"),
        ("word:" + "9" * 30, "larger than 1,000,000 tokens"),
        ("byte:5", "there is no tokenizer byte:5 (did you mean byte?); choose byte, char, word:N, bpe:N"),
        ("words:4096", "there is no tokenizer words:4096 (did you mean word:4096?); choose"),
        ("chars please", "there is no tokenizer chars please; choose"),
        ("nowhere/at/all", "there is no tokenizer nowhere/at/all; choose"),
        ("nowhere/tokenizer.json", "nowhere/tokenizer.json does not exist; check the path"),
    ],
)
def test_bad_names_and_sizes_are_refused(spec, message):
    with refused(re.escape(message)):
        train_tokenizer(spec, [TEXT])


@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        *(("bytes", "byte"), ("Byte", "byte"), ("chars", "char"), ("words", "word:N"), ("bpe4096", "bpe:4096")),
        *(("BPE-512", "bpe:512"), ("BPE", "bpe:N")),
    ],
)
def test_a_slip_of_a_built_in_name_is_not_looked_for_on_the_network(monkeypatch, slip, meant):
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url: pytest.fail("the network was asked"))
    with refused(rf"there is no tokenizer {slip} \(did you mean {meant}\?\); choose byte"):
        check_tokenizer(slip)


@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased", "t5-small", "ctrl", "someone/bytes"])
def test_a_name_of_the_hub_is_no_slip(monkeypatch, name):
    tries = []

    def offline(url):
        tries.append(url)
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", offline)
    with refused("check the network"):
        check_tokenizer(name)
    assert len(tries) == 1


def test_the_unknown_token_of_a_tokenizer_from_elsewhere_is_its_own(tmp_path):
    for name, model in (
        ("wordpiece", models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
        ("unigram", models.Unigram([("a", -1.0), ("<unk>", 0.0)], unk_id=1)),
    ):
        Tokenizer(model).save(str(tmp_path / f"{name}.json"))
        tokenizer = train_tokenizer(str(tmp_path / f"{name}.json"), [])
        assert tokenizer.unknown_id == 1 and tokenizer.encode("é") == [1]


def test_a_name_that_is_not_on_the_hub_is_refused(monkeypatch):
    def absent(url):
        raise HfHubHTTPError("404 Client Error", response=SimpleNamespace(headers={}, request=None, status_code=404))

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", absent)
    with refused("the Hub has no tokenizer.json of someone/words .*; mend the name, or choose byte"):
        train_tokenizer("someone/words", [TEXT])


def test_without_a_network_one_try_is_enough(monkeypatch, caplog):
    tries = []

    def offline(url):
        tries.append(url)
        raise ConnectionError(f"{url} cannot be\nreached")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", offline)
    with refused(
        "no tokenizer.json of someone/words here and the Hub cannot be reached .*; check the network, or choose"
    ):
        check_tokenizer("someone/words")
    assert len(tries) == 1 and not caplog.records


def test_a_tokenizer_that_was_brought_before_needs_no_network(tmp_path, monkeypatch):
    train_tokenizer("char", [TEXT]).save(tmp_path / "tokenizer.json")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda spec, name, local_files_only: tmp_path / name)
    assert train_tokenizer("someone/words", []).encode("the") == train_tokenizer("char", [TEXT]).encode("the")


@pytest.mark.parametrize("spec", ["word", "bpe:256", "byte:5", "chars please", "nowhere/tokenizer.json"])
def test_a_slip_is_found_without_any_text(spec):
    with refused("tokenizer"):
        check_tokenizer(spec)


@pytest.mark.parametrize("spec", ["byte", "char", "word:30000", "bpe:2048"])
def test_what_is_trained_on_text_passes_the_check(spec):
    check_tokenizer(spec)


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b'{"version": "1.0"', b"\xff\xfe"])
def test_a_damaged_tokenizer_file_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with refused("is not a readable tokenizer.json"):
        TextTokenizer.load(path, "char")
