"""Rewards for short answers to questions, such as `<answer>Paris</answer>`.

The last complete pair of answer tags in what the model wrote counts, and nothing outside it: no tags, no
answer, which is 0. The answer is compared with every accepted one, after normalisation, in one of three ways:

* `exact_match`: the texts are equal;
* `f1`: the words they share;
* `cover_match`: the accepted answer stands in it, as whole words, with little beside it.

On a task whose column `answerable` is false, `answers` are the accepted refusals (`REFUSALS`), and all three
are exact match: "unknown actor" refuses nothing. Normalisation knows English articles alone and folds no
accents, as in the published evaluations.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

REFUSALS = ("unknown", "not enough information", "insufficient information", "cannot be determined")

# Words that make a list or a denial of an answer: "Paris or London", "not Paris".
HEDGES = frozenset(("or", "and", "nor", "not", "neither", "isnt", "wasnt"))

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_DELETE = str.maketrans("", "", string.punctuation)
_SPACE = str.maketrans(dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4`", " "))
_RANGE = re.compile(r"(?<=[0-9])-(?=[0-9])")
# Quotes, hyphens and the minus sign vanish as their ASCII forms do; dashes and an ellipsis part words.
_TYPOGRAPHY = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb\u2039\u203a\u2010\u2011\u2212", "")
    | dict.fromkeys("\u2012\u2013\u2014\u2015\u2026\u2022", " ")
)


def normalize(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and superfluous white space.

    Punctuation is deleted, not replaced: "well-known" becomes "wellknown". SQuAD v1.1, `evaluate-v1.1.py`;
    Search-R1, ZeroSearch and Dr. Zero use it for every data set.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DELETE)).split())


def normalize_triviaqa(text: str) -> str:
    """As `normalize`, but punctuation becomes a space: "well-known" is "well known", "U.S.A." is "u s".

    TriviaQA's `triviaqa_evaluation.py`; its golds are the published normalised aliases.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_SPACE)).split())


RULES: dict[str, Callable[[str], str]] = {"squad": normalize, "triviaqa": normalize_triviaqa}


def span(text: str) -> str:
    """The words of a text with a space around each: `span(gold) in span(text)` finds whole words only.

    The words are those of `normalize`, with typography as in ASCII: curly quotes are deleted, and a dash, or
    a hyphen between digits, parts words, so that 1821 stands in "(1769-1821)".
    """
    return f" {normalize(_RANGE.sub(' ', text.translate(_TYPOGRAPHY)))} "


def is_exact(prediction: str, gold: str, rules: str = "squad") -> bool:
    """Whether two texts are equal after normalisation by `rules`, a key of `RULES`."""
    return RULES[rules](prediction) == RULES[rules](gold)


def token_f1(prediction: str, gold: str, rules: str = "squad") -> float:
    """2PR / (P + R), with P and R the shares of the words of each text that the other has too, in [0, 1].

    Words count as often as they stand there, in any order. 0 if none is shared, also if both are empty.
    """
    ours, theirs = Counter(RULES[rules](prediction).split()), Counter(RULES[rules](gold).split())
    return 2 * (ours & theirs).total() / max(ours.total() + theirs.total(), 1)


def covers(prediction: str, gold: str, mode: str = "token") -> bool:
    """Whether the gold stands in the prediction.

    Args:
        prediction, gold: texts, normalised here.
        mode: "token", as consecutive whole words: "art" is not in "cart"; or "char", as a substring, which is
            ZeroSearch's "EM" and Search-R1's `subem`, for comparison with those.

    Raises:
        ValueError: another mode.
    """
    if mode == "char":
        return normalize(gold) in normalize(prediction)
    if mode != "token":
        raise ValueError(f"there is no mode {mode!r}: take token or char")
    return span(gold) in span(prediction)


def extract_answer(completion: str) -> str | None:
    """What the last complete `<answer>...</answer>` holds, stripped; None where there is none.

    Of tags in tags the inner pair counts. One pair is enough: Search-R1 asks for two, since it reads the
    prompt too, where its example stands.
    """
    last = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, max(last, 0))
    if start < 0:
        return None
    start += len("<answer>")
    return completion[start : completion.find("</answer>", start)].strip()


def check_answers(answers: Sequence[str], rules: str = "squad") -> None:
    """Make sure that a right answer can be told from a wrong one. For environments, when tasks are loaded.

    Raises:
        ValueError: no answers, a text instead of a list of them, or one that is empty once normalised, such
            as "The" or "!!!"; unknown rules.
    """
    if rules not in RULES:
        raise ValueError(f"there are no rules {rules!r}: take one of {', '.join(RULES)}")
    if isinstance(answers, str) or len(answers) == 0:
        raise ValueError(f"answers must be a list of at least one text, not {answers!r}")
    for answer in answers:
        if not (RULES[rules](answer) and span(answer).strip()):
            raise ValueError(f"nothing is left of the answer {answer!r} once it is normalised: leave it out")


def exact_match(completion: str, answers: Sequence[str], rules: str = "squad") -> float:
    """1 if the extracted answer equals an accepted one after normalisation, else 0. Search-R1's reward.

    Raises:
        ValueError: see `check_answers`.
    """
    check_answers(answers, rules)
    answer = extract_answer(completion)
    return float(answer is not None and any(is_exact(answer, gold, rules) for gold in answers))


def f1(completion: str, answers: Sequence[str], answerable: bool = True, rules: str = "squad") -> float:
    """The best `token_f1` of the extracted answer and an accepted one; exact match if unanswerable.

    ZeroSearch's reward, code Alibaba-NLP/ZeroSearch, `verl/utils/reward_score/qa_em.py`.

    Raises:
        ValueError: see `check_answers`.
    """
    if not answerable:
        return exact_match(completion, answers, rules=rules)
    check_answers(answers, rules)
    answer = extract_answer(completion)
    return 0.0 if answer is None else max(token_f1(answer, gold, rules) for gold in answers)


def cover_match(
    completion: str, answers: Sequence[str], answerable: bool = True, max_extra: int = 3
) -> float:
    """1 if an accepted answer stands in the extracted one with little beside it, else 0.

    At most `max_extra` words and one comma (semicolon, line end) may be extra, and none of `HEDGES`. Without
    the bound an answer that names every candidate is right, and answers grow; it counts from the gold, so
    that long golds keep their room.
    Exact match if unanswerable.

    Raises:
        ValueError: see `check_answers`.
    """
    if not answerable:
        return exact_match(completion, answers)
    check_answers(answers)
    answer = extract_answer(completion)
    if answer is None:
        return 0.0
    return float(any(covers(answer, gold) and _is_plain(answer, gold, max_extra) for gold in answers))


def _is_plain(answer: str, gold: str, max_extra: int) -> bool:
    """Whether an answer that covers the gold is neither a list nor a denial."""
    extra = Counter(span(answer).split()) - Counter(span(gold).split())
    commas = sum(answer.count(mark) - gold.count(mark) for mark in ",;\n")
    return extra.total() <= max_extra and commas <= 1 and HEDGES.isdisjoint(extra)
