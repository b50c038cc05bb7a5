"""Metrics of rankings: the traps of the libraries, agreement with trec_eval, and the session metric."""

import math
import random
import timeit

import ir_measures
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.retrieval import Evaluator, Page, measure, ndcg, num, write_run

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


@settings(deadline=None)
@given(grades, runs, st.integers(1, 12))
def test_our_ndcg_is_theirs(qrels, ranking, k):
    assert ndcg(ranking, qrels, k) == pytest.approx(measure(f"ndcg@{k}", ranking, qrels), abs=1e-6)


def test_exponential_gain_with_any_ids():
    """By hand: gains 7 and 1, in the wrong order."""
    found = (1 + 7 / math.log2(3)) / (7 + 1 / math.log2(3))
    assert ndcg(["ü y", "x"], {"x": 3, "ü y": 1}, gain="exponential") == pytest.approx(found)
    with pytest.raises(ValueError, match="linear or exponential"):
        ndcg([], {}, gain="exp")


def test_a_query_costs_microseconds():
    """At most 20 with the call; the bound here is loose, for machines that are busy."""
    rng = random.Random(0)
    qrels = {str(q): {str(rng.randrange(1000)): 1 for _ in range(20)} for q in range(50)}
    evaluator = Evaluator(qrels)
    ranking = [str(i) for i in range(10)]
    assert min(timeit.repeat(lambda: evaluator("7", ranking), number=500, repeat=5)) / 500 < 200e-6


def page(shown, clicked=()):
    return Page(list(shown), set(clicked))


def test_num():
    """The specification's three tests, and sums by hand."""
    assert num([page("ab", "ab")]) == 1
    assert num([page("xab", "ab")]) < 1
    assert num([page("a", "a"), page("b", "b")]) < num([page("ab", "ab")])
    assert num([page("xy")]) == 0 and num([]) == 0
    assert num([page("xy")], {"a": 1}) == 0
    # One relevant document second: 200 + 200 + 1000 characters against 200 + 1000.
    assert num([page("xa", "a")]) == pytest.approx((1 - 1400 / 132000) / (1 - 1200 / 132000))
    # Read twice counts once, and the second time costs its snippet alone.
    twice = num([page("a", "a"), page("ab", "ab")])
    by_hand = (1 - 1200 / 132000) + (1 - (1200 + 200 + 200 + 1200) / 132000)
    assert twice == pytest.approx(by_hand / ((1 - 1200 / 132000) + (1 - 2400 / 132000)))
    with pytest.raises(ValueError, match="positive"):
        num([], snippet=0)


pages = st.lists(st.lists(st.sampled_from("abcdef"), max_size=6, unique=True), max_size=4)
lengths = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 200_000), max_size=6)


@given(pages, st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 3)), lengths)
def test_num_is_a_share_and_what_is_irrelevant_lowers_it(shown, grades, read):
    session = [page(one, one) for one in shown]
    found = num(session, grades, read=read)
    assert 0 <= found <= 1
    assert num([page(["x", *one.shown], {"x", *one.clicked}) for one in session], grades, read=read) <= found
