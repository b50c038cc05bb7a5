"""Reciprocal-rank fusion, worked by hand and over engines that rank as they are told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.errors import UserError
from rlkit.retrieval.documents import Document, EngineError, Query, Result
from rlkit.retrieval.engines.hybrid import Hybrid
from rlkit.retrieval.engines.index import build_index, open_index


class Told:
    """Gives the documents that it was told for each query, at most k."""

    def __init__(self, rankings):
        self.rankings = rankings

    def search(self, queries, k):
        return [
            Result(tuple(Document(name, "", "") for name in self.rankings[query.text][:k]))
            for query in queries
        ]


class Down:
    def search(self, queries, k):
        raise EngineError("down")


class Half:
    def search(self, queries, k):
        return [Result(error="too slow") if query.text == "a" else Result() for query in queries]


def ask(engines, text="q", k=10, **options):
    (result,) = Hybrid(engines, **options).search([Query(text)], k)
    return [document.id for document in result.documents], list(result.scores)


rankings = st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=8), min_size=1, max_size=4)


def test_worked_by_hand():
    engines = [Told({"q": ["a", "b", "c"]}), Told({"q": ["c", "a"]})]
    names, scores = ask(engines)
    assert names == ["a", "c", "b"]
    assert scores == pytest.approx([1 / 61 + 1 / 62, 1 / 63 + 1 / 61, 1 / 62], rel=1e-12)
    assert ask(engines, k=1) == (["a"], [pytest.approx(1 / 61 + 1 / 62)])
    assert ask(engines, **{"k": 3})[0] == names
    (result,) = Hybrid(engines, k=0).search([Query("q")], 3)
    assert result.scores == pytest.approx([1 + 1 / 2, 1 + 1 / 3, 1 / 2])


@given(rankings, st.integers(1, 9), st.integers(0, 100))
def test_it_is_the_sum_over_rankings(rankings, depth, k):
    (result,) = Hybrid([Told({"q": names}) for names in rankings], k=k).search([Query("q")], depth)
    expected = {
        name: sum(1 / (k + names.index(name) + 1) for names in rankings if name in names)
        for name in {name for names in rankings for name in names}
    }
    got = [document.id for document in result.documents]
    assert len(got) == len(set(got)) == min(depth, len(expected))
    assert result.scores == pytest.approx([expected[name] for name in got])
    assert result.scores == pytest.approx(sorted(expected.values(), reverse=True)[:depth])


@given(rankings, st.permutations(range(4)))
def test_scores_do_not_depend_on_the_order_of_engines(rankings, order):
    def scores(rankings):
        (result,) = Hybrid([Told({"q": names}) for names in rankings]).search([Query("q")], 10)
        return dict(zip([d.id for d in result.documents], result.scores, strict=True))

    assert scores(rankings) == scores([rankings[i] for i in order if i < len(rankings)])


def test_ties_go_to_the_first_engine():
    assert ask([Told({"q": ["a", "b"]}), Told({"q": ["b", "a"]})])[0] == ["a", "b"]
    assert ask([Told({"q": ["b", "a"]}), Told({"q": ["a", "b"]})])[0] == ["b", "a"]
    # a, b and c have ranks 1, 2 and 3 in other orders: sums that plain addition would not make equal.
    cycle = ["abc", "bca", "cab"]
    names, scores = ask([Told({"q": list(order)}) for order in cycle])
    assert names == ["a", "b", "c"] and len(set(scores)) == 1


def test_a_ranking_that_repeats_a_document_counts_its_better_rank():
    names, scores = ask([Told({"q": ["a", "a", "b"]})])
    assert names == ["a", "b"]
    assert scores == [1 / 61, 1 / 62]


def test_documents_deep_in_both_rankings_are_found():
    first = [f"x{i}" for i in range(20)] + ["both"]
    second = [f"y{i}" for i in range(20)] + ["both"]
    assert ask([Told({"q": first}), Told({"q": second})], k=1)[0] == ["both"]


def test_a_failure_of_an_engine_is_not_an_empty_ranking():
    with pytest.raises(EngineError, match="down"):
        Hybrid([Told({"a": ["x"]}), Down()]).search([Query("a")], 1)
    results = Hybrid([Told({"a": ["x"], "b": ["y"]}), Half()]).search([Query("a"), Query("b")], 1)
    assert results[0] == Result(error="too slow")
    assert [document.id for document in results[1].documents] == ["y"]


def test_over_real_indexes_results_are_aligned(tmp_path):
    documents = [Document(str(i), "", f"word{i} shared") for i in range(9)]
    engines = [open_index(build_index(documents, tmp_path / str(b), b=b)) for b in (0.0, 1.0)]
    results = Hybrid(engines).search([Query("word4"), Query(""), Query("word7 shared")], 2)
    assert [[d.id for d in result.documents] for result in results] == [["4"], [], ["7", "0"]]
    assert Hybrid(engines).search([], 2) == []


def test_user_mistakes():
    with pytest.raises(UserError, match="needs an engine or more"):
        Hybrid([])
    with pytest.raises(UserError, match="k from 0 on"):
        Hybrid([Down()], k=-1)
    with pytest.raises(UserError, match="at least 1"):
        Hybrid([Told({"q": ["a"]})]).search([Query("q")], 0)
