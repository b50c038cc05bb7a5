"""Rewards for short answers to questions, such as `<answer>Paris</answer>`.

Only the last complete pair of answer tags in the completion counts, outside of thoughts
(`rlkit.rewards.thinking`). A completion without it has no answer and scores 0. The answer and every accepted
answer are normalized and compared in one of three ways:

* `exact_match`: the two are equal;
* `f1`: overlap of their words;
* `cover_match`: the answer contains the accepted one as whole words, with few extra words, and is neither a
  list nor a denial.

In scripts without spaces between words, such as those of Chinese, Japanese and Thai, each character is a word
(`rlkit.words`), as in MLQA's evaluation of Chinese.

On a task whose column `answerable` is false, `answers` are the accepted refusals (`REFUSALS`), and all three
rewards are exact match: "unknown actor" is not a refusal.

Normalization removes only English articles and keeps accents, as in the published evaluations. It deviates
from them only in what it does first: it applies NFC, and replaces typographic punctuation, the punctuation of
scripts without spaces, and full-width letters and digits by their ASCII form, so that a curly apostrophe
equals a straight one. Strings without such characters and scripts are scored as published.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from rlkit.rewards.thinking import after_thinking
from rlkit.words import MARKS, PUNCTUATION, UNSPACED, has_unspaced, separate_characters

REFUSALS = ("unknown", "not enough information", "insufficient information", "cannot be determined")

# Words that turn an answer into a list or a denial: "Paris or London", "not Paris". They are compared after
# normalization, which deletes apostrophes. Those at the end are for models that switch languages.
# fmt: off
HEDGES = frozenset(
    (
        "or", "and", "nor", "either", "neither", "both", "plus", "versus", "vs", "between", "among",
        "alternatively", "alternative", "others", "etc", "no", "not", "none", "never", "nothing", "nobody",
        "nowhere", "non", "cannot", "without", "except", "excepting", "excluding", "excluded", "but",
        "besides", "apart", "aside", "than", "instead", "far", "unlike", "unless", "hardly", "barely",
        "scarcely", "rarely", "seldom", "unlikely", "doubt", "doubtful", "impossible", "false", "untrue",
        "incorrect", "incorrectly", "wrong", "wrongly", "mistaken", "mistakenly", "opposite", "minus",
        "negative", "aint", "arent", "cant", "couldnt", "darent", "didnt", "doesnt", "dont", "hadnt",
        "hasnt", "havent", "isnt", "mightnt", "mustnt", "neednt", "oughtnt", "shant", "shouldnt", "wasnt",
        "werent", "wont", "wouldnt", "ou", "oder", "oppure", "eller", "et", "und", "ni", "nicht", "kein",
        "keine", "keinen", "ohne", "niet", "pas", "jamais", "sans", "sauf", "nunca", "ikke", "inte", "или",
        "и", "не", "нет",
    )
)
# fmt: on

# Next to a character of a script without spaces, a letter is not an article: "维生素 A" is vitamin A.
_ARTICLES = re.compile(rf"\b(?<![{UNSPACED}{MARKS}] )(?:a|an|the)\b(?! [{UNSPACED}{MARKS}])")
_DELETE = str.maketrans("", "", string.punctuation)
_SPACE = str.maketrans(dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4`", " "))
_RANGE = re.compile(r"(?<=[0-9])-(?=[0-9])")
_FULL_WIDTH = {code + 0xFEE0: chr(code) for code in range(ord("!"), ord("~") + 1)}
# The published normalizations know only ASCII punctuation, and keep the rest as letters.
_ASCII_FORMS = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u2039\u203a\u00b4\u02bc\u2032", "'")  # single quotes, primes
    | dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb\u2033", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-")  # hyphens, dashes, minus
    | {"\u2026": "...", "\u2022": "*"}  # ellipsis, bullet
    | dict.fromkeys(PUNCTUATION, ",")
    | _FULL_WIDTH
)
_DASHES = "\u2012\u2013\u2014\u2015"
# Punctuation whose full width includes the space after it: "Paris，France". Not within a number.
_WIDE_COMMA = re.compile(r"(?<![0-9０-９])，|，(?![0-9０-９])|[、；。！？]")
# What separates words in `span`: dashes, ellipses, bullets, and punctuation after which there is no space in
# Chinese or Japanese. A comma or point does not, if it is within a number.
_WORD_BREAK = re.compile(
    rf"[{_DASHES}\u2026\u2022{PUNCTUATION}（）［］｛｝＜＞：；！？｜～＂]"
    r"|(?<![0-9０-９])[，．]|[，．](?![0-9０-９])"
)

# The patterns below apply to strings whose full-width characters have become ASCII.
# Marks of a list, for `_is_single_claim`: "Paris / London", but not "100 km/h"; "巴黎、伦敦" and "巴黎/伦敦",
# where no spaces are written; "①巴黎②伦敦", but not a last number, which cites a passage.
_SEPARATOR = re.compile(
    r"[;|\u037e\u2022\u2023\u25aa\u25cf\u25e6\u2260\u00ac\u2264\u2265<>\r\n\v\f\x85\u2028\u2029\u3001\uff64]"
    r"|(?<!\S)[/&+*\\~\u2044\u2215\u2228\u2227\u00b7\u30fb](?!\S)|[/&](?!\S)|(?<!\S)[/&]"
    rf"|(?<=[{UNSPACED}{MARKS}])[/&+]|[/&+](?=[{UNSPACED}])|[\u2460-\u24ff\u2776-\u2793](?!\s*$)"
)
# A comma, a dash between two spaces or a long dash: "Paris, France". Not between digits: "10,000". Also the
# Katakana middle dot, which separates the parts of a name as well as candidates.
_ASIDE = re.compile(
    rf"(?<![0-9])(?:,|[{_DASHES}]+)|(?:,|[{_DASHES}]+)(?![0-9])|\u060c|(?<!\S)-{{1,3}}(?!\S)"
    r"|(?<=\S)[\u30fb\uff65](?=\S)"
)
# "1. Paris 2. London", "a) Paris b) London", "[1] Paris [2] London", "#1 Paris #2 London", "1.巴黎2.伦敦".
# Not a last "[1]", which cites a passage.
_ENUMERATOR = re.compile(
    rf"(?:(?<!\S)|(?<=[{UNSPACED}{MARKS}]))"
    r"(?:[\[(【〔]?([0-9]{1,2}|[a-z]|[ivx]{2,4})[\])】〕]|([0-9]{1,2})[.:\-]|#([0-9]{1,2}))"
    rf"(?=[\s{UNSPACED}])",
    re.IGNORECASE,
)
# The most frequent hedges of scripts without spaces, as parts of strings. Lookarounds exclude common words
# that contain them, such as "共和国" (republic), "非洲" (Africa) and "埃及" (Egypt).
_UNSPACED_HEDGE = re.compile(
    unicodedata.normalize(
        "NFKC",
        # or, and
        "或|还是|還是|要么|跟|[与與]|(?<![共昭令平大呼饱永])和(?![平歌田泉风風服谐尚])|(?<![埃普涉])及(?!格)"
        "|または|もしくは|あるいは|ないし|および|ならびに"
        "|(?<![ぁ-ん])[とや](?![ぁ-ん言思答考呼推判]|$)|(?<![ぁ-ん])か(?![ぁ-ん国所月年条]|$)"
        "|หรือ|และ|ຫຼື|ຫລື|ແລະ|ឬ|និង|သို့မဟုတ်|နှင့်"
        # not, except, wrong
        "|不(?![丹列莱萊])|非(?![洲常])|没|沒|[从從并並尚]未|未必|[无無]法|毫[无無]|否|[错錯误誤]|违|違|嘘"
        "|除[了非外去くいき]|[以之]外|但(?![丁泽澤])|な[いく]|ません|ไม่|มิใช่|ບໍ່|មិន|မဟုတ်",
    )
)


def normalize(text: str) -> str:
    """Lowercase a string and remove punctuation, articles and extra white space.

    Punctuation is deleted, not replaced: "well-known" becomes "wellknown". This is the normalization of SQuAD
    v1.1, `evaluate-v1.1.py`, after replacing typographic punctuation by its ASCII form. Search-R1, ZeroSearch
    and Dr. Zero use it for every dataset. It deletes signs and decimal points, too: "-5" becomes "5", "3.5"
    becomes "35".
    """
    return _published(text, _DELETE)


def normalize_triviaqa(text: str) -> str:
    """Normalize like `normalize`, but replace punctuation by spaces.

    "well-known" becomes "well known", and "U.S.A." becomes "u s", because "a" is an article. This is
    TriviaQA's `triviaqa_evaluation.py`; its gold answers are the published normalized aliases.
    """
    return _published(text, _SPACE)


def _published(text: str, punctuation: Mapping[int, str | int | None]) -> str:
    """Return the published normalization of a string whose typographic punctuation has become ASCII.

    Each character of a script without spaces becomes a word.
    """
    text = _WIDE_COMMA.sub(", ", unicodedata.normalize("NFC", text)).translate(_ASCII_FORMS)
    text = separate_characters(text.lower().translate(punctuation))
    return " ".join(_ARTICLES.sub(" ", " ".join(text.split())).split())


RULES: dict[str, Callable[[str], str]] = {"squad": normalize, "triviaqa": normalize_triviaqa}


def span(text: str) -> str:
    """Return the normalized words of a string, with a space around each.

    `span(gold) in span(text)` is therefore true only for whole words. A dash, an ellipsis, or a hyphen
    between digits separates words, so that "(1769-1821)" contains 1821. So does the punctuation of Chinese
    and Japanese, which is followed by no space.
    """
    text = _WORD_BREAK.sub(" ", text).translate(_FULL_WIDTH)
    return f" {normalize(_RANGE.sub(' ', text))} "


def is_exact(prediction: str, gold: str, rules: str = "squad") -> bool:
    """Return whether two strings are equal after normalization by `rules`, a key of `RULES`."""
    return RULES[rules](prediction) == RULES[rules](gold)


def token_f1(prediction: str, gold: str, rules: str = "squad") -> float:
    """Return the F1 score of two bags of words, 2PR / (P + R), in [0, 1].

    P and R are the fractions of the prediction's and the gold answer's words that both share, counted with
    repeats and in any order. The score is 0 if they share no word, and also if both are empty.

    In scripts without spaces, whose words here are characters, the order counts: what both share is their
    longest common subsequence, as in ROUGE-L. Otherwise, 京东 (a company) would be right for 东京 (Tokyo).
    """
    predicted, expected = RULES[rules](prediction).split(), RULES[rules](gold).split()
    if has_unspaced(prediction) and has_unspaced(gold):
        num_shared = _common_subsequence(predicted, expected)
    else:
        num_shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * num_shared / max(len(predicted) + len(expected), 1)


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence (Hyyrö's bit-parallel algorithm)."""
    positions: dict[str, int] = {}  # as bits
    for i, word in enumerate(second):
        positions[word] = positions.get(word, 0) | 1 << i
    all_bits = (1 << len(second)) - 1
    unmatched = all_bits
    for word in first:
        matches = unmatched & positions.get(word, 0)
        unmatched = (unmatched + matches | unmatched - matches) & all_bits
    return len(second) - unmatched.bit_count()


