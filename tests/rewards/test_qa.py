"""Rewards for short answers: agreement with published evaluations, extraction, and resistance to hacks."""

import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers.data.metrics.squad_metrics import compute_exact, compute_f1, normalize_answer

from rlkit.reward import call_reward
from rlkit.rewards.qa import (
    HEDGES,
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
from rlkit.rewards.search import backed
from rlkit.rewards.simulation import holds_answer
from rlkit.words import PUNCTUATION, has_unspaced

REWARDS = (exact_match, f1, cover_match)

UNSPACED = st.text("巴黎伦敦のアーｶﾞกรุเทព។、。「」xX1１ ·・", max_size=12)

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
    ("Jean-Paul Sartre", "sartre", 0, 0.5),
    ("An", "A", 1, 0),
]


@pytest.mark.parametrize(("prediction", "gold", "exact", "overlap"), TRIVIAQA)
def test_metrics_of_triviaqa_examples(prediction, gold, exact, overlap):
    assert is_exact(prediction, gold, "triviaqa") == bool(exact)
    assert token_f1(prediction, gold, "triviaqa") == pytest.approx(overlap, abs=1e-6)


@pytest.mark.parametrize("rules", ["squad", "triviaqa"])
@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("O’Neill", "O'Neill"),
        ("O'Neill", "O´Neill"),
        ("“Paris”", "Paris"),
        ("Paris…", "Paris"),
        ("«Paris»", '"Paris"'),
        ("1939–1945", "1939-1945"),
        ("Jean‑Paul", "Jean-Paul"),
        ("5′ 10″", "5' 10\""),
    ],
)
def test_typographic_punctuation_equals_its_ascii_form(prediction, gold, rules):
    """The published scripts score these 0."""
    assert exact_match(answer(prediction), [gold], rules) == 1
    assert exact_match(answer(gold), [prediction], rules) == 1
    assert f1(answer(prediction), [gold], rules=rules) == 1


@pytest.mark.parametrize(("prediction", "gold"), [("-5", "5"), ("3.5", "35"), ("1/2", "12"), ("C++", "C")])
def test_exact_match_deletes_signs_and_points_as_published(prediction, gold):
    assert normalize_answer(prediction) == normalize_answer(gold)
    assert exact_match(answer(prediction), [gold]) == 1


def test_rewards_accept_rules():
    row = {"completion": answer("well-known actor"), "answers": ["well known"]}
    assert (call_reward(exact_match, row), call_reward(f1, row)) == (0, 0)
    assert f1(**row, rules="triviaqa") == pytest.approx(0.8)
    assert exact_match(answer("well-known"), ["well known"], rules="triviaqa") == 1


# Typographic punctuation, by its ASCII form.
TYPOGRAPHY = {"'": "‘’‚‹›´ʼ′", '"': "“”„«»″", "-": "‐‑‒–—―−", "...": "…", "*": "•"}


def ascii_form(text):
    for form, characters in TYPOGRAPHY.items():
        for character in characters:
            text = text.replace(character, form)
    for character in PUNCTUATION:
        text = text.replace(character, ",")
    return "".join(chr(ord(c) - 0xFEE0) if "\uff01" <= c <= "\uff5e" else c for c in text)


@given(TEXT | SENTENCES, TEXT | SENTENCES)
@example("The The", "a")
@example("İstanbul", "istanbul")
@example("“Paris”…", "Paris")
def test_metrics_agree_with_the_squad_code_except_for_typography(prediction, gold):
    if prediction == ascii_form(prediction) and not has_unspaced(prediction):
        assert normalize(prediction) == normalize_answer(prediction)
    assert normalize(prediction) == normalize(ascii_form(prediction))
    assert normalize_triviaqa(prediction) == normalize_triviaqa(ascii_form(prediction))
    prediction, gold = ascii_form(prediction), ascii_form(gold)
    assume(not has_unspaced(prediction + gold))
    assert is_exact(prediction, gold) == compute_exact(gold, prediction)
    if normalize(prediction) and normalize(
        gold
    ):  # this is the code of v2, which differs from v1.1 for empty strings
        assert token_f1(prediction, gold) == pytest.approx(compute_f1(gold, prediction))


