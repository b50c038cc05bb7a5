"""Rewards of a search through a tree."""

import pytest

from rlkit.rewards.navigation import found, priced, steps


def search(*rankings):
    turns = []
    for ranking in rankings:
        turns += [
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "", "ranking": list(ranking)},
        ]
    return turns


def test_what_was_found_last_counts():
    assert found(search("b", "ab"), ["a"], [1]) == 1.0
    assert found(search("a", "b"), ["a"], [1]) == 0.0
    ended = [*search("b"), {"role": "assistant", "content": "", "ranking": ["a"]}]
    assert found(ended, ["a"], [1]) == 1.0
    cut_short = [*search("a"), {"role": "assistant", "content": ""}]
    assert found(cut_short, ["a"], [1]) == 1.0
    assert found([{"role": "assistant", "content": ""}], ["a"], [1]) == 0.0


def test_turns_beyond_those_that_are_needed_cost():
    turns = search("a", "a", "a")
    assert steps(turns) == 3
    assert priced(turns, ["a"], [1], fewest=3) == priced(turns, ["a"], [1], fewest=5) == 1.0
    assert priced(turns, ["a"], [1], fewest=1) == pytest.approx(0.96)
    assert priced(turns, ["a"], [1], fewest=1, step_price=1) == 0.0
    assert priced(search("b"), ["a"], [1], fewest=1) == 0.0
    with pytest.raises(ValueError, match="step_price"):
        priced(turns, ["a"], [1], 1, step_price=-1)
