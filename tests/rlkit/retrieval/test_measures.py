"""Measures by trec_eval: agreement with ir-measures, and known traps of evaluation libraries."""

import math
import random
import timeit

import ir_measures
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.retrieval.measures import Evaluator, canonical_measure, descending_scores

IR_MEASURES_NAMES = {
    "ndcg@10": "nDCG@10",
    "ndcg": "nDCG",
    "rr": "RR",
    "rr@3": "RR@3",
    "recall@5": "R@5",
    "precision@5": "P@5",
    "ap": "AP",
    "ap@4": "AP@4",
    "hit@3": "Success@3",
    "rprec": "Rprec",
}
LEVEL_MEASURES = ("rr(rel=2)@3", "ap(rel=3)", "recall(rel=2)@5", "precision(rel=1)@5", "hit(rel=2)@2")
MEASURES = (*IR_MEASURES_NAMES, *LEVEL_MEASURES)
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


@pytest.mark.parametrize(
    ("spellings", "canonical"),
    [
        ("nDCG@10 NDCG@10 ndcg_cut_10 ndcg_cut.10 ndcg_at_10 ndcg@010", "ndcg@10"),
        ("RR@10 mrr@10 MRR@10 recip_rank_cut_10 mrr_at_10", "rr@10"),
        ("MRR RR recip_rank Reciprocal-Rank", "rr"),
        ("AP map MAP", "ap"),
        ("MAP@100 AP@100 map_cut_100 map_cut.100", "ap@100"),
        ("hits@10 Hit@10 HR@10 hit_rate@10 Success@10 success_10 accuracy@10 Accuracy@10", "hit@10"),
        ("P@5 P_5 P.5 Precision@5 precision_at_5", "precision@5"),
        ("R@100 Recall@100 recall_100 recall.100", "recall@100"),
        ("Rprec R-Prec R-precision r_precision", "rprec"),
        ("RR(rel=2)@10 MRR(rel=2)@10 rr(REL=2)@10 rr(rel=02)@10", "rr(rel=2)@10"),
        ("AP(rel=2) map(rel=2)", "ap(rel=2)"),
        ("P(rel=3)@5", "precision(rel=3)@5"),
        ("ndcg nDCG", "ndcg"),
    ],
)
def test_canonical_measure_accepts_the_usual_spellings(spellings, canonical):
    for spelling in [*spellings.split(), canonical, canonical.replace("@", " @ ")]:
        assert canonical_measure(spelling) == canonical, spelling
    assert list(Evaluator({}, [*spellings.split(), canonical])("q", [])) == [canonical]


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("ndgc@10", "ndcg@10"),
        ("nDCG10", "ndcg@10"),
        ("recal@100", "recall@100"),
        ("recall", "recall@10"),
        ("P(rel=2)", "precision(rel=2)@10"),
        ("ndcg@0", "ndcg@1"),
        ("rr@", "rr"),
        ("RR@10(rel=2)", "rr(rel=2)@10"),
        ("rr(rel=0)@5", "rr(rel=1)@5"),
        ("nDCG(rel=2)@10", "ndcg@10"),
        ("rprec@10", "rprec"),
        ("precision@x", "precision@10"),
        ("ndcg@99999999999", "ndcg@1000000000"),
    ],
)
def test_evaluator_rejects_unknown_measure_with_the_nearest_one(name, suggestion):
    with pytest.raises(ValueError, match="there is no measure") as error:
        Evaluator({}, [name])
    assert f"did you mean {suggestion!r}?" in str(error.value) and "\n" not in str(error.value)
    assert canonical_measure(suggestion) == suggestion


@given(st.text() | st.text("nmrdcgaphit@_.()rel=0123456789 -"))
def test_canonical_measure_is_idempotent_or_an_error_in_one_line(name):
    try:
        canonical = canonical_measure(name)
    except ValueError as error:
        assert str(error).startswith("there is no measure") and len(str(error).splitlines()) == 1
    else:
        assert canonical_measure(canonical) == canonical


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
    if name not in IR_MEASURES_NAMES:  # those with a level
        name = name.replace("recall", "R").replace("hit", "Success").replace("precision", "P")
        return ir_measures.parse_measure(name.replace("rr", "RR").replace("ap", "AP"))
    measure = ir_measures.parse_measure(IR_MEASURES_NAMES[name])
    return measure if name.startswith("ndcg") else measure(rel=min_grade)


small_grades = st.dictionaries(documents, st.integers(-2, 5), max_size=8)
large_grades = st.dictionaries(
    documents, st.integers(-(10**18), 10**18) | st.sampled_from([2**31, 2**63, 10**308, 1, 0]), max_size=8
)


@settings(deadline=None)
@given(small_grades, st.lists(documents, max_size=12, unique=True), st.sampled_from([None, 1, 3, 10]))
def test_ndcg_of_large_grades_has_trec_evals_formula(grades, ranking, cutoff):
    """A factor for all gains changes no nDCG, so a million times trec_eval's grades must have its values."""
    name = "ndcg" if cutoff is None else f"ndcg@{cutoff}"
    positive = {document: grade for document, grade in grades.items() if grade > 0}
    expected = 0.0
    if positive and ranking:
        measure = "ndcg" if cutoff is None else f"ndcg_cut.{cutoff}"
        evaluator = pytrec_eval.RelevanceEvaluator({"q": positive}, {measure})
        expected = evaluator.evaluate({"q": descending_scores(ranking)})["q"][measure.replace(".", "_")]
    for factor in (1, 10**6, 10**18, 10**300):
        multiples = {document: grade * factor for document, grade in grades.items()}
        assert Evaluator({"q": multiples}, [name])("q", ranking)[name] == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(large_grades, st.lists(documents, max_size=12))
def test_large_grades_are_relevant_in_binary_measures_and_all_values_are_in_0_1(grades, ranking):
    scores = Evaluator({"q": grades}, MEASURES)("q", ranking)
    clipped = {document: max(min(grade, 3), 0) for document, grade in grades.items()}
    expected = Evaluator({"q": clipped}, MEASURES)("q", ranking)
    for name, value in scores.items():
        assert 0 <= value <= 1 + 1e-12 and not math.isnan(value)
        if not name.startswith("ndcg"):
            assert value == expected[name]


def test_level_of_a_name_replaces_the_minimum_grade():
    evaluator = Evaluator({"q": {"a": 1, "b": 2}}, ["rr", "rr(rel=1)", "rr(rel=2)", "rr(rel=3)"], min_grade=2)
    assert evaluator("q", ["a", "b"]) == {"rr": 0.5, "rr(rel=1)": 1, "rr(rel=2)": 0.5, "rr(rel=3)": 0}


def test_scoring_a_query_takes_microseconds():
    """It takes at most 20 µs on an idle machine; the bound is loose for busy ones."""
    rng = random.Random(0)
    qrels = {str(q): {str(rng.randrange(1000)): 1 for _ in range(20)} for q in range(50)}
    evaluator = Evaluator(qrels)
    ranking = [str(i) for i in range(10)]
    assert min(timeit.repeat(lambda: evaluator("7", ranking), number=500, repeat=5)) / 500 < 200e-6
