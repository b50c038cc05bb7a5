"""Rewards for the search behind an answer: the retrieved passages, the number of searches, and the format.

They read `turns`, the messages after the prompt. The model's messages have the role "assistant". The
environment's messages with search results have `documents`, the ids of the passages, best first, and `query`;
in its other messages these are missing or None. A model's message has a `prefix`, "<think>", if the chat
template has opened a thought for it. A tool call may have several queries, each of which is a
search: then `query` has a line for each, `num_documents` their numbers of passages, and in the content their
passages are separated by `---` lines. Passages are read only from the environment's messages: an
`<information>` block that the model writes is not evidence. An answer must occur in a passage as whole
words (`rlkit.rewards.qa`).

The tags are Search-R1's: `<think>`, `<search>`, `<information>` (written by the environment) and `<answer>`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlkit.rewards.qa import REFUSALS, exact_match, extract_answer, is_exact, span

Turns = Sequence[Mapping[str, Any]]

SEPARATOR = "\n---\n"  # between the passages of the queries of a tool call

_TAG = re.compile(r"(</?(?:think|search|information|answer)>)")
_HEADING = re.compile(r"^Doc \d++(?:\(Title: |:)", re.MULTILINE)

# Transitions of a well-formed rollout: (state, symbol) -> state. The symbol "results" is an environment
# message with search results. Other environment messages and information tags that the model writes have no
# transition, so they make the rollout ill-formed.
_NEXT = {
    ("start", "<think>"): "think",
    ("think", "</think>"): "thought",
    ("thought", "<search>"): "search",
    ("search", "</search>"): "searched",
    ("searched", "results"): "start",
    ("thought", "<answer>"): "answer",
    ("answer", "</answer>"): "end",
}
_TEXT_STATES = ("think", "search", "answer")  # inside a pair of tags, where text is allowed


def recall(turns: Turns, supporting: Sequence[str]) -> float | None:
    """Return the fraction of the supporting passages that a search retrieved; None if the task has none.

    More searches never lower this reward: combine it with `search_price`, or limit the searches.
    """
    supporting_ids = set(supporting)
    if not supporting_ids:
        return None
    return len(supporting_ids.intersection(_retrieved_ids(turns))) / len(supporting_ids)


def searches(turns: Turns) -> float:
    """Return the number of searches that retrieved documents; each query of a tool call is one. A metric."""
    return float(sum(num > 0 for message in _results(turns) for num in _num_documents(message)))


def search_price(turns: Turns, limit: int = 4, price: float = 0.1) -> float:
    """Return -price for each search beyond `limit`, otherwise 0. Added to the correctness reward.

    Raises:
        ValueError: The limit or the price is negative, which would pay for searching.
    """
    if limit < 0 or price < 0:
        raise ValueError(f"limit and price must not be negative, but they are {limit} and {price}")
    return price * min(limit - searches(turns), 0.0)


def tag_format(turns: Turns) -> float:
    """Return 1 if the rollout has the form think, (search, results, think)*, answer; else 0.

    Each of these parts is one pair of tags, with only white space between the parts and nothing after the
    answer. Results must be a message of the environment: an `<information>` block written by the model makes
    the rollout ill-formed, and so does an action that the environment rejects. This is `is_valid_sequence` of
    Search-R1's `qa_em_format.py`. That code locates the rollout by ChatML markers; reading `turns` works with
    any chat template.
    """
    state = "start"
    for symbol in _symbols(turns):
        if symbol == "text" and state in _TEXT_STATES:
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
    """Return exact match with partial rewards for the format, as in Search-R1's v0.3.

    | answer | `tag_format` | an accepted answer in the results | reward |
    | --- | --- | --- | --- |
    | right | 1 | | 1 |
    | right | 0 | | 1 - structure |
    | wrong | 1 | yes | structure + retrieval |
    | wrong | 1 | no | structure |
    | wrong | 0 | | final |
    | none | 0 | | 0 |

    `qa_em_format.py` searches the results for the answer as a substring, so "art" matches "cart"; here the
    answer must occur as whole words. If `answerable` is false, the accepted answers are refusals, and results
    that happen to contain one earn nothing.

    Args:
        turns: Messages after the prompt.
        completion: The model's part of the rollout.
        answers: Accepted answers.
        answerable: Whether the question has an answer in the corpus.
        structure: Reward for a well-formed rollout with a wrong answer.
        final: Reward for an ill-formed rollout with a wrong answer.
        retrieval: Additional reward if the results contain an accepted answer.

    Raises:
        ValueError: See `rlkit.rewards.qa.check_answers`.
    """
    well_formed = tag_format(turns) == 1
    if exact_match(completion, answers):
        return 1.0 if well_formed else 1.0 - structure
    if well_formed and answerable and _results_contain(turns, answers):
        return structure + retrieval
    if well_formed:
        return structure
    return 0.0 if extract_answer(completion) is None else final


def backed(turns: Turns, completion: str, answers: Sequence[str], answerable: bool = True) -> float | None:
    """Return 1 if the answer is an exact match and occurs in the results, else 0; None if unanswerable.

    The mean is the fraction of answers that are correct and backed by a passage. Exact match minus this mean
    is the fraction answered from memory or by guessing.

    Raises:
        ValueError: See `rlkit.rewards.qa.check_answers`.
    """
    if not answerable:
        return None
    is_correct = exact_match(completion, answers) == 1
    return float(is_correct and _results_contain(turns, [extract_answer(completion) or ""]))


def useful_hits(turns: Turns, answers: Sequence[str]) -> float | None:
    """Return the fraction of searches labeled "useful" whose documents contain an accepted answer. A metric.

    A simulated engine labels a search "useful" if its prompt requests helpful documents. That prompt includes
    the answer, but the simulator may ignore it (ZeroSearch). None if no search has this label.
    """
    return _hit_rate(turns, answers, "useful")


def noisy_hits(turns: Turns, answers: Sequence[str]) -> float | None:
    """Return the fraction of searches labeled "noisy" whose documents contain an accepted answer. A metric.

    See `useful_hits`; for a simulator that follows its prompt, the value is near 0.
    """
    return _hit_rate(turns, answers, "noisy")


def refusal(completion: str, answerable: bool | None = None) -> float | None:
    """Return 1 if the model refuses an unanswerable task or answers an answerable one, else 0.

    An answer in `qa.REFUSALS` is a refusal. Only the decision counts: a wrong answer to an answerable task
    also gets 1. So use this as a metric or as a reward with a small weight. A completion without an answer
    gets 0. The result is None if the dataset has no column `answerable`.
    """
    if answerable is None:
        return None
    answer = extract_answer(completion)
    if answer is None:
        return 0.0
    refused = any(is_exact(answer, phrase) for phrase in REFUSALS)
    return float(refused != answerable)


def _hit_rate(turns: Turns, answers: Sequence[str], label: str) -> float | None:
    labeled = [turn for turn in _results(turns) if turn.get("label") == label]
    texts = [passages for turn in labeled for _, passages in split_results(turn)]
    if not texts:
        return None
    return sum(_contain([text], answers) for text in texts) / len(texts)


def _results(turns: Turns) -> list[Mapping[str, Any]]:
    """Return the environment's messages with search results, including empty results."""
    return [turn for turn in turns if turn["role"] != "assistant" and turn.get("documents") is not None]


