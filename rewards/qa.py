"""Rewards for short answers to questions, such as `<answer>Paris</answer>`.

Only the last complete pair of answer tags in the completion counts. A completion without it has no answer and
scores 0. The answer and every accepted answer are normalized and compared in one of three ways:

* `exact_match`: the two are equal;
* `f1`: overlap of their words;
* `cover_match`: the answer contains the accepted one as whole words, with few extra words.

On a task whose column `answerable` is false, `answers` are the accepted refusals (`REFUSALS`), and all three
rewards are exact match: "unknown actor" is not a refusal. Normalization removes only English articles and
keeps accents, as in the published evaluations.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

REFUSALS = ("unknown", "not enough information", "insufficient information", "cannot be determined")

# Words that turn an answer into a list or a denial: "Paris or London", "not Paris". They are compared after
# normalization, which deletes apostrophes.
HEDGES = frozenset(("or", "and", "nor", "not", "neither", "isnt", "wasnt"))

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_DELETE = str.maketrans("", "", string.punctuation)
_SPACE = str.maketrans(dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4`", " "))
_RANGE = re.compile(r"(?<=[0-9])-(?=[0-9])")
# Quotes, hyphens and the minus sign are deleted like their ASCII forms; dashes and ellipses separate words.
_TYPOGRAPHY = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb\u2039\u203a\u2010\u2011\u2212", "")
    | dict.fromkeys("\u2012\u2013\u2014\u2015\u2026\u2022", " ")
)


def normalize(text: str) -> str:
    """Lowercase a string and remove ASCII punctuation, articles and extra white space.

    Punctuation is deleted, not replaced: "well-known" becomes "wellknown". This is the normalization of SQuAD
    v1.1, `evaluate-v1.1.py`; Search-R1, ZeroSearch and Dr. Zero use it for every dataset.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DELETE)).split())


def normalize_triviaqa(text: str) -> str:
    """Normalize like `normalize`, but replace punctuation by spaces.

    "well-known" becomes "well known", and "U.S.A." becomes "u s", because "a" is an article. This is
    TriviaQA's `triviaqa_evaluation.py`; its gold answers are the published normalized aliases.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_SPACE)).split())


RULES: dict[str, Callable[[str], str]] = {"squad": normalize, "triviaqa": normalize_triviaqa}


def span(text: str) -> str:
    """Return the normalized words of a string, with a space around each.

    `span(gold) in span(text)` is therefore true only for whole words. Typographic characters are treated like
    ASCII ones: curly quotes are deleted. A dash, or a hyphen between digits, separates words, so that
    "(1769-1821)" contains 1821.
    """
    return f" {normalize(_RANGE.sub(' ', text.translate(_TYPOGRAPHY)))} "


def is_exact(prediction: str, gold: str, rules: str = "squad") -> bool:
    """Return whether two strings are equal after normalization by `rules`, a key of `RULES`."""
    return RULES[rules](prediction) == RULES[rules](gold)


def token_f1(prediction: str, gold: str, rules: str = "squad") -> float:
    """Return the F1 score of two bags of words, 2PR / (P + R), in [0, 1].

    P and R are the fractions of the prediction's and the gold answer's words that both share, counted with
    repeats and in any order. The score is 0 if they share no word, and also if both are empty.
    """
    predicted, expected = Counter(RULES[rules](prediction).split()), Counter(RULES[rules](gold).split())
    num_words = predicted.total() + expected.total()
    return 2 * (predicted & expected).total() / max(num_words, 1)


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

    Of nested tags, the inner pair counts. One pair is enough. Search-R1 requires two because it also reads
    the prompt, whose example has one.
    """
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

    This is Search-R1's reward.

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

    At most `max_extra` words and one comma (or semicolon, or newline) may be extra, and none of `HEDGES`.
    Without this bound, an answer that lists every candidate is right, and answers grow in training. The bound
    applies to the words that are not in the gold answer, so long gold answers are not at a disadvantage. An
    unanswerable task is scored by exact match.

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
    commas = sum(answer.count(mark) - gold.count(mark) for mark in ",;\n")
    return extra.total() <= max_extra and commas <= 1 and HEDGES.isdisjoint(extra)
