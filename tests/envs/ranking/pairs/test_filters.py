from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.envs.ranking.pairs.filters import (
    copied_share,
    is_teacher_first,
    reaches_percentile,
    source_passage,
    source_ranks,
    without_ambiguous_queries,
    without_duplicates,
)
from rlkit.envs.ranking.pairs.rows import PairRow
from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.documents import Document, EngineError, Ranking
from rlkit.retrieval.retrievers import open_retriever

TEXTS = {"d1": "red fox", "d2": "blue fox", "d3": "green tree"}
COLLECTION = Collection(
    "small", lambda: (Document(name, "", text) for name, text in TEXTS.items()), {"q": "fox"}, {}
)


def pair(query, document, passage="a passage", **fields):
    return PairRow(f"{query}/{document}", query, (passage,), (1.0,), document=document, **fields)


class Scores:
    """Search engine whose documents have given scores for every query."""

    def __init__(self, scores, *, has_scores=True, error=None):
        self.scores, self.has_scores, self.error = scores, has_scores, error

    def search_ids(self, queries, k):
        best = sorted(self.scores.items(), key=lambda item: -item[1])[:k]
        scores = tuple(score for _, score in best) if self.has_scores else ()
        return [Ranking(tuple(name for name, _ in best), scores, self.error) for _ in queries]


def ranks(scores, depth, documents=("d1", "d2", "d3"), collection=COLLECTION, **options):
    """Return the rank of each document for one query."""
    rows = [pair("fox", name) for name in documents]
    return source_ranks(rows, collection, Scores(scores, **options), depth)


