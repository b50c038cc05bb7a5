"""Rewards for descriptions of search intent: separation of a pool, and copying from snippets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.rewards.intent import EXCESS_TERMS, FREE_TERMS, copied, own_words, separation
from rlkit.words import keywords

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


SNIPPET = "这座磨坊用橡木建造，后来改成了画廊，位于特博纳姆镇附近"


@pytest.mark.parametrize(
    ("intent", "fraction"),
    [
        (SNIPPET, 1.0),
        (SNIPPET.replace("，", ""), 1.0),
        ("这座磨坊用橡木建", 1.0),  # 8 characters count as 4 words
        ("这座磨坊用橡木建的房", 1 / 3),
        ("这座磨坊用橡木", 0.0),
        ("寻找木头盖的磨坊，现在展出绘画", 0.0),
    ],
)
def test_copied_4_grams_have_8_characters_in_scripts_without_spaces(intent, fraction):
    assert copied(turns_with("ab", intent), [SNIPPET], []) == pytest.approx(fraction)


@pytest.mark.parametrize(
    ("num_characters", "separator", "num_copied"),
    [
        (2, "", 1),
        (4, "", 2),  # of the bigrams AB, BC and CD, two
        (20, "", 10),
        (20, "zz", 10),
        (20, "。", 10),
    ],
)
def test_overlapping_bigrams_count_once(num_characters, separator, num_copied):
    characters = [chr(0x4E00 + i) for i in range(num_characters)]
    pairs = ["".join(characters[i : i + 2]) for i in range(0, num_characters, 2)]
    turns = turns_with("ab", "", keywords(separator.join(pairs)))
    expected = min(max((num_copied - FREE_TERMS) / EXCESS_TERMS, 0), 1)
    assert copied(turns, [], keywords("".join(characters))) == expected


@given(st.lists(st.integers(0, 29), max_size=60))
def test_copied_terms_count_at_least_half(starts):
    """Whatever the order and the repeats, each counted bigram makes at most one other one free."""
    distinctive = keywords("".join(chr(0x4E00 + i) for i in range(31)))
    terms = [distinctive[i] for i in starts]
    expected = min(max((len(set(terms)) / 2 - FREE_TERMS) / EXCESS_TERMS, 0), 1)
    assert copied(turns_with("ab", "", terms), [], distinctive) >= expected


@given(
    st.text(
        st.sampled_from([chr(code) for code in (*range(0x4E00, 0x4E40), *range(0xE01, 0xE2E))]), min_size=20
    ),
    st.integers(0, 3),
)
def test_copies_of_snippets_without_spaces_earn_nothing(snippet, disguise):
    separator = ["", "，", " ", "\u200b"][disguise]
    copy = separator.join(snippet[i : i + 9] for i in range(0, len(snippet), 9))
    turns = turns_with("abxy", copy, keywords(copy))
    assert separation(turns, ["a", "b"], POOL) == 1
    distinctive = keywords(snippet)
    if separator in ("", "\u200b") or len(set(keywords(copy))) > 2 * (FREE_TERMS + EXCESS_TERMS):
        assert own_words(turns, ["a", "b"], POOL, [snippet], distinctive) == 0


def test_copied_is_0_without_a_description():
    assert copied(turns_with(), ["one two three four"], ["w0"]) == 0


def test_own_words_charges_copies():
    turns = turns_with("abxy", "one two three four five")
    assert own_words(turns, ["a", "b"], POOL, ["one two three four"], []) == pytest.approx(0.5)
    assert own_words(turns, ["a", "b"], POOL, ["one two three four"], [], copy_price=3) == 0
    assert own_words(turns_with(), ["a", "b"], POOL, [], []) == 0
    with pytest.raises(ValueError, match="copy_price"):
        own_words(turns, [], POOL, [], [], copy_price=-1)
