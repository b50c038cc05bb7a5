"""Rewards for how an answer was found: what was retrieved, how often, and in which form.

They read `turns`, the messages after the prompt. The model's have the role "assistant". The environment's
with search results have `documents`, the ids of the passages, best first, and `query`; in its other messages
these are missing or None. What a passage says is read from those messages alone: an `<information>` block
that the model writes is no evidence. A text counts as found where it stands as whole words
(`rlkit.rewards.qa`).

The tags are those of Search-R1: `<think>`, `<search>`, `<information>` (the environment's) and `<answer>`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlkit.rewards.qa import REFUSALS, exact_match, extract_answer, is_exact, span

Turns = Sequence[Mapping[str, Any]]

_TAG = re.compile(r"(</?(?:think|search|information|answer)>)")

# What may come next in a well-formed rollout. "results" stands for a message of the environment that has
# them; other messages of the environment, and the model's own information tags, lead nowhere.
_NEXT = {
    ("start", "<think>"): "think",
    ("think", "</think>"): "thought",
    ("thought", "<search>"): "search",
    ("search", "</search>"): "searched",
    ("searched", "results"): "start",
    ("thought", "<answer>"): "answer",
    ("answer", "</answer>"): "end",
}
_OPEN = ("think", "search", "answer")  # where text may stand


def recall(turns: Turns, supporting: Sequence[str]) -> float | None:
    """Share of the supporting passages that some search retrieved, in [0, 1]; None where there are none.

    Pays for searching everything: use it with `search_price`, or where the number of searches is small.
    """
    needed = set(supporting)
    if not needed:
        return None
    return len(needed.intersection(_retrieved(turns))) / len(needed)


def searches(turns: Turns) -> float:
    """The number of searches that got documents. A metric."""
    return float(sum(len(message["documents"]) > 0 for message in _results(turns)))


def search_price(turns: Turns, limit: int = 4, price: float = 0.1) -> float:
    """-price for each search beyond `limit`, at most 0. Added to the reward for being right.

    Raises:
        ValueError: a negative limit or price, which would pay for searching.
    """
    if limit < 0 or price < 0:
        raise ValueError(f"limit and price must not be negative: they are {limit} and {price}")
    return price * min(limit - searches(turns), 0.0)


def tag_format(turns: Turns) -> float:
    """1 for a rollout of the form think, (search, results, think)*, answer, and nothing else; 0 otherwise.

    Each step of the model's is one pair of tags; only white space stands between them and nothing after the
    answer. The results are the environment's message: the model's own `<information>` is a fault, and so is
    an action that the environment turned down. Search-R1's `is_valid_sequence`, `qa_em_format.py`, which
    finds the rollout by ChatML's markers; here it is `turns`, whatever the chat template.
    """
    state = "start"
    for symbol in _symbols(turns):
        if symbol == "text" and state in _OPEN:
            continue
        if (state, symbol) not in _NEXT:
            return 0.0
        state = _NEXT[state, symbol]
    return float(state == "end")


def search_r1(
    turns: Turns,
    completion: str,
    answers: Sequence[str],
    answerable: bool = True,
    *,
    structure: float = 0.2,
    final: float = 0.1,
    retrieval: float = 0.0,
) -> float:
    """Exact match with some reward for form, as in Search-R1's v0.3.

    | answer | `tag_format` | an accepted answer in the results | reward |
    | --- | --- | --- | --- |
    | right | 1 | | 1 |
    | right | 0 | | 1 - structure |
    | wrong | 1 | yes | structure + retrieval |
    | wrong | 1 | no | structure |
    | wrong | 0 | | final |
    | none | 0 | | 0 |

    `qa_em_format.py` looks for the answer as a substring, so that "art" is found in "cart"; here it must be
    whole words. A refusal is never found: there is nothing to find where `answerable` is false.

    Raises:
        ValueError: see `rlkit.rewards.qa.check_answers`.
    """
    well_formed = tag_format(turns) == 1
    if exact_match(completion, answers):
        return 1.0 if well_formed else 1.0 - structure
    if well_formed:
        return structure + (retrieval if answerable and _found(turns, answers) else 0.0)
    return 0.0 if extract_answer(completion) is None else final


def backed(turns: Turns, completion: str, answers: Sequence[str], answerable: bool = True) -> float | None:
    """1 if the answer is right by exact match and stands in a retrieved text, else 0; None if unanswerable.

    Its mean is the share of answers that a passage backs; a right answer from memory is not. Exact match
    minus this tells how much is known or guessed.

    Raises:
        ValueError: see `rlkit.rewards.qa.check_answers`.
    """
    if not answerable:
        return None
    right = exact_match(completion, answers) == 1
    return float(right and _found(turns, [extract_answer(completion) or ""]))


def useful_hits(turns: Turns, answers: Sequence[str]) -> float | None:
    """Share of the searches that a simulated engine was to help whose documents hold an accepted answer.

    It names the answer to the simulator, which need not obey (ZeroSearch). None where there was none of them.
    """
    return _hits(turns, answers, "useful")


def noisy_hits(turns: Turns, answers: Sequence[str]) -> float | None:
    """Share of the searches that were to be noise whose documents hold an accepted answer all the same."""
    return _hits(turns, answers, "noisy")


def refusal(completion: str, answerable: bool | None = None) -> float | None:
    """1 if the answer is a refusal (`qa.REFUSALS`) exactly where the task is unanswerable, else 0.

    It judges the decision alone: a wrong answer to an answerable task gets 1 too, so it is a metric, or a
    reward of small weight. No answer is neither and gets 0. None where the data set does not say.
    """
    if answerable is None:
        return None
    answer = extract_answer(completion)
    if answer is None:
        return 0.0
    refused = any(is_exact(answer, phrase) for phrase in REFUSALS)
    return float(refused != answerable)


def _hits(turns: Turns, answers: Sequence[str], label: str) -> float | None:
    asked = [[turn] for turn in _results(turns) if turn.get("label") == label]
    return sum(_found(one, answers) for one in asked) / len(asked) if asked else None


def _results(turns: Turns) -> list[Mapping[str, Any]]:
    """The environment's messages with search results, also those that found nothing."""
    return [turn for turn in turns if turn["role"] != "assistant" and turn.get("documents") is not None]


def _retrieved(turns: Turns) -> list[str]:
    return [document for message in _results(turns) for document in message["documents"]]


def _found(turns: Turns, texts: Sequence[str]) -> bool:
    """Whether one of the texts stands in what a search retrieved."""
    # A tag would grow together with the word beside it.
    passages = [span(_TAG.sub(" ", turn["content"])) for turn in _results(turns) if len(turn["documents"])]
    wanted = [span(text) for text in texts]
    return any(text in passage for passage in passages for text in wanted)


def _symbols(turns: Turns) -> list[str]:
    """What a rollout is made of, for `_NEXT`: tags, "text" for any other words of the model, "results"."""
    symbols = []
    for turn in turns:
        if turn["role"] == "assistant":
            parts = (part.strip() for part in _TAG.split(turn["content"] or ""))
            symbols += [part if _TAG.fullmatch(part) else "text" for part in parts if part]
        else:
            symbols.append("results" if turn.get("documents") is not None else "other")
    return symbols