def test_round_trip_by_bm25_counts_ties_against_the_row(monkeypatch, tmp_path):
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    rows = [
        pair("fox red", "d1"),
        pair("fox", "d2"),
        pair("fox", "d1"),
        pair("tree", "d3"),
        pair("tree", "d1"),
    ]
    engine = open_retriever("bm25", COLLECTION)
    assert source_ranks(rows, COLLECTION, engine, 1) == [1, None, None, 1, None]
    # d1 and d2 are both second, and the query "tree" does not find d1 at all.
    assert source_ranks(rows, COLLECTION, engine, 2) == [1, 2, 2, 1, None]


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=8),
    st.integers(1, 9),
    st.booleans(),
)
def test_rank_is_that_of_an_exhaustive_search(scores, depth, are_passages):
    # Three passages of a document have consecutive ids.
    document_of = (lambda name: str(int(name) // 3)) if are_passages else None
    documents = [Document(str(i), "", "text") for i in range(len(scores))]
    collection = replace(COLLECTION, documents=lambda: iter(documents), document_of=document_of)
    best = {}
    for i, score in enumerate(scores):
        name = collection.judged_id(str(i))
        best[name] = max(best.get(name, 0), score)
    expected = [sum(other >= score for other in best.values()) for score in best.values()]
    by_id = {str(i): float(score) for i, score in enumerate(scores)}
    assert ranks(by_id, depth, list(best), collection) == [
        rank if rank <= depth else None for rank in expected
    ]


def test_scores_that_differ_by_rounding_are_a_tie():
    assert ranks({"d1": 0.5, "d2": 0.5 - 1e-8, "d3": 0.4}, 3) == [2, 2, 3]


def test_order_decides_without_scores():
    assert ranks({"d1": 3.0, "d2": 3.0, "d3": 1.0}, 2, has_scores=False) == [1, 2, None]


def test_document_that_ties_with_the_end_of_a_full_result_has_no_rank():
    # All 20 passages that are searched for a depth of 1 have the same score, and more may follow.
    by_id = {f"{i:03}": 1.0 for i in range(21)}
    documents = [Document(name, "", "text") for name in by_id]
    collection = replace(COLLECTION, documents=lambda: iter(documents), document_of=lambda name: name[0])
    assert ranks(by_id, 1, ["0"], collection) == [None]


def test_excluded_documents_of_a_query_have_no_rank():
    scores = {"d1": 3.0, "d2": 2.0, "d3": 1.0}
    excluding = replace(COLLECTION, excluded={"q": frozenset({"d1"})})
    assert ranks(scores, 2, collection=excluding) == [None, 1, 2]
    named = replace(COLLECTION, queries={"d2": "fox"}, drop_query_id=True)
    assert ranks(scores, 2, collection=named) == [1, None, 2]


def test_round_trip_refuses_what_it_cannot_rank():
    with pytest.raises(UserError, match="row 'fox/' has no document"):
        ranks({"d1": 1.0}, 1, [""])
    with pytest.raises(UserError, match="small lacks 1 of the documents that the rows name, such as 'x'"):
        ranks({"d1": 1.0}, 1, ["x"])
    with pytest.raises(UserError, match="the search for 'fox' failed: server is down"):
        ranks({"d1": 1.0}, 1, error="server is down")
    with pytest.raises(UserError, match="depth must be an integer of at least 1"):
        ranks({"d1": 1.0}, 0)

    class Down:
        def search_ids(self, queries, k):
            raise EngineError("timeout")

    with pytest.raises(UserError, match="the search failed: timeout"):
        source_ranks([pair("fox", "d1")], COLLECTION, Down(), 1)


def test_duplicates_have_the_same_query_and_document():
    rows = [pair("A  fox", "d1"), pair("a Fox", "d1"), pair("a fox", "d2"), pair("a fox?", "d1")]
    assert without_duplicates(rows) == [rows[0], rows[2]]
    # Without the name of a document, the passage says which one it is.
    unnamed = [pair("fox", "", "p"), pair("fox", "", "q"), pair("fox", "", "p")]
    assert without_duplicates(unnamed) == unnamed[:2]


def test_ambiguous_queries_lose_all_rows():
    rows = [pair("fox", "d1"), pair("Fox", "d2"), pair("tree", "d3"), pair("tree", "d3")]
    assert without_ambiguous_queries(rows) == rows[2:]


def list_row(targets, document="", passage_documents=()):
    passages = tuple(f"p{i}" for i in range(len(targets)))
    return PairRow("r", "q", passages, targets, document=document, passage_documents=passage_documents)


@pytest.mark.parametrize(
    ("row", "index", "is_first"),
    [
        (list_row((0.9, 0.1), "a"), 0, True),
        (list_row((0.1, 0.9), "a"), 0, False),
        (list_row((0.9, 0.9), "a"), 0, False),
        (list_row((0.1, 0.9), "b", ("a", "b")), 1, True),
        (list_row((0.9, 0.1), "b", ("a", "b")), 1, False),
        (list_row((0.9, 0.1), "c", ("a", "b")), None, False),
        (list_row((0.0,), "a"), 0, True),
        (list_row((0.0,)), 0, True),
    ],
)
def test_teacher_must_rank_the_source_strictly_first(row, index, is_first):
    assert source_passage(row) == index and is_teacher_first(row) is is_first


@pytest.mark.parametrize(
    "row",
    [
        list_row((0.9, 0.1), "", ("a", "b")),
        list_row((3.0, 0.0, 2.0, 1.0)),  # passages that are graded for a query, in random order
    ],
)
def test_list_that_names_no_document_is_an_error(row):
    for function in (source_passage, is_teacher_first, copied_share):
        with pytest.raises(UserError, match="row 'r' does not say which passage its query is from"):
            function(row)


def test_percentile_is_of_the_targets_of_all_passages():
    targets = [[2, 1], [0, -1], [-5, -6]]
    assert reaches_percentile(targets, 25) == [True, True, False]  # the percentile is -4
    assert reaches_percentile(targets, 0) == [True, True, True]
    assert reaches_percentile(targets, 100) == [True, False, False]
    assert reaches_percentile([], 25) == []


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1, max_size=6), st.floats(0, 100))
def test_list_with_the_highest_target_reaches_every_percentile(targets, percent):
    passes = reaches_percentile(targets, percent)
    highest = max(map(max, targets))
    assert all(reaches for of_row, reaches in zip(targets, passes, strict=True) if max(of_row) == highest)


@pytest.mark.parametrize(
    ("query", "passage", "share"),
    [
        ("the red fox jumps", "See the RED fox: sleeping.", 0.5),
        ("the red fox", "The red fox.", 1.0),
        ("fox red the", "The red fox.", 0.0),
        ("red fox", "The red fox.", 1.0),
        ("the fox", "The red fox.", 0.0),
        ("fox", "A fox.", 1.0),
        ("foxes", "A fox.", 0.0),
        ("???", "A fox???", 0.0),
    ],
)
def test_copied_share_is_that_of_trigrams(query, passage, share):
    assert copied_share(pair(query, "d1", passage)) == share


def test_copies_are_looked_for_in_the_passage_of_the_source():
    passages = ("another passage", "the red fox")
    row = PairRow("r", "the red fox", passages, (0.0, 1.0), document="b", passage_documents=("a", "b"))
    assert copied_share(row) == 1.0
    assert copied_share(replace(row, document="a")) == 0.0
    with pytest.raises(UserError, match="row 'r' has no passage from its document 'c'"):
        copied_share(replace(row, document="c"))
