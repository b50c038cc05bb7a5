"""What a written query earns: the round trip, the form of people's queries, and no copies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.rewards.writing import (
    COPIED,
    copied,
    learning_value,
    natural_form,
    own_words,
    round_trip,
    shares_copied,
)

LIMITS = {
    "min_words": 4.0,
    "max_words": 12.0,
    "min_frequent_words": 0.25,
    "copied_ngrams": 0.2,
    "copied_words": 0.4,
    "copied_rare_words": 0.0,
}
MEASURES = {
    "words": 6.0,
    "frequent_words": 0.5,
    "copied_ngrams": 0.0,
    "copied_words": 0.4,
    "copied_rare_words": 0.0,
}


def turns(rank=2, **changed):
    """Return the turn of a query whose document has a rank, with changes of the measures."""
    return [{"role": "assistant", "query": "a query", "rank": rank, "measures": {**MEASURES, **changed}}]


def test_query_of_usual_form_earns_the_reciprocal_rank():
    assert round_trip(turns()) == natural_form(turns(), LIMITS) * 0.5 == own_words(turns(), LIMITS) == 0.5
    assert own_words(turns(rank=1), LIMITS) == 1
    assert round_trip(turns(rank=0)) == own_words(turns(rank=0), LIMITS) == 0


@pytest.mark.parametrize("changed", [{"words": 3.0}, {"words": 13.0}, {"frequent_words": 0.2}])
def test_query_of_unusual_form_earns_nothing(changed):
    assert natural_form(turns(**changed), LIMITS) == own_words(turns(**changed), LIMITS) == 0


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, 0.0),  # at the limit
        ({"copied_words": 0.6}, 0.5),  # (0.6 - 0.4) / 0.4
        ({"copied_words": 0.8}, 1.0),  # twice the limit
        ({"copied_ngrams": 0.3}, 0.5),
        ({"copied_rare_words": 0.05}, 0.5),  # 0.05 / MIN_EXCESS
        ({"copied_words": 0.6, "copied_ngrams": 1.0}, 1.0),  # the largest
    ],
)
def test_copying_beyond_the_limit_costs_in_proportion(changed, expected):
    assert copied(turns(**changed), LIMITS) == pytest.approx(expected)
    assert own_words(turns(**changed), LIMITS) == pytest.approx(0.5 * (1 - expected))


def test_high_limit_leaves_room_for_the_excess():
    limits = {**LIMITS, "copied_words": 0.75}
    assert copied(turns(copied_words=0.875), limits) == pytest.approx(0.5)
    assert copied(turns(copied_words=1.0), limits) == 1


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_copied_is_a_share_that_increases_with_each_measure(shares, limits):
    limits = LIMITS | dict(zip(COPIED, limits, strict=True))
    value = copied(turns(**dict(zip(COPIED, shares, strict=True))), limits)
    assert 0 <= value <= 1
    for name, share in zip(COPIED, shares, strict=True):
        more = dict(zip(COPIED, shares, strict=True)) | {name: min(share + 0.1, 1.0)}
        assert copied(turns(**more), limits) >= value


def test_turn_without_a_query_earns_nothing():
    empty = [{"role": "assistant", "content": ""}]
    assert (
        round_trip(empty)
        == natural_form(empty, LIMITS)
        == own_words(empty, LIMITS)
        == learning_value(empty)
        == 0
    )
    assert own_words([], LIMITS) == 0


def test_learning_value_does_not_apply_without_an_encoder():
    assert learning_value(turns()) is None
    assert learning_value([{**turns()[0], "value": -0.3}]) == -0.3


def test_shares_count_trigrams_and_words_that_are_not_usual():
    document = ["book", "cheap", "flights", "to", "lisbon", "and", "porto"]
    query = ["how", "do", "i", "book", "cheap", "flights", "to", "rome"]
    shares = shares_copied(query, document, ["lisbon", "cheap"], {"how", "do", "i", "to"})
    assert shares == {
        "copied_ngrams": pytest.approx(2 / 6),
        "copied_words": pytest.approx(3 / 8),
        "copied_rare_words": pytest.approx(1 / 8),
    }
    assert set(shares_copied([], document, [], set()).values()) == {0.0}
