"""Rewards of queries: what was found, its gain, its price; a turn without queries is 0."""

import pytest

from rlkit.rewards.querying import augmented, gain, priced, retrieval

JUDGED, GRADES = ["a", "b"], [1, 1]


def turns(ranking=None, changed=True):
    record = {} if ranking is None else {"ranking": ranking, "augmented": changed}
    return [{"role": "assistant", "content": "x", **record}]


def test_what_was_found():
    assert retrieval(turns(["a", "b", "x"]), JUDGED, GRADES) == 1
    assert retrieval(turns(["x", "a"]), JUDGED, GRADES, "rr") == 0.5
    assert retrieval(turns([]), JUDGED, GRADES) == 0
    assert retrieval(turns(), JUDGED, GRADES) == 0 == retrieval([], JUDGED, GRADES)


def test_gain_is_against_the_tasks_own_query():
    assert gain(turns(["a"]), JUDGED, GRADES, ["x", "a"], "rr") == 0.5
    assert gain(turns(["x"]), JUDGED, GRADES, ["a"], "rr") == -1
    assert gain(turns(), JUDGED, GRADES, ["a"], "rr") == -1


def test_only_a_change_has_a_price():
    assert priced(turns(["a", "b"]), JUDGED, GRADES, price=0.25) == 0.75
    assert priced(turns(["a", "b"], changed=False), JUDGED, GRADES, price=0.25) == 1
    assert priced(turns(), JUDGED, GRADES) == 0 == augmented(turns())
    assert augmented(turns([])) == 1
    with pytest.raises(ValueError, match="negative"):
        priced(turns(), JUDGED, GRADES, price=-1)