def covers(prediction: str, gold: str, mode: str = "token") -> bool:
    """Return whether the prediction contains the gold answer.

    Args:
        prediction, gold: Strings to normalize and compare.
        mode: "token" matches consecutive whole words, so "art" is not in "cart". "char" matches any
            substring, like ZeroSearch's "EM" and Search-R1's `subem`; use it for comparison with those.

    Raises:
        ValueError: The mode is unknown.
    """
    if mode == "char":
        return normalize(gold) in normalize(prediction)
    if mode != "token":
        raise ValueError(f"there is no mode {mode!r}; use token or char")
    return span(gold) in span(prediction)


def extract_answer(completion: str) -> str | None:
    """Return the stripped content of the last complete `<answer>...</answer>`; None if there is none.

    Of nested tags, the inner pair counts. This deviates from Search-R1 in two points. Answers in a thought,
    also in one that is never closed, do not count (`rlkit.rewards.thinking`). And one pair is enough:
    Search-R1 requires two because it also reads the prompt, whose example has one.
    """
    completion = after_thinking(completion)
    last_end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, max(last_end, 0))
    if start < 0:
        return None
    start += len("<answer>")
    return completion[start : completion.find("</answer>", start)].strip()


def check_answers(answers: Sequence[str], rules: str = "squad") -> None:
    """Check that accepted answers can be matched. Environments call this when they load tasks.

    Raises:
        ValueError: `answers` is empty or a string instead of a list, an answer is empty after normalization,
            such as "The" or "!!!", or the rules are unknown.
    """
    if rules not in RULES:
        raise ValueError(f"there are no rules {rules!r}; use one of {', '.join(RULES)}")
    if isinstance(answers, str) or len(answers) == 0:
        raise ValueError(f"answers must be a non-empty list of strings, not {answers!r}")
    for answer in answers:
        if not (RULES[rules](answer) and span(answer).strip()):
            raise ValueError(f"the answer {answer!r} is empty after normalization; remove it")


