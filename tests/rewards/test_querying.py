"""Rewards for queries: measure, gain and price; a turn without queries scores 0."""

import pytest

from rlkit.rewards.querying import augmented, gain, priced, retrieval

JUDGED, GRADES = ["a", "b"], [1, 1]


def turns(ranking=None, augmented=True):
    record = {} if ranking is None else {"ranking": ranking, "augmented": augmented}
    return [{"role": "assistant", "content": "x", **record}]


def test_retrieval_is_a_measure_of_the_ranking():
    assert retrieval(turns(["a", "b", "x"]), JUDGED, GRADES) == 1
    assert retrieval(turns(["x", "a"]), JUDGED, GRADES, "rr") == 0.5
    assert retrieval(turns([]), JUDGED, GRADES) == 0
    assert retrieval(turns(), JUDGED, GRADES) == 0 == retrieval([], JUDGED, GRADES)


def test_gain_is_relative_to_the_unchanged_query():
    assert gain(turns(["a"]), JUDGED, GRADES, ["x", "a"], "rr") == 0.5
    assert gain(turns(["x"]), JUDGED, GRADES, ["a"], "rr") == -1
    assert gain(turns(), JUDGED, GRADES, ["a"], "rr") == -1


def test_priced_charges_only_changed_queries():
    assert priced(turns(["a", "b"]), JUDGED, GRADES, price=0.25) == 0.75
    assert priced(turns(["a", "b"], augmented=False), JUDGED, GRADES, price=0.25) == 1
    assert priced(turns(), JUDGED, GRADES) == 0 == augmented(turns())
    assert augmented(turns([])) == 1
    with pytest.raises(ValueError, match="negative"):
        priced(turns(), JUDGED, GRADES, price=-1)
