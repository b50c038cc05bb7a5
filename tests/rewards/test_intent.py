"""Rewards of intents: what a ranking is worth, what counts as copied."""

import pytest

from rlkit.rewards.intent import copied, own_words, separation

POOL = ["x", "y", "a", "b"]


def said(ranking=None, intent=""):
    record = {} if ranking is None else {"ranking": list(ranking), "intent": intent}
    return [{"role": "assistant", "content": "", **record}]


@pytest.mark.parametrize(
    ("ranking", "score"),
    [
        ("abxy", 1.0),
        ("axby", ((1 + 2 / 3) / 2 - 5 / 12) / (1 - 5 / 12)),  # the worst order: (1/3 + 2/4) / 2
        ("xyab", 0.0),
        (None, 0.0),
    ],
)
def test_separation(ranking, score):
    assert separation(said(ranking), ["a", "b"], POOL) == pytest.approx(score)


@pytest.mark.parametrize(
    ("intent", "share"),
    [
        ("One two THREE, four", 1.0),
        ("one two three four five", 0.5),
        ("one two three", 0.0),
        ("four three two one", 0.0),
        ("", 0.0),
    ],
)
def test_copied(intent, share):
    assert copied(said("ab", intent), ["zero one two three four"]) == share


def test_own_words():
    turns = said("abxy", "one two three four five")
    assert own_words(turns, ["a", "b"], POOL, ["one two three four"]) == pytest.approx(0.5)
    assert own_words(turns, ["a", "b"], POOL, ["one two three four"], copy_price=3) == 0
    assert own_words(said(), ["a", "b"], POOL, []) == 0
    with pytest.raises(ValueError, match="copy_price"):
        own_words(turns, [], POOL, [], copy_price=-1)
