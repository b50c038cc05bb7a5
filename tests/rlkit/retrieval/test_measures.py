"""Measures by trec_eval: agreement with ir-measures, and known traps of evaluation libraries."""

import random
import timeit

import ir_measures
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.retrieval.measures import Evaluator, descending_scores

MEASURES = ("ndcg@10", "ndcg", "rr", "rr@3", "recall@5", "precision@5", "ap", "ap@4")
IR_MEASURES_NAMES = {
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


def test_scores_of_worked_example():
    """With grades x: 3 and y: 1, ranking y before x has nDCG@10 0.797, and RR 0.5 if 2 is relevant."""
    qrels = {"q": {"x": 3, "y": 1}}
    evaluator = Evaluator(qrels, ["ndcg@10", "rr"], min_grade=2)
    assert evaluator("q", ["y", "x"]) == {"ndcg@10": pytest.approx(0.797, abs=5e-4), "rr": 0.5}
    assert evaluator("q", ["x", "y"]) == {"ndcg@10": 1, "rr": 1}


def test_order_of_ranking_does_not_depend_on_ids():
    """trec_eval breaks ties by id, descending, so scores must never tie."""
    run = descending_scores(str(i) for i in range(5000))
    assert list(run) == sorted(run, key=run.__getitem__, reverse=True) and len(set(run.values())) == 5000
    for ids in (["a", "b", "c"], ["c", "b", "a"]):
        assert Evaluator({"q": {ids[1]: 1}}, ["rr"])("q", ids)["rr"] == 0.5


@pytest.mark.parametrize("query", ["missing", "no relevant"])
def test_query_without_ranking_or_relevant_document_scores_zero(query):
    evaluator = Evaluator({"q": {"x": 1}, "no relevant": {"x": 0}}, MEASURES)
    assert evaluator(query, ["x"]) == dict.fromkeys(MEASURES, 0)
    assert evaluator("q", []) == dict.fromkeys(MEASURES, 0)


def test_excluded_ids_and_query_id_are_removed():
    """BRIGHT has excluded ids, and some BEIR queries are themselves documents."""
    ranking = ["bad", "q", "x", "q2"]
    assert Evaluator({"q": {"x": 1}}, ["rr"])("q", ranking)["rr"] == pytest.approx(1 / 3)
    evaluator = Evaluator({"q": {"x": 1}}, ["rr"], excluded={"q": ["bad"]}, drop_query_id=True)
    assert evaluator("q", ranking)["rr"] == 1
    assert evaluator("q", ["bad", "q"])["rr"] == 0


@pytest.mark.parametrize("name", ["ndgc@10", "recall", "ndcg@0", "rr@", "precision@x"])
def test_evaluator_rejects_unknown_measure(name):
    with pytest.raises(ValueError, match="there is no measure"):
        Evaluator({}, [name])


runs = st.lists(documents, max_size=30)
grades = st.dictionaries(documents, st.integers(-1, 3), max_size=20)


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["1", "b", "c"]), st.tuples(grades, runs), min_size=1), st.integers(1, 3)
)
def test_scores_agree_with_ir_measures(cases, min_grade):
    """Compare to 1e-6, with unjudged and repeated documents. Like ours, ir-measures counts missing queries.

    It gets no query without a relevant document, because pytrec_eval hangs on some of those.
    """
    qrels = {query: dict(query_grades) for query, (query_grades, _) in cases.items()}
    evaluator = Evaluator(qrels, MEASURES, min_grade=min_grade)
    measures = {name: _parse(name, min_grade) for name in MEASURES}
    run = {query: descending_scores(ranking) for query, (_, ranking) in cases.items()}
    judged = {}
    for query, query_grades in qrels.items():
        if any(grade > 0 for grade in query_grades.values()):
            judged[query] = query_grades
    judged_run = {query: scores for query, scores in run.items() if query in judged and scores}
    metrics = ir_measures.iter_calc(measures.values(), judged, judged_run)
    expected = {(metric.query_id, str(metric.measure)): metric.value for metric in metrics}
    for query, (_, ranking) in cases.items():
        scores = evaluator(query, ranking)
        for name, measure in measures.items():
            assert scores[name] == pytest.approx(expected.get((query, str(measure)), 0), abs=1e-6), name


def _parse(name, min_grade):
    measure = ir_measures.parse_measure(IR_MEASURES_NAMES[name])
    return measure if name.startswith("ndcg") else measure(rel=min_grade)


def test_scoring_a_query_takes_microseconds():
    """It takes at most 20 µs on an idle machine; the bound is loose for busy ones."""
    rng = random.Random(0)
    qrels = {str(q): {str(rng.randrange(1000)): 1 for _ in range(20)} for q in range(50)}
    evaluator = Evaluator(qrels)
    ranking = [str(i) for i in range(10)]
    assert min(timeit.repeat(lambda: evaluator("7", ranking), number=500, repeat=5)) / 500 < 200e-6
