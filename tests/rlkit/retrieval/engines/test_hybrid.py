"""Reciprocal-rank fusion: worked examples, and properties over engines with fixed rankings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.errors import UserError
from rlkit.retrieval.documents import Document, EngineError, Query, Ranking, Result, ranking_of
from rlkit.retrieval.engines.hybrid import Hybrid
from rlkit.retrieval.engines.index import build_index, open_index


class FixedRankings:
    """Engine that returns a given ranking for each query."""

    def __init__(self, rankings):
        self.rankings = rankings

    def search(self, queries, k):
        return [
            Result(tuple(Document(name, "", "") for name in self.rankings[query.text][:k]))
            for query in queries
        ]


class DownEngine:
    def search(self, queries, k):
        raise EngineError("down")


class PartlyFailingEngine:
    def search(self, queries, k):
        return [Result(error="too slow") if query.text == "a" else Result() for query in queries]


def fuse(engines, text="q", k=10, **options):
    (result,) = Hybrid(engines, **options).search([Query(text)], k)
    return [document.id for document in result.documents], list(result.scores)


rankings = st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=8), min_size=1, max_size=4)


def test_scores_of_worked_example():
    engines = [FixedRankings({"q": ["a", "b", "c"]}), FixedRankings({"q": ["c", "a"]})]
    names, scores = fuse(engines)
    assert names == ["a", "c", "b"]
    assert scores == pytest.approx([1 / 61 + 1 / 62, 1 / 63 + 1 / 61, 1 / 62], rel=1e-12)
    assert fuse(engines, k=1) == (["a"], [pytest.approx(1 / 61 + 1 / 62)])
    assert fuse(engines, **{"k": 3})[0] == names
    (result,) = Hybrid(engines, k=0).search([Query("q")], 3)
    assert result.scores == pytest.approx([1 + 1 / 2, 1 + 1 / 3, 1 / 2])


@given(rankings, st.integers(1, 9), st.integers(0, 100))
def test_score_is_sum_of_reciprocal_ranks(rankings, depth, k):
    (result,) = Hybrid([FixedRankings({"q": names}) for names in rankings], k=k).search([Query("q")], depth)
    expected = {
        name: sum(1 / (k + names.index(name) + 1) for names in rankings if name in names)
        for name in {name for names in rankings for name in names}
    }
    ids = [document.id for document in result.documents]
    assert len(ids) == len(set(ids)) == min(depth, len(expected))
    assert result.scores == pytest.approx([expected[name] for name in ids])
    assert result.scores == pytest.approx(sorted(expected.values(), reverse=True)[:depth])


@given(rankings, st.permutations(range(4)))
def test_scores_do_not_depend_on_engine_order(rankings, order):
    def scores(rankings):
        (result,) = Hybrid([FixedRankings({"q": names}) for names in rankings]).search([Query("q")], 10)
        return dict(zip([d.id for d in result.documents], result.scores, strict=True))

    assert scores(rankings) == scores([rankings[i] for i in order if i < len(rankings)])


def test_ties_keep_order_of_first_engine():
    assert fuse([FixedRankings({"q": ["a", "b"]}), FixedRankings({"q": ["b", "a"]})])[0] == ["a", "b"]
    assert fuse([FixedRankings({"q": ["b", "a"]}), FixedRankings({"q": ["a", "b"]})])[0] == ["b", "a"]
    # Each document has the ranks 1, 2 and 3, added in a different order: plain addition would break the tie.
    cycle = ["abc", "bca", "cab"]
    names, scores = fuse([FixedRankings({"q": list(order)}) for order in cycle])
    assert names == ["a", "b", "c"] and len(set(scores)) == 1


def test_repeated_document_counts_at_first_rank():
    names, scores = fuse([FixedRankings({"q": ["a", "a", "b"]})])
    assert names == ["a", "b"]
    assert scores == [1 / 61, 1 / 62]


def test_search_fuses_deeper_than_k():
    first = [f"x{i}" for i in range(20)] + ["both"]
    second = [f"y{i}" for i in range(20)] + ["both"]
    assert fuse([FixedRankings({"q": first}), FixedRankings({"q": second})], k=1)[0] == ["both"]


def test_failure_of_one_engine_is_an_error():
    with pytest.raises(EngineError, match="down"):
        Hybrid([FixedRankings({"a": ["x"]}), DownEngine()]).search([Query("a")], 1)
    engines = [FixedRankings({"a": ["x"], "b": ["y"]}), PartlyFailingEngine()]
    results = Hybrid(engines).search([Query("a"), Query("b")], 1)
    assert results[0] == Result(error="too slow")
    assert [document.id for document in results[1].documents] == ["y"]


def test_results_over_real_indexes_are_in_query_order(tmp_path):
    documents = [Document(str(i), "", f"word{i} shared") for i in range(9)]
    engines = [open_index(build_index(documents, tmp_path / str(b), b=b)) for b in (0.0, 1.0)]
    results = Hybrid(engines).search([Query("word4"), Query(""), Query("word7 shared")], 2)
    assert [[d.id for d in result.documents] for result in results] == [["4"], [], ["7", "0"]]
    assert Hybrid(engines).search([], 2) == []


def test_invalid_arguments_raise_user_error():
    with pytest.raises(UserError, match="needs at least one engine"):
        Hybrid([])
    with pytest.raises(UserError, match="k of 0 or more"):
        Hybrid([DownEngine()], k=-1)
    with pytest.raises(UserError, match="at least 1"):
        Hybrid([FixedRankings({"q": ["a"]})]).search([Query("q")], 0)


@given(st.dictionaries(st.sampled_from("pqr"), rankings, min_size=1), st.integers(1, 10))
def test_search_ids_returns_the_ids_and_scores_of_search(by_query, k):
    engines = [FixedRankings({q: r[i % len(r)] for q, r in by_query.items()}) for i in range(3)]
    queries = [Query(text) for text in by_query]
    hybrid = Hybrid(engines)
    for ranking, result in zip(hybrid.search_ids(queries, k), hybrid.search(queries, k), strict=True):
        assert ranking == ranking_of(result)


def test_search_ids_of_a_failed_query_has_the_error():
    hybrid = Hybrid([FixedRankings({"a": ["x"], "b": ["y"]}), PartlyFailingEngine()])
    failed, succeeded = hybrid.search_ids([Query("a"), Query("b")], 3)
    assert failed == Ranking(error="too slow")
    assert succeeded == Ranking(("y",), (1 / 61,))