def exact_match(completion: str, answers: Sequence[str], rules: str = "squad") -> float:
    """Return 1 if the extracted answer equals an accepted one after normalization, else 0.

    This is Search-R1's reward, for the answer that `extract_answer` finds. For numbers, the comparison of
    `rlkit.rewards.boxed` is better: see `normalize`.

    Raises:
        ValueError: See `check_answers`.
    """
    check_answers(answers, rules)
    answer = extract_answer(completion)
    return float(answer is not None and any(is_exact(answer, gold, rules) for gold in answers))


def f1(completion: str, answers: Sequence[str], answerable: bool = True, rules: str = "squad") -> float:
    """Return the best `token_f1` of the extracted answer over the accepted ones.

    An unanswerable task is scored by exact match. This is ZeroSearch's reward, code Alibaba-NLP/ZeroSearch,
    `verl/utils/reward_score/qa_em.py`.

    Raises:
        ValueError: See `check_answers`.
    """
    if not answerable:
        return exact_match(completion, answers, rules=rules)
    check_answers(answers, rules)
    answer = extract_answer(completion)
    if answer is None:
        return 0.0
    return max(token_f1(answer, gold, rules) for gold in answers)


def cover_match(
    completion: str, answers: Sequence[str], answerable: bool = True, max_extra: int = 3
) -> float:
    """Return 1 if the extracted answer contains an accepted one and few extra words, else 0.

    In addition to the accepted answer, it may have at most `max_extra` words, none of which is in `HEDGES`,
    one comma or dash and one pair of parentheses or brackets: "Paris, France". Semicolons, line breaks,
    bullets, enumerations and separate slashes, pipes, ampersands and plus signs are marks of a list. Without
    these bounds, an answer that lists every candidate is right, and answers grow in training. What is part of
    the gold answer is never extra: "Trinidad and Tobago" is right for itself. In scripts without spaces, two
    characters count as one extra word, and only the most frequent hedges are known. A short list without any
    mark, "Paris London", is not recognized, because it has the form of "New York City". An unanswerable task
    is scored by exact match.

    Raises:
        ValueError: See `check_answers`.
    """
    if not answerable:
        return exact_match(completion, answers)
    check_answers(answers)
    answer = extract_answer(completion)
    if answer is None:
        return 0.0
    return float(any(covers(answer, gold) and _is_single_claim(answer, gold, max_extra) for gold in answers))


