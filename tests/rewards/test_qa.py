"""Rewards for short answers: agreement with published evaluations, extraction, and resistance to hacks."""

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers.data.metrics.squad_metrics import compute_exact, compute_f1, normalize_answer

from rlkit.reward import call_reward
from rlkit.rewards.qa import (
    REFUSALS,
    check_answers,
    cover_match,
    covers,
    exact_match,
    extract_answer,
    f1,
    is_exact,
    normalize,
    normalize_triviaqa,
    span,
    token_f1,
)

REWARDS = (exact_match, f1, cover_match)

TEXT = st.text(
    st.one_of(st.sampled_from("aAn theTHE.-_'’“–0123 "), st.characters(exclude_categories=["Cs"])),
    max_size=40,
)
WORDS = st.lists(
    st.sampled_from(
        ["a", "an", "the", "new", "york", "city", "5", "may", "or", "not", "café", "o'brien", "u.s."]
    ),
    max_size=6,
)
SENTENCES = WORDS.map(" ".join)


def answer(text):
    return f"<think>I searched.</think><answer>{text}</answer>"


# Section 5.2 of the specification of the search environments, computed by the rules of SQuAD v1.1:
# prediction, gold, exact match, F1, containment as a substring ("char") and as whole words ("token").
TABLE = [
    ("The Beatles", "Beatles", 1, 1, 1, 1),
    ("U.S.A.", "USA", 1, 1, 1, 1),
    ("rock 'n' roll", "rock n roll", 1, 1, 1, 1),
    ("10,000", "10000", 1, 1, 1, 1),
    ("1,000", "1 000", 0, 0, 0, 0),
    ("well-known", "well known", 0, 0, 0, 0),
    ("Barack Obama", "Barack Hussein Obama", 0, 0.8, 0, 0),
    ("New York City", "New York", 0, 0.8, 1, 1),
    ("Beijing, China", "Beijing", 0, 2 / 3, 1, 1),
    ("It was on 5 May 1821", "May 5, 1821", 0, 2 / 3, 0, 0),
    ("paris paris paris", "Paris", 0, 0.5, 1, 1),
    ("“Paris”", "Paris", 0, 0, 1, 1),
    ("café", "cafe", 0, 0, 0, 0),
    ("cart", "art", 0, 0, 1, 0),
    ("in the United States of America", "USA", 0, 0, 0, 0),
    ("An", "A", 1, 0, 1, 1),
]


@pytest.mark.parametrize("row", TABLE)
def test_metrics_of_squad_examples(row):
    prediction, gold, exact, overlap, char, token = row
    assert is_exact(prediction, gold) == bool(exact)
    assert token_f1(prediction, gold) == pytest.approx(overlap, abs=1e-6)
    assert covers(prediction, gold, "char") == bool(char)
    assert covers(prediction, gold) == bool(token)


# Results of TriviaQA's official script, which replaces punctuation by spaces: prediction, gold, EM, F1.
TRIVIAQA = [
    ("well-known", "well known", 1, 1),
    ("1,000", "1 000", 1, 1),
    ("10,000", "10000", 0, 0),
    ("U.S.A.", "USA", 0, 0),
    ("U.S.A.", "u s", 1, 1),
    ("The_Beatles", "beatles", 1, 1),
    ("rock ‘n’ roll", "rock n roll", 1, 1),
    ("O`Brien´s", "o brien s", 1, 1),
    ("“Paris”", "Paris", 0, 0),
    ("Jean-Paul Sartre", "sartre", 0, 0.5),
    ("An", "A", 1, 0),
]


@pytest.mark.parametrize(("prediction", "gold", "exact", "overlap"), TRIVIAQA)
def test_metrics_of_triviaqa_examples(prediction, gold, exact, overlap):
    assert is_exact(prediction, gold, "triviaqa") == bool(exact)
    assert token_f1(prediction, gold, "triviaqa") == pytest.approx(overlap, abs=1e-6)


def test_rewards_accept_rules():
    row = {"completion": answer("well-known actor"), "answers": ["well known"]}
    assert (call_reward(exact_match, row), call_reward(f1, row)) == (0, 0)
    assert f1(**row, rules="triviaqa") == pytest.approx(0.8)
    assert exact_match(answer("well-known"), ["well known"], rules="triviaqa") == 1


