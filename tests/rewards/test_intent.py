"""Rewards for descriptions of search intent: separation of a pool, and copying from snippets."""

import pytest

from rlkit.rewards.intent import EXCESS_TERMS, FREE_TERMS, copied, own_words, separation

POOL = ["x", "y", "a", "b"]


def turns_with(ranking=None, intent="", terms=()):
    record = {} if ranking is None else {"ranking": list(ranking), "intent": intent, "terms": list(terms)}
    return [{"role": "assistant", "content": "", **record}]


@pytest.mark.parametrize(
    ("ranking", "score"),
    [
        ("abxy", 1.0),
        ("axby", ((1 + 2 / 3) / 2 - 5 / 12) / (1 - 5 / 12)),  # the worst order has (1/3 + 2/4) / 2 = 5/12
        ("xyab", 0.0),
        (None, 0.0),
    ],
)
def test_separation_is_rescaled_average_precision(ranking, score):
    assert separation(turns_with(ranking), ["a", "b"], POOL) == pytest.approx(score)


@pytest.mark.parametrize(
    ("intent", "fraction"),
    [
        ("One two THREE, four", 1.0),
        ("one two three four five", 0.5),
        ("one two three", 0.0),
        ("four three two one", 0.0),
        ("", 0.0),
    ],
)
def test_copied_is_the_fraction_of_shared_4_grams(intent, fraction):
    assert copied(turns_with("ab", intent), ["zero one two three four"], []) == fraction


@pytest.mark.parametrize(
    ("num_terms", "fraction"),
    [
        (0, 0.0),
        (FREE_TERMS, 0.0),
        (FREE_TERMS + 1, 1 / EXCESS_TERMS),
        (FREE_TERMS + EXCESS_TERMS, 1.0),
        (FREE_TERMS + EXCESS_TERMS + 1, 1.0),
    ],
)
def test_copied_counts_distinctive_terms_in_any_order(num_terms, fraction):
    distinctive_terms = [f"w{i}" for i in range(20)]
    own_terms = [f"own{i}" for i in range(100)]  # they do not dilute the copied ones
    turns = turns_with("ab", "", [*own_terms, *distinctive_terms[:num_terms]])
    assert copied(turns, [], distinctive_terms) == pytest.approx(fraction)


def test_copied_is_0_without_a_description():
    assert copied(turns_with(), ["one two three four"], ["w0"]) == 0


def test_own_words_charges_copies():
    turns = turns_with("abxy", "one two three four five")
    assert own_words(turns, ["a", "b"], POOL, ["one two three four"], []) == pytest.approx(0.5)
    assert own_words(turns, ["a", "b"], POOL, ["one two three four"], [], copy_price=3) == 0
    assert own_words(turns_with(), ["a", "b"], POOL, [], []) == 0
    with pytest.raises(ValueError, match="copy_price"):
        own_words(turns, [], POOL, [], [], copy_price=-1)
