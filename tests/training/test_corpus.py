"""Every way to name a text, and what is said when there is none to be had."""

import datasets
import pytest
from small_training import refused

from resnet_bk.training.data import load_corpus


def texts(corpus):
    return {document.name: document.text for document in corpus.documents}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    (root / "deep" / "er").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "b.txt").write_text("second")
    (root / "a.md").write_text("first, é\r\n")
    (root / "deep" / "er" / "c").write_text("third")
    (root / "empty.txt").write_text(" \n")
    (root / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (root / "latin.txt").write_bytes("déjà".encode("latin-1"))
    (root / ".hidden").write_text("not this")
    (root / ".git" / "config").write_text("nor this")
    return root


def test_a_file_is_one_document_and_its_text_is_not_changed(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("one\r\ntwo\n\ufeffé😀".encode())
    assert texts(load_corpus(str(path))) == {"book.txt": "one\r\ntwo\n\ufeffé😀"}


def test_a_folder_is_its_text_files_sorted_without_hidden_ones(folder):
    corpus = load_corpus(str(folder))
    assert list(texts(corpus).items()) == [("a.md", "first, é\r\n"), ("b.txt", "second"), ("deep/er/c", "third")]
    assert "3 files" in corpus.description
    assert "3 files that are not text left out" in corpus.description


def test_a_glob_takes_the_matching_files_only(folder):
    assert list(texts(load_corpus(f"{folder}/*.txt")).values()) == ["second"]
    assert list(texts(load_corpus(f"{folder}/**/*")).values()) == ["first, é\r\n", "second", "third"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path):
    (tmp_path / "chapter[1].txt").write_text("the file")
    (tmp_path / "chapter1.txt").write_text("what the pattern would match")
    assert list(texts(load_corpus(f"{tmp_path}/chapter[1].txt")).values()) == ["the file"]


def test_the_standard_library_is_its_source_without_its_tests():
    corpus = load_corpus("stdlib")
    documents = texts(corpus)
    assert "def dumps(" in documents["json/__init__.py"]
    assert "class ArgumentParser" in documents["argparse.py"]
    assert not [name for name in documents if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert len(documents) > 300
    assert corpus.fingerprint == load_corpus("stdlib").fingerprint


def test_the_fingerprint_tells_texts_and_their_boundaries_apart(tmp_path):
    def fingerprint(name, *contents):
        root = tmp_path / name
        root.mkdir()
        for number, content in enumerate(contents):
            (root / f"{number}.txt").write_text(content)
        return load_corpus(str(root)).fingerprint

    original = fingerprint("original", "abc", "def")
    assert fingerprint("copy", "abc", "def") == original
    others = [fingerprint("moved", "abcd", "ef"), fingerprint("swapped", "def", "abc"), fingerprint("one", "abcdef")]
    assert len({original, *others}) == 4


class TestHuggingFace:
    def load(self, monkeypatch, columns, spec="hf:someone/poems", features=None):
        self.asked = []

        def load_dataset(name, configuration, *, split):
            self.asked.append((name, configuration, split))
            return datasets.Dataset.from_dict(columns, features=features)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return load_corpus(spec)

    def test_its_training_side_is_loaded_and_rows_without_text_are_left_out(self, monkeypatch):
        corpus = self.load(monkeypatch, {"id": [1, 2, 3, 4], "text": ["roses", "", None, "violets"]})
        assert [document.text for document in corpus.documents] == ["roses", "violets"]
        assert "2 documents" in corpus.description
        assert self.asked == [("someone/poems", None, "train")]

    def test_a_configuration_follows_the_name(self, monkeypatch):
        self.load(monkeypatch, {"text": ["roses"]}, spec="hf:someone/poems:short")
        assert self.asked == [("someone/poems", "short", "train")]

    @pytest.mark.parametrize("kind", ["string", "large_string"])
    def test_the_only_column_of_strings_will_do(self, monkeypatch, kind):
        features = datasets.Features({"stars": datasets.Value("int64"), "review": datasets.Value(kind)})
        corpus = self.load(monkeypatch, {"stars": [5], "review": ["fine"]}, features=features)
        assert [document.text for document in corpus.documents] == ["fine"]

    def test_text_is_chosen_among_several_columns_of_strings(self, monkeypatch):
        corpus = self.load(monkeypatch, {"title": ["Ode"], "text": ["O wild west wind"]})
        assert [document.text for document in corpus.documents] == ["O wild west wind"]

    def test_several_columns_of_strings_without_text_are_refused(self, monkeypatch):
        with refused("no column 'text'.*title, body"):
            self.load(monkeypatch, {"title": ["Ode"], "body": ["O wild west wind"]})

    def test_no_text_at_all_is_refused(self, monkeypatch):
        with refused("column text of hf:someone/poems holds no text"):
            self.load(monkeypatch, {"text": ["", "  "]})

    def test_a_data_set_that_cannot_be_loaded_is_one_line(self, monkeypatch):
        def load_dataset(*_args, **_options):
            raise ConnectionError("no route\nto the host")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with refused("hf:someone/poems could not be loaded .no route to the host.; check its name"):
            load_corpus("hf:someone/poems")

    def test_a_missing_name_is_refused(self):
        with refused("names no data set"):
            load_corpus("hf:")


def test_a_missing_file_is_refused(tmp_path):
    with refused("nowhere.txt does not exist; give"):
        load_corpus(str(tmp_path / "nowhere.txt"))


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with refused("empty.txt is empty; give a file with text"):
        load_corpus(str(path))


@pytest.mark.parametrize(("content", "first"), [(b"text\0more", 4), (b"caf\xe9 au lait", 3), (b"\x80", 0)])
def test_binary_data_is_refused_with_the_place_of_its_first_byte(tmp_path, content, first):
    path = tmp_path / "data.bin"
    path.write_bytes(content)
    with refused(rf"data.bin is not UTF-8 text \(byte {first} is not\)"):
        load_corpus(str(path))


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "data.bin").write_bytes(b"\0")
    with refused("holds no text"):
        load_corpus(str(tmp_path))


def test_a_glob_that_matches_nothing_or_no_text_is_refused(tmp_path):
    (tmp_path / "data.bin").write_bytes(b"\0")
    with refused(r"no file matches .*\*\.txt"):
        load_corpus(f"{tmp_path}/*.txt")
    with refused("none of the 1 files that match"):
        load_corpus(f"{tmp_path}/*.bin")


@pytest.mark.parametrize("pattern", ["book.txt", "", "*.txt"])
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_what_cannot_be_read_is_refused(tmp_path, monkeypatch, pattern, error):
    (tmp_path / "book.txt").write_text("text")

    def fail(_path):
        raise error

    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    with refused("may not be read; change" if error.errno == 13 else "cannot be read .Input/output error.; choose"):
        load_corpus(str(tmp_path / pattern))


def test_a_text_given_where_a_name_belongs_is_refused():
    with refused("cannot be read .File name too long."):
        load_corpus("Once upon a time there was " * 50)