@given(TEXT | SENTENCES, TEXT | SENTENCES)
@example("The The", "a")
@example("İstanbul", "istanbul")
def test_metrics_agree_with_the_squad_code(prediction, gold):
    assert normalize(prediction) == normalize_answer(prediction)
    assert is_exact(prediction, gold) == compute_exact(gold, prediction)
    if normalize(prediction) and normalize(
        gold
    ):  # this is the code of v2, which differs from v1.1 for empty strings
        assert token_f1(prediction, gold) == pytest.approx(compute_f1(gold, prediction))


@given(TEXT, TEXT)
def test_metrics_are_consistent(prediction, gold):
    overlap = token_f1(prediction, gold)
    assert 0 <= overlap <= 1
    assert overlap == token_f1(gold, prediction)
    if is_exact(prediction, gold) and normalize(gold):
        assert overlap == 1
        assert covers(prediction, gold, "char")
    assert normalize(normalize(prediction)) == normalize(prediction)
    assert normalize_triviaqa(normalize_triviaqa(prediction)) == normalize_triviaqa(prediction)
    assert span(span(prediction)) == span(prediction)


@given(SENTENCES, SENTENCES, SENTENCES)
def test_covers_finds_whole_words_at_any_position(before, gold, after):
    assume(normalize(gold))
    assert covers(f"{before} {gold} {after}", gold)
    assert not covers(f"x{normalize(gold)}x", gold)


@pytest.mark.parametrize(
    ("prediction", "gold", "covered"),
    [
        ("Napoleon (1769-1821), emperor", "1821", True),
        ("Napoleon (1769–1821), emperor", "1821", True),
        ("in “Paris”", "Paris", True),
        ("O’Brien wrote", "O'Brien", True),
        ("Jean‐Paul Sartre", "Jean-Paul Sartre", True),
        ("it is known", "no", False),
        ("a museum", "us", False),
        ("10.5", "10", False),
        ("1,000", "1", False),
        ("", "x", False),
        ("x", "", False),
    ],
)
def test_covers_separates_words_at_dashes_and_quotes(prediction, gold, covered):
    assert covers(prediction, gold) == covered


def test_unknown_mode_and_rules_are_errors():
    with pytest.raises(ValueError, match="mode 'word'"):
        covers("a", "b", "word")
    with pytest.raises(ValueError, match="squad, triviaqa"):
        exact_match(answer("b"), ["b"], rules="squad2")


@pytest.mark.parametrize(
    ("completion", "extracted"),
    [
        ("<answer>Paris</answer>", "Paris"),
        ("<answer>\n Paris \n</answer>", "Paris"),
        ("<answer>London</answer> no: <answer>Paris</answer>", "Paris"),
        ("<think>maybe <answer>London</answer></think><answer>Paris</answer>", "Paris"),
        ("<answer><answer>Paris</answer>", "Paris"),
        ("<answer><answer>Paris</answer></answer>", "Paris"),
        ("<answer>London<answer>Paris</answer>", "Paris"),
        ("<answer>Paris</answer> and London</answer>", "Paris"),
        ("<answer>Paris</answer><answer>London", "Paris"),
        ("</answer><answer>Paris</answer>", "Paris"),
        ("<answer></answer>", ""),
        ("<answer>Paris", None),
        ("Paris</answer>", None),
        ("</answer>Paris<answer>", None),
        ("<Answer>Paris</Answer>", None),
        ("Paris", None),
        ("", None),
    ],
)
def test_extract_answer_reads_the_last_complete_pair_of_tags(completion, extracted):
    assert extract_answer(completion) == extracted


@given(st.text("<>/answer x\n", max_size=60), st.text("ab c\n", max_size=10))
def test_extract_answer_ignores_text_before_the_last_pair(before, text):
    assert extract_answer(f"{before}<answer>{text}</answer>") == text.strip()


def test_extract_answer_takes_linear_time():
    assert extract_answer("<answer>" * 300_000) is None
    assert extract_answer("</answer>" * 300_000) is None
    assert extract_answer("<answer>" * 300_000 + "x" + "</answer>" * 300_000) == "x"


