"""Rewards for a language model that simulates a search engine: did it write the requested documents?

A document has the form `Doc 1: text` or `Doc 1(Title: "T") text`, the form of search results in a policy's
prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlkit.rewards.qa import span
from rlkit.rewards.thinking import after_thinking

# Possessive quantifiers: with plain ones, many spaces or empty lines take quadratic or cubic time.
_START = re.compile(r"^[^\S\n]*+Doc(?:ument)?+\s*+\d++\s*+(?=[:(])", re.MULTILINE)
_TITLED = re.compile(
    r'\(Title:\s*+(?:"(?P<quoted>[^"\n]*+)"\s*+\)|(?P<bare>[^)\n]*+)\s*+\))\s*+(?P<text>.*)', re.DOTALL
)


def split_documents(text: str) -> list[tuple[str, str]]:
    """Return (title, body) of each document with a non-empty body; a missing title is "".

    Documents in a thought (`rlkit.rewards.thinking`) do not count.
    """
    documents = [_split_title(part) for part in _START.split(after_thinking(text))[1:]]
    return [(title, body) for title, body in documents if body]


def _split_title(part: str) -> tuple[str, str]:
    titled = _TITLED.match(part)
    if titled is None:
        return "", " ".join(part.removeprefix(":").split())
    return (titled["quoted"] or titled["bare"] or "").strip(), " ".join(titled["text"].split())


def holds_answer(text: str, answers: Sequence[str]) -> bool:
    """Return whether a string contains an accepted answer as whole words."""
    text_span = span(text)
    return any(span(answer) in text_span for answer in answers)


def form(completion: str, asked: int) -> float:
    """Return 1 if the completion is exactly `asked` documents with only a thought before them, else 0."""
    starts_with_document = _START.match(after_thinking(completion).lstrip()) is not None
    return float(starts_with_document and len(split_documents(completion)) == asked)


def obeys(completion: str, answers: Sequence[str], asked: int, holds: bool) -> float:
    """Return 1 if the form is right and an answer occurs if and only if the real documents have one, else 0.

    Useful documents of a first hop need not contain the answer, and noisy ones may. So the real documents
    decide, not the label.

    Args:
        completion: Completion of the model.
        answers: Accepted answers to the question.
        asked: Number of documents that the prompt requests.
        holds: Whether the real engine's documents contain an accepted answer.
    """
    if form(completion, asked) == 0:
        return 0.0
    texts = (f"{title} {text}" for title, text in split_documents(completion))
    return float(any(holds_answer(text, answers) for text in texts) == holds)
