"""Measures of one ranking: agreement with trec_eval, exponential gain, and the session metric."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlkit.retrieval.measures import Evaluator
from rlkit.rewards.retrieval import Page, measure, ndcg, num

MEASURES = ("ndcg@10", "ndcg", "ndcg@1", "rr", "rr@3", "recall@5", "precision@5", "ap", "ap@4")
documents = st.text("abcdefgh0123", min_size=1, max_size=3)
runs = st.lists(documents, max_size=30)
grades = st.dictionaries(documents, st.integers(-1, 3), max_size=20)


@settings(deadline=None)
@given(grades, runs, st.integers(0, 3))
@example({"a": 1}, ["b", "b", "a"], 1)  # a document that repeats takes no rank
def test_measure_is_trec_evals(qrels, ranking, level):
    theirs = Evaluator({"q": qrels}, MEASURES, min_grade=max(level, 1))("q", ranking)
    for name in MEASURES:
        assert measure(name, ranking, qrels, min_grade=level) == pytest.approx(theirs[name], abs=1e-6), name


@given(st.from_regex(r"(ndcg|recall|precision|rr|ap|map|mrr)?(@[0-9]{0,2})?", fullmatch=True))
def test_measure_and_evaluator_know_the_same_names(name):
    def accepts(call):
        try:
            call()
        except ValueError as error:
            return str(error)
        return None

    assert accepts(lambda: measure(name, [], {})) == accepts(lambda: Evaluator({}, [name]))


def test_measure_of_a_perfect_ranking_is_exactly_one():
    qrels = {str(i): 1 for i in range(7)}
    for name in ("ndcg@10", "ndcg", "rr", "recall@10", "precision@7", "ap"):
        assert measure(name, qrels, qrels) == 1


def test_measure_without_a_relevant_document_is_zero():
    for name in MEASURES:
        assert measure(name, ["x"], {"x": 0}) == measure(name, [], {"x": 1}) == measure(name, ["x"], {}) == 0


@pytest.mark.parametrize("name", ["ndgc@10", "recall", "ndcg@0", "rr@", "precision@x"])
def test_measure_rejects_an_unknown_name(name):
    with pytest.raises(ValueError, match="there is no measure"):
        measure(name, [], {})


def test_exponential_gain_with_any_ids():
    """By hand: gains 7 and 1, in the wrong order."""
    found = (1 + 7 / math.log2(3)) / (7 + 1 / math.log2(3))
    assert ndcg(["ü y", "x"], {"x": 3, "ü y": 1}, gain="exponential") == pytest.approx(found)
    with pytest.raises(ValueError, match="linear or exponential"):
        ndcg([], {}, gain="exp")


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