@pytest.mark.parametrize("reward", REWARDS)
def test_rewards_of_correct_wrong_and_missing_answers(reward):
    assert reward(answer("The Paris!"), ["Lutetia", "Paris"]) == 1
    assert reward(answer("London"), ["Lutetia", "Paris"]) == 0
    assert reward(answer(""), ["Paris"]) == 0
    assert reward("", ["Paris"]) == 0
    # Search-R1 also reads the prompt, and would extract the answer from the prompt's example.
    assert reward("The answer is Beijing.", ["Beijing"]) == 0
    assert reward("<information>Paris</information>", ["Paris"]) == 0


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("answers", [[], ["The"], ["Paris", "!!!"], ["–"], ["  "], "Rome"])
def test_unusable_gold_answers_are_errors(reward, answers):
    for completion in (answer("Paris"), ""):
        with pytest.raises(ValueError, match="answer"):
            reward(completion, answers)
    with pytest.raises(ValueError, match="answer"):
        check_answers(answers)


def test_f1_is_that_of_the_best_alias():
    assert f1(answer("New York City"), ["Gotham", "New York", "NYC"]) == pytest.approx(0.8)
    assert f1(answer("Barack Obama"), ["Barack Hussein Obama"]) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("text", "covered"),
    [
        ("It is in Paris", 1),
        ("Paris, France", 1),
        ("I think it is in Paris", 0),
        ("Paris or London", 0),
        ("Paris and London", 0),
        ("neither Paris", 0),
        ("not Paris", 0),
        ("It isn't Paris", 0),
        ("Rome, London, Madrid, Vienna, Paris", 0),
        ("Parisian", 0),
    ],
)
def test_cover_match_limits_extra_words(text, covered):
    assert cover_match(answer(text), ["Paris"]) == covered


@pytest.mark.parametrize("candidates", ["Paris, London, Rome", "London; Paris; Rome", "Rome\nParis\nLondon"])
def test_cover_match_rejects_lists_of_candidates(candidates):
    assert cover_match(answer(candidates), ["Paris"]) == 0
    assert cover_match(answer(candidates), [candidates]) == 1


def test_cover_match_does_not_count_words_of_the_gold_answer():
    gold = "Trinidad and Tobago and the Orchestra of St Martin in the Fields"
    assert cover_match(answer(f"{gold}, London"), [gold]) == 1
    assert cover_match(answer("I think it is in Paris"), ["Paris"], max_extra=5) == 1


@given(
    st.lists(
        st.sampled_from(["Paris", "London", "Rome", "Vienna", "Madrid", "Berlin", "Oslo"]),
        min_size=2,
        unique=True,
    )
)
def test_listing_candidates_does_not_pay(candidates):
    """No reward exceeds that of a single guess, which is correct with probability 1/n."""
    stuffed = answer(" or ".join(candidates))
    assert exact_match(stuffed, candidates[:1]) == 0
    assert cover_match(stuffed, candidates[:1]) == 0
    assert f1(stuffed, candidates[:1]) == pytest.approx(1 / len(candidates))


@given(SENTENCES, SENTENCES)
def test_extra_words_lower_f1(gold, extra):
    assume(normalize(gold) and normalize(extra))
    assert 0 < f1(answer(f"{gold} {extra}"), [gold]) < 1


@pytest.mark.parametrize("reward", REWARDS)
def test_unanswerable_tasks_require_an_exact_refusal(reward):
    row = {"answers": list(REFUSALS), "answerable": False}
    for phrase in REFUSALS:
        assert call_reward(reward, row | {"completion": answer(phrase.upper() + ".")}) == 1
    for text in ("unknown actor", "it is unknown", "Paris", "", "unknown or Paris"):
        assert call_reward(reward, row | {"completion": answer(text)}) == 0
    assert call_reward(reward, row | {"completion": "unknown"}) == 0


@pytest.mark.parametrize("reward", REWARDS)
def test_refusal_of_an_answerable_task_is_wrong(reward):
    for phrase in REFUSALS:
        assert reward(answer(phrase), ["Paris"]) == 0


def test_refusals_are_valid_gold_answers():
    check_answers(REFUSALS)
    check_answers(REFUSALS, "triviaqa")