def span_of_english(text):
    """Return the span of a string without scripts that have no spaces, as before they were supported."""
    text = text.translate(str.maketrans(dict.fromkeys("\u2012\u2013\u2014\u2015\u2026\u2022", " ")))
    return f" {normalize_answer(ascii_form(re.sub('(?<=[0-9])-(?=[0-9])', ' ', text)))} "


@given(TEXT | SENTENCES)
@example("Napoleon (1769–1821), “emperor”")
def test_span_of_strings_in_alphabets_is_unchanged(text):
    has_full_width = any("\uff01" <= c <= "\uff5e" or c in PUNCTUATION for c in text)
    assume(not has_unspaced(text) and not has_full_width)
    assert span(text) == span_of_english(text)


@given(TEXT | UNSPACED, TEXT | UNSPACED)
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
        ("<think>maybe <answer>Paris</answer>", None),
        ("<think>maybe <answer>Paris</answer></think>", None),
        ("<answer>Paris</answer><think>or <answer>London</answer>", "Paris"),
        ("the prompt opened the tag: <answer>London</answer></think><answer>Paris</answer>", "Paris"),
        ("<think>a</think><search>b</search>\n<think>c</think><answer>Paris</answer>", "Paris"),
        ("<think>a</think><search>b</search>\n<think>c <answer>Paris</answer>", None),
        ("Paris", None),
        ("", None),
    ],
)
def test_extract_answer_reads_the_last_complete_pair_of_tags(completion, extracted):
    assert extract_answer(completion) == extracted


# Pieces of completions, for the property that thoughts do not count.
PIECES = st.lists(
    st.sampled_from(["<answer>Rome</answer>", "<answer>", "</answer>", "<search>q</search>", "\n", "Rome"])
).map("".join)


@given(PIECES, PIECES, PIECES)
def test_answers_in_thoughts_do_not_count(thought, other_thought, unfinished):
    before = f"<think>{thought}</think>\n<search>q</search>\n<think>{other_thought}</think>"
    assert extract_answer(f"{before}<answer>Paris</answer>") == "Paris"
    assert extract_answer(f"{before}<answer>Paris</answer><think>{unfinished}") == "Paris"
    assert extract_answer(f"{before}<think>{unfinished}") is None
    assert extract_answer(f"{thought}</think><answer>Paris</answer>") == "Paris"


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
@pytest.mark.parametrize(
    "answers", [[], ["The"], ["Paris", "!!!"], ["–"], ["  "], "Rome", ["。"], ["「」"], ["……"], ["　！？"]]
)
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
    "text",
    [
        *(
            "Paris",
            "It is Paris.",
            "It is in Paris",
            "the capital Paris",
            "the city of Paris",
            "Paris!",
            "Paris…",
        ),
        *(
            "Paris, France",
            "Paris (France)",
            "Paris – France",
            "Paris - France",
            "Paris, Texas (USA)",
            "Paris [1]",
        ),
        *("**Paris**", "“Paris”", "« Paris »", "`Paris`", "Answer: Paris"),
        "Paris London Rome Berlin",  # documented: nothing tells it from "New York City"
    ],
)
def test_cover_match_accepts_a_single_claim(text):
    assert cover_match(answer(text), ["Paris"]) == 1


