"""The two sides share no text, whatever the corpus; and the same corpus is always parted the same way."""

from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_training import refused

from resnet_bk.errors import UserError
from resnet_bk.training.data import Corpus, Document
from resnet_bk.training.data.split import split_corpus

FRACTIONS = st.floats(0.01, 0.9)


def corpus_of(texts):
    return Corpus("texts", tuple(Document(name=f"{n}.txt", text=text) for n, text in enumerate(texts)), "texts")


def contents(side):
    return [document.text for document in side]


def by_document(split):
    return split.method.startswith("by document")


@given(texts=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=60), fraction=FRACTIONS)
@settings(deadline=None, max_examples=300)
def test_no_text_is_on_both_sides_and_none_is_lost(texts, fraction):
    try:
        split = split_corpus(corpus_of(texts), fraction)
    except UserError:
        assert sum(map(len, texts)) * (1 - fraction) < 2, "only a character or two cannot be split"
        return
    train, validation = contents(split.train), contents(split.validation)
    assert train and validation
    if by_document(split):
        assert not set(train) & set(validation)
        assert Counter(train + validation) == Counter(texts)
    else:
        assert split.method == "contiguous tail"
        assert "".join(train) + "".join(validation) == "".join(texts)


@given(texts=st.lists(st.text(min_size=1, max_size=30), min_size=20, max_size=60, unique=True), data=st.data())
@settings(deadline=None)
def test_the_order_of_many_documents_does_not_move_them_between_sides(texts, data):
    split = split_corpus(corpus_of(texts), 0.2)
    assume(by_document(split))
    shuffled = split_corpus(corpus_of(data.draw(st.permutations(texts))), 0.2)
    assert set(contents(shuffled.validation)) == set(contents(split.validation))


def test_many_documents_are_held_out_whole_and_make_up_the_fraction():
    texts = [f"document number {number} of a hundred" for number in range(100)]
    split = split_corpus(corpus_of(texts), 0.1)
    assert by_document(split)
    assert 10 <= len(split.validation) <= 11


def test_equal_documents_stay_together():
    texts = [f"text {number % 10}" for number in range(100)]
    split = split_corpus(corpus_of(texts), 0.3)
    assert by_document(split)
    assert set(Counter(contents(split.validation)).values()) == {10}


def test_few_documents_hold_out_their_tail():
    split = split_corpus(corpus_of(["a" * 50, "b" * 50]), 0.1)
    assert contents(split.train) == ["a" * 50, "b" * 40]
    assert contents(split.validation) == ["b" * 10]
    assert split.method == "contiguous tail"


@pytest.mark.parametrize("place", range(0, 30, 5))
def test_one_document_that_is_most_of_the_text_is_cut_instead(place):
    texts = [f"small {number}" for number in range(29)]
    texts.insert(place, "huge " * 10_000)
    split = split_corpus(corpus_of(texts), 0.1)
    assert sum(map(len, contents(split.validation))) <= 0.2 * sum(map(len, texts))
    assert sum(map(len, contents(split.train))) >= 0.8 * sum(map(len, texts))


def test_a_text_of_one_character_is_refused():
    with refused("has too little text to hold some of it out; give more text"):
        split_corpus(corpus_of(["x"]), 0.1)