def _is_single_claim(answer: str, gold: str, max_extra: int) -> bool:
    """Return whether an answer that contains the gold answer is neither a list nor a denial."""
    extra = Counter(span(answer).split()) - Counter(span(gold).split())
    num_characters = sum(count for word, count in extra.items() if has_unspaced(word))
    # A word of Chinese has about two characters.
    num_extra = extra.total() - num_characters + num_characters // 2
    if num_extra > max_extra or not HEDGES.isdisjoint(extra):
        return False
    if _UNSPACED_HEDGE.search(span(answer).replace(span(gold), " | ").replace(" ", "")):
        return False
    answer, gold = answer.translate(_FULL_WIDTH), gold.translate(_FULL_WIDTH)
    if any(label.lower() in extra for groups in _ENUMERATOR.findall(answer) for label in groups):
        return False
    num_separators = _extra_marks(_SEPARATOR, answer, gold)
    num_asides = _extra_marks(_ASIDE, answer, gold)
    extra_characters = Counter(answer) - Counter(gold)
    num_brackets = sum(extra_characters[bracket] for bracket in "([【〔")
    num_titles = sum(extra_characters[quote] for quote in "《〈「『")  # a list may be written as "《A》《B》"
    return num_separators == 0 and num_asides <= 1 and num_brackets <= 1 and num_titles <= 1


def _extra_marks(mark: re.Pattern[str], answer: str, gold: str) -> int:
    """Return the number of marks in the answer that are not in the gold answer."""
    return (Counter(mark.findall(answer)) - Counter(mark.findall(gold))).total()