# fmt: off
LISTS_AND_DENIALS = [
    # denials
    "no Paris", "not Paris", "never Paris", "without Paris", "except Paris", "anything but Paris",
    "neither Paris", "rather than Paris", "instead of Paris", "other than Paris", "far from Paris",
    "hardly Paris", "Paris is false", "incorrect: Paris", "Paris is wrong", "cannot be Paris",
    "It isn't Paris", "It wasn’t Paris", "can't be Paris", "don´t say Paris", "≠ Paris", "nicht Paris",
    # lists
    "Paris or London", "Paris and London", "either Paris", "Paris vs London", "Paris vs. London",
    "Paris ou Londres", "Paris oder London", "Paris и London", "Paris / London", "Paris/ London",
    "Paris | London", "Paris|London Paris", "Paris & London", "Paris + London", "Paris ／ London",
    "Paris · London", "Paris; London", "Paris\nLondon", "Paris\r\nLondon", "Paris\u2028London",
    "• Paris • London", "* Paris * London", "- Paris - London", "- Paris\n- London",
    "1. Paris 2. London", "1) Paris 2) London", "(1) Paris (2) London", "[1] Paris [2] London",
    "a) Paris b) London", "ii) Paris iii) London", "#1 Paris #2 London", "1: Paris 2: London",
    "Paris 2. London", "Paris, London, Rome", "London; Paris; Rome", "Rome\nParis\nLondon",
    "Paris — London — Rome", "Paris (London) (Rome)", "Paris、London、Rome",
    "Rome, London, Madrid, Vienna, Paris",
    # other answers
    "I think it is in Paris", "Parisian", "> Paris",
]
# fmt: on


@pytest.mark.parametrize("text", LISTS_AND_DENIALS)
def test_cover_match_rejects_lists_and_denials(text):
    assert cover_match(answer(text), ["Paris"]) == 0
    assert cover_match(answer(text), [text]) == 1


GOLD_ANSWERS = [
    *("AC/DC", "A / B", "Trinidad and Tobago", "Not Fade Away", "Smith & Wesson", "Don't Stop Me Now", "no"),
    *("Crosby, Stills, Nash & Young", "1. FC Köln", "No. 5", "3.5", "x; y", "Yahoo! (company)", "1,234"),
    *("b)", "1769–1821", "Gone with the Wind", "Nothing but the Truth", "- 5 -"),
    "The Good, the Bad and the Ugly",
]
# The words of the golds are in no hedge, and the marks are any.
GOLDS = st.sampled_from(GOLD_ANSWERS) | st.text(
    st.sampled_from("xyzXYZ0123 .,;:/|&+-–—'’\"“”()[]<>*•#"), min_size=1, max_size=20
).map(str.strip).filter(lambda text: normalize(text) and span(text).strip())


@given(GOLDS)
def test_cover_match_accepts_the_gold_answer_in_a_sentence(gold):
    for text in (gold, f"It is {gold}", f"the answer {gold}", f"Answer: {gold}"):
        assert cover_match(answer(text), [gold]) == 1


@given(st.sampled_from(GOLD_ANSWERS), st.sampled_from(["It is {}.", "{}, France", "{} (1975)", "“{}”"]))
def test_cover_match_accepts_known_answers_in_context(gold, context):
    assert cover_match(answer(context.format(gold)), [gold]) == 1


CONTRACTIONS = ("isn't", "wasn’t", "can't", "don't", "won't", "wouldn´t", "ain't", "haven't")


@given(GOLDS, st.sampled_from(sorted(HEDGES)) | st.sampled_from(CONTRACTIONS), st.data())
def test_cover_match_rejects_the_gold_answer_with_a_hedge(gold, hedge, data):
    hedge = data.draw(st.sampled_from([hedge, hedge.upper(), hedge.capitalize()]))
    for text in (f"{hedge} {gold}", f"{gold} {hedge}", f"{gold} {hedge} London", f"It is {hedge} {gold}"):
        assert cover_match(answer(text), [gold]) == 0


@given(
    st.lists(st.sampled_from(["Paris", "London", "Rome", "Vienna"]), min_size=2, max_size=4, unique=True),
    st.sampled_from(["; ", "\n", " / ", " | ", "|", " & ", " + ", " or ", " and ", " vs ", " • ", "\n- "]),
)
def test_cover_match_rejects_candidates_joined_by_a_separator(candidates, separator):
    for gold in candidates:
        assert cover_match(answer(separator.join(candidates)), [gold]) == 0


