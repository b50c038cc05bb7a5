"""PROP: the document language model, and pairs of word sets drawn from it."""

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.envs.ranking.pairs import words as prop_module
from rlkit.envs.ranking.pairs.rows import read_rows, write_rows
from rlkit.envs.ranking.pairs.words import (
    LENGTH_WEIGHTS,
    LENGTHS,
    content_words,
    corpus_statistics,
    kept_share,
    likelihood,
    prop,
    word_set_rows,
)
from rlkit.errors import UserError
from rlkit.retrieval.documents import Document

NAMES = ["river", "castle", "iron", "stone", "bread", "cheese", "king", "queen", "horse", "road", "wine"]


def corpus(size=8, seed=0):
    """Return documents of 12 words each, a few of which are frequent."""
    rng = random.Random(seed)
    weights = [1 / rank for rank in range(1, len(NAMES) + 1)]
    return [Document(f"d{i}", "", " ".join(rng.choices(NAMES, weights, k=12))) for i in range(size)]


DOCUMENTS = corpus()


def test_likelihood_and_scores_equal_a_case_worked_out_by_hand():
    counts, background = Counter("aabc"), {"a": 0.2, "b": 0.3, "c": 0.1, "d": 0.4}
    probs = {word: likelihood(counts[word], 4, share, 6) for word, share in background.items()}
    assert probs == pytest.approx({"a": 0.32, "b": 0.28, "c": 0.16, "d": 0.24})
    assert sum(probs.values()) == pytest.approx(1)
    assert math.log(probs["a"]) + math.log(probs["b"]) == pytest.approx(-2.41240, abs=1e-5)
    assert math.log(probs["c"]) + math.log(probs["d"]) == pytest.approx(-3.25970, abs=1e-5)


def test_lengths_have_the_poisson_distribution_without_zero():
    total = sum(LENGTH_WEIGHTS)
    mean = sum(length * weight for length, weight in zip(LENGTHS, LENGTH_WEIGHTS, strict=True)) / total
    assert mean == pytest.approx(3.157, abs=1e-3)
    assert LENGTH_WEIGHTS[0] / total == pytest.approx(0.157, abs=1e-3)


def test_statistics_count_documents_and_words_without_stop_words():
    documents = [
        Document("1", "Iron", "the iron and the Road"),
        Document("2", "", "the road (x86) -- of a king"),
    ]
    assert content_words("Don't go to /usr/lib64, the X.org") == ["go", "usr", "lib", "x", "org"]
    statistics = corpus_statistics(documents, 2)
    # df: iron 1, road 2, x 1, king 1; the words that occur once count in the sum, but are never drawn.
    assert statistics.background == pytest.approx({"iron": 1 / 5, "road": 2 / 5})
    assert statistics.mean_length == 3


def test_subsampling_keeps_rare_words_and_thins_out_frequent_ones():
    assert kept_share(1e-5) == kept_share(1e-4) == 1
    assert kept_share(1e-2) == pytest.approx(0.1 + 0.01)


def test_pair_starts_with_the_likelier_set():
    statistics = corpus_statistics(DOCUMENTS, 1)
    by_id = {document.id: Counter(content_words(document.text)) for document in DOCUMENTS}
    for row in prop(DOCUMENTS, min_count=1):
        counts = by_id[row.document]
        better, worse = (
            sum(
                math.log(likelihood(counts[word], 12, statistics.background[word], statistics.mean_length))
                for word in word_set.split()
            )
            for word_set in row.passages
        )
        assert better > worse and row.targets == (1, 0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 12))
def test_sets_of_a_pair_have_equal_lengths_and_words_of_the_vocabulary(seed, per_document, min_count):
    documents = corpus(seed=seed)
    vocabulary = set(corpus_statistics(documents, min_count).background)
    rows = list(prop(documents, per_document=per_document, seed=seed, min_count=min_count))
    assert len({row.id for row in rows}) == len(rows) <= per_document * len(documents)
    for row in rows:
        better, worse = (word_set.split() for word_set in row.passages)
        assert len(better) == len(worse) > 0 and {*better, *worse} <= vocabulary
        assert sorted(better) != sorted(worse)


@settings(deadline=None, max_examples=20)
@given(st.permutations(DOCUMENTS), st.integers(0, 3))
def test_rows_do_not_depend_on_the_order_of_the_documents(documents, seed):
    expected = {row.id: row for row in prop(DOCUMENTS, seed=seed, min_count=2)}
    assert {row.id: row for row in prop(documents, seed=seed, min_count=2)} == expected


def test_more_pairs_per_document_keep_the_first_ones():
    few = list(prop(DOCUMENTS, per_document=2, min_count=1))
    many = {row.id: row for row in prop(DOCUMENTS, per_document=5, min_count=1)}
    assert all(many[row.id] == row for row in few)


def test_words_of_every_frequency_have_a_likelihood():
    """The official code raises KeyError for words that occur 10 to 99 times."""
    text = " ".join(word for number, word in enumerate(NAMES) for _ in range(3**number // 9 + 1))
    assert len(list(prop([Document("d", "", text), *DOCUMENTS]))) > 0


def test_long_document_draws_words_that_it_does_not_have(monkeypatch):
    monkeypatch.setattr(prop_module, "VOCABULARY_SIZE", 2)
    (document,) = corpus(1, seed=3)
    others = [Document("e", "", "elephant zebra " * 40)]
    drawn = {word for row in prop([document, *others], per_document=40, min_count=1) if row.document == "d0"
             for word_set in row.passages for word in word_set.split()}  # fmt: skip
    assert drawn > set(content_words(document.text)) and drawn & {"elephant", "zebra"}


def test_ties_are_dropped():
    assert list(prop([Document("d", "", "iron " * 20)], min_count=10)) == []
    draws = iter([["a", "b"], ["b", "a"], ["a", "a"], ["b", "a"]])
    document = Document("d", "", "a b")
    scores = {"a": 0.1, "b": 0.2}
    (row,) = word_set_rows("x", document, lambda rng, length: next(draws), scores, per_document=1, seed=0)
    assert row.passages == ("b a", "a a")


def test_rows_are_documents_with_queries_and_survive_a_file(tmp_path):
    rows = list(prop([Document("d", "Title", "iron road king " * 5), *DOCUMENTS], min_count=2))
    assert rows[0].query.startswith("Title: iron") and rows[0].passages_are_queries
    write_rows(tmp_path / "prop.jsonl", rows)
    assert read_rows(tmp_path / "prop.jsonl") == rows


def test_corpus_without_frequent_words_is_an_error():
    with pytest.raises(
        UserError, match="no English word occurs 10 times in 1 documents; set a lower min_count"
    ):
        list(prop([Document("d", "", "iron road")]))
    with pytest.raises(UserError, match="per_document must be an integer"):
        list(prop(DOCUMENTS, per_document=0))
