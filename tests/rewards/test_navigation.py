"""Rewards for a search through a document tree."""

import math

import pytest

from rlkit.rewards.navigation import found, priced, steps


def search_turns(*rankings):
    turns = []
    for ranking in rankings:
        turns += [
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "", "ranking": list(ranking)},
        ]
    return turns


def test_found_scores_the_last_ranking():
    assert found(search_turns("b", "ab"), ["a"], [1]) == 1.0
    assert found(search_turns("a", "b"), ["a"], [1]) == 0.0
    ended_by_environment = [*search_turns("b"), {"role": "assistant", "content": "", "ranking": ["a"]}]
    assert found(ended_by_environment, ["a"], [1]) == 1.0
    truncated = [*search_turns("a"), {"role": "assistant", "content": ""}]
    assert found(truncated, ["a"], [1]) == 1.0
    assert found([{"role": "assistant", "content": ""}], ["a"], [1]) == 0.0


def test_priced_charges_turns_beyond_the_oracles():
    turns = search_turns("a", "a", "a")
    assert steps(turns) == 3
    assert priced(turns, ["a"], [1], fewest=3) == priced(turns, ["a"], [1], fewest=5) == 1.0
    assert priced(turns, ["a"], [1], fewest=1) == pytest.approx(0.96)
    assert priced(turns, ["a"], [1], fewest=1, step_price=1) == 0.0
    assert priced(search_turns("b"), ["a"], [1], fewest=1) == 0.0
    with pytest.raises(ValueError, match="step_price"):
        priced(turns, ["a"], [1], 1, step_price=-1)


def test_documents_that_cannot_be_ranked_stay_in_the_ideal():
    assert found(search_turns("a"), ["a"], [1], [1]) == 1.0
    assert found(search_turns("a"), ["a"], [1], [1, 1]) == pytest.approx(1 / (1 + 1 / math.log2(3)))
    assert found(search_turns("a"), [], [], [3]) == 0.0
    assert priced(search_turns("a"), ["a"], [1], 1, ideal=[1, 1]) == found(
        search_turns("a"), ["a"], [1], [1, 1]
    )