@given(st.lists(st.sampled_from(["Paris", "London", "Rome", "Vienna"]), min_size=2, max_size=4, unique=True))
def test_cover_match_rejects_enumerated_candidates(candidates):
    for form in ("{}. {}", "{}) {}", "({}) {}", "[{}] {}", "#{} {}", "{}: {}"):
        items = [form.format(number, name) for number, name in enumerate(candidates, 1)]
        assert cover_match(answer(" ".join(items)), candidates[:1], max_extra=9) == 0


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("100 km/h", "100"),
        ("10,000, about", "10000"),
        ("Napoleon (1769–1821), emperor", "1821"),
        ("7. Correct", "7"),
        ("A. Einstein", "Einstein"),
        ("J. R. R. Tolkien", "Tolkien"),
        ("c. 1850", "1850"),
        ("New York City", "New York"),
    ],
)
def test_cover_match_accepts_marks_that_separate_no_candidates(text, gold):
    assert cover_match(answer(text), [gold]) == 1


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


# Scripts without spaces: prediction, gold, exact match, F1 by characters, containment.
UNSPACED_TABLE = [
    ("巴黎市", "巴黎", 0, 0.8, 1),
    ("京东", "东京", 0, 0.5, 0),  # a company, and Tokyo
    ("上海海上", "海上", 0, 2 / 3, 1),
    ("巴黎", "巴黎市", 0, 0.8, 0),
    ("伦敦", "巴黎", 0, 0, 0),
    ("「巴黎」。", "巴黎", 1, 1, 1),
    ("東京 大学", "東京大学", 1, 1, 1),
    ("iPhone手机", "iphone 手机", 1, 1, 1),
    ("1912年", "１９１２年", 1, 1, 1),
    ("1912年", "1912", 0, 2 / 3, 1),
    ("ＡＢＣ", "abc", 1, 1, 1),
    ("Paris，France", "Paris, France", 1, 1, 1),
    ("Mu\u0308ller", "M\u00fcller", 1, 1, 1),
    ("１０，０００", "10,000", 1, 1, 1),
    ("ジョン・レノン", "ジョンレノン", 1, 1, 1),
    ("约翰·列侬", "约翰列侬", 1, 1, 1),
    ("ｶﾞﾝﾀﾞﾑ", "ガンダム", 1, 1, 1),
    ("か\u3099", "が", 1, 1, 1),
    ("กรุง\u200bเทพ", "กรุงเทพ", 1, 1, 1),
    ("กรุงเทพฯ", "กรุงเทพ", 0, 12 / 13, 1),
    ("ភ្នំពេញ។", "ភ្នំពេញ", 1, 1, 1),
    ("ရန်ကုန်", "ရန်", 0, 2 / 3, 1),  # four characters and two
    ("维生素A", "维生素", 0, 6 / 7, 1),  # "A" is no article
    ("维生素 A", "维生素", 0, 6 / 7, 1),
    ("《The Lord of the Rings》", "Lord of the Rings", 1, 1, 1),
    ("公元前3000年", "300", 0, 0, 0),
]


@pytest.mark.parametrize(("prediction", "gold", "exact", "overlap", "covered"), UNSPACED_TABLE)
def test_metrics_of_scripts_without_spaces(prediction, gold, exact, overlap, covered):
    assert is_exact(prediction, gold) == is_exact(prediction, gold, "triviaqa") == bool(exact)
    assert token_f1(prediction, gold) == pytest.approx(overlap)
    assert covers(prediction, gold) == bool(covered)


PASSAGES = [
    ("巴黎是法国的首都，人口约二百一十万。", "巴黎", "里昂"),
    ("首都はParis、人口は約210万人。", "Paris", "Pari"),
    ("夏目漱石（1867～1916）は、日本の小説家。", "1916", "191"),
    ("看过《The Lord of the Rings》的人", "The Lord of the Rings", "The Lord of the Ring"),
    ("กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย", "กรุงเทพมหานคร", "เชียงใหม่"),
    ("ວຽງຈັນເປັນນະຄອນຫຼວງຂອງລາວ", "ວຽງຈັນ", "ຫຼວງພະບາງ"),
    ("ភ្នំពេញជារាជធានីនៃប្រទេសកម្ពុជា", "ភ្នំពេញ", "សៀមរាប"),
    ("ရန်ကုန်သည်မြန်မာနိုင်ငံ၏မြို့ဖြစ်သည်", "ရန်ကုန်", "မန္တလေး"),
]


