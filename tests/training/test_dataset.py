"""Tokens on disk: made once, found again, memory-mapped, made anew where they are damaged."""

import numpy as np
import pytest
from small_training import TEXT, refused

from resnet_bk.training.config import DataConfig
from resnet_bk.training.data import TextTokenizer, load_corpus, prepare_dataset, tokenize_all, train_tokenizer
from resnet_bk.training.data.dataset import cache_directory


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("RESNET_BK_CACHE", str(folder))
    return folder


@pytest.fixture
def many_files(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(f"file {number}: " + TEXT[50 * number : 50 * number + 80])
    return folder


def prepare(data, tokenizer="byte", **options):
    """The data set, and what was said while it was made."""
    said = []
    dataset = prepare_dataset(DataConfig(data=str(data), tokenizer=tokenizer, **options), on_progress=said.append)
    return dataset, " ".join(said)


def test_the_sides_are_the_text_cut_once(cache, text_file):
    dataset, _ = prepare(text_file, validation_fraction=0.25)
    train, validation = (dataset.tokenizer.decode(side.tokens) for side in (dataset.train, dataset.validation))
    assert train + validation == TEXT
    assert len(validation) == round(0.25 * len(TEXT))
    assert (dataset.train.num_bytes, dataset.validation.num_bytes) == (len(train), len(validation))


def test_many_documents_end_with_the_end_of_text_and_no_document_is_on_both_sides(cache, many_files):
    dataset, _ = prepare(many_files)
    sides = []
    for side in (dataset.train, dataset.validation):
        assert (side.tokens == dataset.tokenizer.end_of_text_id).sum() == side.num_documents - 1
        pieces = np.split(side.tokens, np.flatnonzero(side.tokens == dataset.tokenizer.end_of_text_id))
        sides.append({dataset.tokenizer.decode(piece) for piece in pieces})
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {path.read_text() for path in many_files.iterdir()}


def test_the_record_says_what_was_split_and_how(cache, many_files, text_file):
    dataset, _ = prepare(many_files, validation_fraction=0.2)
    record = dataset.record
    assert record["split"] == "by document, lowest content hashes"
    assert record["validation_fraction"] == 0.2
    assert record["data"] == str(many_files)
    assert record["tokenizer_sha256"] == dataset.tokenizer.fingerprint
    for name, side in (("train", dataset.train), ("validation", dataset.validation)):
        sizes = {"documents": side.num_documents, "bytes": side.num_bytes, "tokens": len(side.tokens)}
        assert record["sides"][name] == sizes
    assert prepare(text_file)[0].record["split"] == "contiguous tail"


def test_the_vocabulary_is_made_from_the_training_side_only(cache, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("ab" * 45 + "zz" * 5)
    dataset, _ = prepare(path, "char")
    assert dataset.tokenizer.vocab_size == 2 + 2
    assert set(dataset.validation.tokens.tolist()) == {dataset.tokenizer.unknown_id}


def test_tokens_are_memory_mapped_read_only_and_half_as_large_as_an_int(cache, text_file):
    dataset, _ = prepare(text_file)
    for side in (dataset.train, dataset.validation):
        assert isinstance(side.tokens, np.memmap)
        assert side.tokens.dtype == np.uint16
        assert not side.tokens.flags.writeable
        assert str(side.tokens.filename).startswith(str(cache))


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_cache_is_used_again(cache, text_file, tmp_path):
    first, said = prepare(text_file)
    assert "tokenizing" in said
    before = snapshot(cache)
    copy = tmp_path / "copy.txt"
    copy.write_text(TEXT)
    for path in (text_file, copy):
        again, said = prepare(path)
        assert said == ""
        assert np.array_equal(again.train.tokens, first.train.tokens)
        assert path.name in again.record["description"]
        assert again.record["data"] == str(path)
    assert snapshot(cache) == before


def test_another_text_tokenizer_or_fraction_is_another_entry(cache, text_file, tmp_path):
    changed = tmp_path / "changed.txt"
    changed.write_text(TEXT + "!")
    for data, tokenizer, fraction in (
        (text_file, "byte", 0.1),
        (changed, "byte", 0.1),
        (text_file, "char", 0.1),
        (text_file, "byte", 0.2),
    ):
        assert "tokenizing" in prepare(data, tokenizer, validation_fraction=fraction)[1]
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("named_by", ["file", "folder"])
def test_a_tokenizer_file_that_changes_is_another_entry(cache, text_file, tmp_path, named_by):
    path = tmp_path / "tokenizer.json"
    spec = str(path if named_by == "file" else tmp_path)
    sizes = []
    for made_from in (TEXT, TEXT.upper()):
        train_tokenizer("word:20" if made_from == TEXT else "word:30", [made_from]).save(path)
        sizes.append(prepare(text_file, spec)[0].tokenizer.vocab_size)
    assert sizes == [20, 30]


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    place = next(place for place in range(2 * len(content) // 3, len(content)) if not chr(content[place]).isspace())
    content[place] ^= 1
    path.write_bytes(content)


def delete(path):
    path.unlink()


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_byte, delete])
@pytest.mark.parametrize("name", ["meta.json", "tokenizer.json", "train.bin", "validation.bin"])
def test_a_damaged_cache_is_made_again(cache, text_file, name, damage):
    first, _ = prepare(text_file, "char")
    expected = [side.tokens.tolist() for side in (first.train, first.validation)]
    (entry,) = cache.iterdir()
    assert {path.name for path in entry.iterdir()} == {"meta.json", "tokenizer.json", "train.bin", "validation.bin"}
    damage(entry / name)
    again, said = prepare(text_file, "char")
    assert "damaged" in said and "making it again" in said
    assert [side.tokens.tolist() for side in (again.train, again.validation)] == expected
    assert again.record == first.record
    assert prepare(text_file, "char")[1] == ""


def test_no_digit_of_the_cache_record_can_change_unnoticed(cache, text_file):
    prepare(text_file)
    (entry,) = cache.iterdir()
    content = (entry / "meta.json").read_bytes()
    digits = [place for place, byte in enumerate(content) if chr(byte).isdecimal()]
    for place in digits[:: max(1, len(digits) // 15)]:
        changed = bytearray(content)
        changed[place] = ord("7") if content[place] != ord("7") else ord("3")
        (entry / "meta.json").write_bytes(changed)
        assert "damaged" in prepare(text_file)[1]
    assert digits


def test_an_entry_that_could_not_be_written_leaves_nothing(tmp_path, monkeypatch, text_file):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RESNET_BK_CACHE", str(tmp_path / "file" / "cache"))
    with refused("cannot write .*; choose another place"):
        prepare(text_file)


def test_a_tokenizer_that_cannot_be_saved_leaves_no_half_entry(cache, text_file, monkeypatch):
    def full(_tokenizer, _path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TextTokenizer, "save", full)
        with refused("No space left on device"):
            prepare(text_file)
    assert list(cache.iterdir()) == []
    assert "tokenizing" in prepare(text_file)[1]


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_BK_CACHE", str(tmp_path / "chosen"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory() == tmp_path / "chosen"
    monkeypatch.delenv("RESNET_BK_CACHE")
    assert cache_directory() == tmp_path / "xdg" / "resnet-bk"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == tmp_path / "home" / ".cache" / "resnet-bk"


def test_the_unigram_entropy_of_four_equal_shares_is_log_four(cache, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcd" * 100)
    dataset, _ = prepare(path)
    assert dataset.train.unigram_entropy() == pytest.approx(np.log(4))


def test_a_side_without_two_tokens_is_refused(cache, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("abcdefghij")
    with refused(r"the held-out part of .*short.txt has 1 token, and a prediction takes two; give more text"):
        prepare(path)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_that_is_no_share_is_refused(fraction):
    with refused("give a share between 0 and 1"):
        DataConfig(validation_fraction=fraction)


def test_tokenize_all_takes_the_whole_text(text_file):
    tokenizer = train_tokenizer("byte", [])
    side = tokenize_all(str(text_file), tokenizer)
    assert tokenizer.decode(side.tokens) == TEXT
    assert (side.num_bytes, side.num_documents) == (len(TEXT), 1)


def test_a_text_too_short_to_predict_is_refused_without_speaking_of_parts(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("a")
    with refused(r"^\S*one.txt has 1 token, and a prediction takes two; give more text"):
        tokenize_all(str(path), train_tokenizer("byte", []))


def test_a_text_that_was_read_is_not_read_again(cache, text_file, monkeypatch):
    corpus = load_corpus(str(text_file))
    monkeypatch.setattr("resnet_bk.training.data.dataset.load_corpus", lambda spec: pytest.fail("it was read again"))
    config = DataConfig(data=str(text_file), tokenizer="byte")
    assert prepare_dataset(config, corpus=corpus).record["corpus_sha256"] == corpus.fingerprint
    assert len(tokenize_all(corpus, train_tokenizer("byte", [])).tokens) == len(TEXT)


def test_the_share_of_a_token_is_counted_over_all_tokens(tmp_path):
    path = tmp_path / "strange.txt"
    path.write_text("abxx")
    tokenizer = train_tokenizer("char", ["abc"])
    side = tokenize_all(str(path), tokenizer)
    assert side.share_of(tokenizer.unknown_id) == 0.5
    assert side.share_of(None) == 0.0
