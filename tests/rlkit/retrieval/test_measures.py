"""Measures by trec_eval: the traps of the libraries, and agreement with ir-measures."""

import random
import timeit

import ir_measures
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.retrieval.measures import Evaluator, write_run

MEASURES = ("ndcg@10", "ndcg", "rr", "rr@3", "recall@5", "precision@5", "ap", "ap@4")
THEIRS = {
    "ndcg@10": "nDCG@10",
    "ndcg": "nDCG",
    "rr": "RR",
    "rr@3": "RR@3",
    "recall@5": "R@5",
    "precision@5": "P@5",
    "ap": "AP",
    "ap@4": "AP@4",
}
documents = st.text("abcdefgh0123", min_size=1, max_size=3)


def test_the_table_of_the_specification():
    """Grades x:3, y:1, listed y before x."""
    qrels = {"q": {"x": 3, "y": 1}}
    evaluator = Evaluator(qrels, ["ndcg@10", "rr"], min_grade=2)
    assert evaluator("q", ["y", "x"]) == {"ndcg@10": pytest.approx(0.797, abs=5e-4), "rr": 0.5}
    assert evaluator("q", ["x", "y"]) == {"ndcg@10": 1, "rr": 1}


def test_the_order_is_that_of_the_ranking_whatever_the_ids():
    """trec_eval sorts equal scores by id, descending; ours are never equal."""
    run = write_run(str(i) for i in range(5000))
    assert list(run) == sorted(run, key=run.__getitem__, reverse=True) and len(set(run.values())) == 5000
    for ids in (["a", "b", "c"], ["c", "b", "a"]):
        assert Evaluator({"q": {ids[1]: 1}}, ["rr"])("q", ids)["rr"] == 0.5


@pytest.mark.parametrize("query", ["missing", "no relevant"])
def test_what_has_no_score_is_zero_and_not_left_out(query):
    evaluator = Evaluator({"q": {"x": 1}, "no relevant": {"x": 0}}, MEASURES)
    assert evaluator(query, ["x"]) == dict.fromkeys(MEASURES, 0)
    assert evaluator("q", []) == dict.fromkeys(MEASURES, 0)


def test_excluded_documents_and_the_querys_own_are_taken_out():
    """BRIGHT's excluded ids, and BEIR's queries that are documents."""
    ranking = ["bad", "q", "x", "q2"]
    assert Evaluator({"q": {"x": 1}}, ["rr"])("q", ranking)["rr"] == pytest.approx(1 / 3)
    evaluator = Evaluator({"q": {"x": 1}}, ["rr"], excluded={"q": ["bad"]}, drop_query_id=True)
    assert evaluator("q", ranking)["rr"] == 1
    assert evaluator("q", ["bad", "q"])["rr"] == 0


@pytest.mark.parametrize("name", ["ndgc@10", "recall", "ndcg@0", "rr@", "precision@x"])
def test_a_measure_that_is_none(name):
    with pytest.raises(ValueError, match="there is no measure"):
        Evaluator({}, [name])


runs = st.lists(documents, max_size=30)
grades = st.dictionaries(documents, st.integers(-1, 3), max_size=20)


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["1", "b", "c"]), st.tuples(grades, runs), min_size=1), st.integers(1, 3)
)
def test_it_agrees_with_ir_measures_on_any_ranking(cases, level):
    """To 1e-6, with gaps and repeats; ir-measures counts queries that are missing, as we do.

    It is not asked about queries without a relevant document: pytrec_eval never returns from some of them.
    """
    qrels = {query: dict(found) for query, (found, _) in cases.items()}
    evaluator = Evaluator(qrels, MEASURES, min_grade=level)
    names = {name: _parse(name, level) for name in MEASURES}
    run = {query: write_run(ranking) for query, (_, ranking) in cases.items()}
    judged = {query: found for query, found in qrels.items() if any(grade > 0 for grade in found.values())}
    asked = {query: ranked for query, ranked in run.items() if query in judged and ranked}
    theirs = {
        (m.query_id, str(m.measure)): m.value for m in ir_measures.iter_calc(names.values(), judged, asked)
    }
    for query, (_, ranking) in cases.items():
        found = evaluator(query, ranking)
        for name, parsed in names.items():
            assert found[name] == pytest.approx(theirs.get((query, str(parsed)), 0), abs=1e-6), name


def _parse(name, level):
    measure = ir_measures.parse_measure(THEIRS[name])
    return measure if name.startswith("ndcg") else measure(rel=level)


def test_a_query_costs_microseconds():
    """At most 20 with the call; the bound here is loose, for machines that are busy."""
    rng = random.Random(0)
    qrels = {str(q): {str(rng.randrange(1000)): 1 for _ in range(20)} for q in range(50)}
    evaluator = Evaluator(qrels)
    ranking = [str(i) for i in range(10)]
    assert min(timeit.repeat(lambda: evaluator("7", ranking), number=500, repeat=5)) / 500 < 200e-6