@pytest.mark.parametrize(("passage", "gold", "wrong"), PASSAGES)
def test_answers_are_found_in_passages_without_spaces(passage, gold, wrong):
    turns = [{"role": "user", "content": passage, "documents": ["1"], "query": "q"}]
    assert holds_answer(passage, [gold]) and not holds_answer(passage, [wrong])
    assert backed(turns, answer(gold), [gold]) == 1
    assert backed(turns, answer(wrong), [wrong]) == 0
    assert backed(turns, answer(wrong), [gold]) == 0


@given(UNSPACED, UNSPACED, UNSPACED)
def test_covers_finds_answers_without_spaces_at_any_position(before, gold, after):
    assume(span(gold).strip() and not gold.startswith(("ุ", "ា")) and not after.startswith(("ุ", "ា")))
    assert covers(f"{before}。{gold}。{after}", gold)


UNSPACED_CLAIMS = {
    "巴黎": (
        "答案是巴黎 法国的首都是巴黎 巴黎，法国 巴黎（法国） 「巴黎」 《巴黎》 巴黎。 巴黎市 首都巴黎 "
        "巴黎[1] 巴黎① 法兰西共和国巴黎 巴黎——法国首都 非洲的巴黎 不列颠的巴黎 埃及的巴黎"
    ),
    "パリ": (
        "答えはパリです パリ（フランス） フランスのパリ 「パリ」 パリだと思います フランスの首都パリ "
        "パリ・フランス"
    ),
    "レノン": "ジョン・レノン",
    "ปารีส": "กรุงปารีส ปารีส",
    "和平": "和平 和平饭店",
    "Paris": "巴黎（Paris） 答えはParis",
}
UNSPACED_LISTS_AND_DENIALS = {
    "巴黎": (
        "巴黎、伦敦 巴黎或伦敦 伦敦和巴黎 巴黎与伦敦 巴黎以及伦敦 巴黎还是伦敦 巴黎；伦敦 巴黎，伦敦，罗马 "
        "巴黎/伦敦 巴黎／伦敦 巴黎｜伦敦 巴黎＋伦敦 ①巴黎②伦敦 1.巴黎2.伦敦 （１）巴黎（２）伦敦 "
        "一、巴黎二、伦敦 《巴黎》《伦敦》 「巴黎」「伦敦」 不是巴黎 并非巴黎 而非巴黎 除了巴黎 巴黎以外 "
        "没有巴黎 巴黎是错的 不可能是巴黎 绝对否定巴黎 我认为这个问题的答案是巴黎"
    ),
    "パリ": (
        "パリ、ロンドン パリかロンドン パリとロンドン パリやロンドン パリまたはロンドン パリあるいはロンドン "
        "パリではない パリじゃない パリ以外 パリとは違う パリではありません パリ・ロンドン・ローマ "
        "パリではなくロンドン"
    ),
    "ปารีส": "ปารีสหรือลอนดอน ปารีสและลอนดอน ไม่ใช่ปารีส",
    "Paris": "不是Paris Parisかロンドン Paris、London",
}


@pytest.mark.parametrize("gold", UNSPACED_CLAIMS)
def test_cover_match_accepts_a_single_claim_without_spaces(gold):
    assert [text for text in UNSPACED_CLAIMS[gold].split() if cover_match(answer(text), [gold]) != 1] == []


@pytest.mark.parametrize("gold", UNSPACED_LISTS_AND_DENIALS)
def test_cover_match_rejects_lists_and_denials_without_spaces(gold):
    texts = UNSPACED_LISTS_AND_DENIALS[gold].split()
    assert [text for text in texts if cover_match(answer(text), [gold]) != 0] == []
    assert [text for text in texts if cover_match(answer(text), [text]) != 1] == []


@given(
    st.lists(
        st.sampled_from(["巴黎", "伦敦", "東京", "パリ", "ローマ"]), min_size=2, max_size=4, unique=True
    ),
    st.sampled_from(["、", "或", "和", "；", "/", "＋", "与", "或者", "以及", "，或"]),
)
def test_cover_match_rejects_candidates_joined_without_spaces(candidates, separator):
    for gold in candidates:
        assert cover_match(answer(separator.join(candidates)), [gold]) == 0
