"""Measures of one ranking: agreement with trec_eval, exponential gain, and the measure of sessions."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlkit.retrieval.measures import Evaluator, canonical_measure
from rlkit.rewards.retrieval import Page, measure, ndcg, num

MEASURES = (
    "ndcg@10", "ndcg", "ndcg@1", "rr", "rr@3", "recall@5", "precision@5", "ap", "ap@4", "hit@3", "rprec",
    "rr(rel=2)@3", "ap(rel=3)", "recall(rel=2)@5", "precision(rel=2)@5", "hit(rel=3)@2", "rprec(rel=2)",
)  # fmt: skip
documents = st.text("abcdefgh0123", min_size=1, max_size=3)
rankings = st.lists(documents, max_size=30)
grades = st.dictionaries(documents, st.integers(-1, 3), max_size=20)


@settings(deadline=None)
@given(grades, rankings, st.integers(0, 3))
@example({"a": 1}, ["b", "b", "a"], 1)  # a repeated document does not take a rank
def test_measure_agrees_with_trec_eval(qrels, ranking, min_grade):
    expected = Evaluator({"q": qrels}, MEASURES, min_grade=max(min_grade, 1))("q", ranking)
    for name in MEASURES:
        value = measure(name, ranking, qrels, min_grade=min_grade)
        assert value == pytest.approx(expected[name], abs=1e-6), name


NAMES = r"(ndcg|recall|precision|rr|ap|hit|rprec|map|mrr)?(\(rel=[0-9]\))?(@[0-9]{0,2})?"


@given(st.from_regex(NAMES, fullmatch=True))
def test_measure_accepts_the_canonical_names_only(name):
    try:
        is_canonical = canonical_measure(name) == name
    except ValueError:
        is_canonical = False
    if is_canonical:
        assert measure(name, [], {}) == 0
    else:
        with pytest.raises(ValueError, match="there is no measure"):
            measure(name, [], {})


def test_measure_of_a_perfect_ranking_is_exactly_1():
    qrels = {str(i): 1 for i in range(7)}
    for name in ("ndcg@10", "ndcg", "rr", "recall@10", "precision@7", "ap", "hit@1", "rprec"):
        assert measure(name, qrels, qrels) == 1


def test_measure_without_a_relevant_document_is_0():
    for name in MEASURES:
        assert measure(name, ["x"], {"x": 0}) == measure(name, [], {"x": 1}) == measure(name, ["x"], {}) == 0


@pytest.mark.parametrize("name", ["ndgc@10", "recall", "ndcg@0", "rr@", "precision@x"])
def test_measure_rejects_unknown_names(name):
    with pytest.raises(ValueError, match="there is no measure"):
        measure(name, [], {})


def test_ndcg_with_exponential_gain():
    """The gains are 7 and 1, in the wrong order. Ids may contain spaces and non-ASCII characters."""
    expected = (1 + 7 / math.log2(3)) / (7 + 1 / math.log2(3))
    assert ndcg(["ü y", "x"], {"x": 3, "ü y": 1}, gain="exponential") == pytest.approx(expected)
    with pytest.raises(ValueError, match="linear or exponential"):
        ndcg([], {}, gain="exp")


def test_ndcg_of_large_grades_neither_overflows_nor_allocates_memory():
    assert ndcg(["b", "a"], {"a": 10**18, "b": 1}, k=2) == pytest.approx(1 / math.log2(3))
    huge = {str(i): 10**308 for i in range(9)}  # the sum of these gains is not a float
    assert ndcg(huge, huge) == 1
    # Exponential gains are 2 ** grade - 1: two grades less is a quarter of the gain.
    expected = (0.25 + 1 / math.log2(3)) / (1 + 0.25 / math.log2(3))
    qrels = {"a": 10**18, "b": 10**18 - 2, "c": 1}
    assert ndcg(["b", "a", "c"], qrels, gain="exponential") == pytest.approx(expected)


def page(shown, clicked=()):
    return Page(list(shown), set(clicked))


def test_num_of_small_sessions():
    assert num([page("ab", "ab")]) == 1
    assert num([page("xab", "ab")]) < 1
    assert num([page("a", "a"), page("b", "b")]) < num([page("ab", "ab")])
    assert num([page("xy")]) == 0 and num([]) == 0
    assert num([page("xy")], {"a": 1}) == 0
    # The relevant document is second: it ends at 200 + 200 + 1000 characters, ideally at 200 + 1000.
    assert num([page("xa", "a")]) == pytest.approx((1 - 1400 / 132000) / (1 - 1200 / 132000))
    # A document that is clicked twice counts once, and the second time costs only its snippet.
    twice = num([page("a", "a"), page("ab", "ab")])
    by_hand = (1 - 1200 / 132000) + (1 - (1200 + 200 + 200 + 1200) / 132000)
    assert twice == pytest.approx(by_hand / ((1 - 1200 / 132000) + (1 - 2400 / 132000)))
    with pytest.raises(ValueError, match="positive"):
        num([], snippet=0)


pages = st.lists(st.lists(st.sampled_from("abcdef"), max_size=6, unique=True), max_size=4)
lengths = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 200_000), max_size=6)


@given(pages, st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 3)), lengths)
def test_num_is_in_0_1_and_irrelevant_documents_lower_it(shown, grades, read):
    session = [page(ids, ids) for ids in shown]
    value = num(session, grades, read=read)
    assert 0 <= value <= 1
    with_irrelevant = [page(["x", *p.shown], {"x", *p.clicked}) for p in session]
    assert num(with_irrelevant, grades, read=read) <= value