def _retrieved_ids(turns: Turns) -> list[str]:
    return [document_id for message in _results(turns) for document_id in message["documents"]]


def _num_documents(message: Mapping[str, Any]) -> Sequence[int]:
    """Return the number of passages of each search of a message with results."""
    counts = message.get("num_documents")
    return [len(message["documents"])] if counts is None else counts


def split_results(message: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (query, passages) of each search of a message with results; passages are "" if there are none.

    The content does not say where the passages of a query end if one of them has a `---` line itself, or if
    the message was cut. In these cases, the message is returned as one search.
    """
    query, content, counts = message.get("query") or "", message["content"], _num_documents(message)
    queries, parts = query.split("\n"), content.split(SEPARATOR)
    if not len(queries) == len(parts) == len(counts):
        queries, parts, counts = [query], [content], [sum(counts)]
    return [(query, part if num else "") for query, part, num in zip(queries, parts, counts, strict=True)]


def _results_contain(turns: Turns, answers: Sequence[str]) -> bool:
    return _contain([passages for turn in _results(turns) for _, passages in split_results(turn)], answers)


def _contain(texts: Sequence[str], answers: Sequence[str]) -> bool:
    """Return whether one of the texts contains one of the answers as whole words."""
    # `span` deletes punctuation, so a tag would fuse with the adjacent word.
    spans = [span(_TAG.sub(" ", without_headings(text))) for text in texts]
    answer_spans = [span(answer) for answer in answers]
    return any(answer in text for text in spans for answer in answer_spans)


def without_headings(text: str) -> str:
    """Return search results without `Doc 1:` or `Doc 1(Title: `, so that no answer is in these words."""
    return _HEADING.sub("", text)


def _symbols(turns: Turns) -> list[str]:
    """Return the symbols of a rollout for `_NEXT`: the model's tags, its "text", and "results" or "other"."""
    symbols = []
    for turn in turns:
        if turn["role"] == "assistant":
            # A tag that the chat template has written before the turn counts as the model's (Search-R1 reads
            # the text after the assistant's marker).
            content = f"{turn.get('prefix') or ''}{turn['content'] or ''}"
            parts = (part.strip() for part in _TAG.split(content))
            symbols += [part if _TAG.fullmatch(part) else "text" for part in parts if part]
        else:
            symbols.append("results" if turn.get("documents") is not None else "other")
    return symbols
