"""Rewards for a language model that plays a search engine: did it write the documents that it was asked for?

A document begins with `Doc 1: text` or `Doc 1(Title: "T") text`, as search results are shown to a policy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlkit.rewards.qa import span

_START = re.compile(r"^\s*Doc(?:ument)?\s*\d+\s*(?=[:(])", re.MULTILINE)
_TITLED = re.compile(r'\(Title:\s*(?:"(?P<quoted>[^"\n]*)"|(?P<bare>[^)\n]*))\s*\)\s*(?P<text>.*)', re.DOTALL)


def split_documents(text: str) -> list[tuple[str, str]]:
    """Title, "" where there is none, and text of each document that was written; empty ones are left out."""
    return [document for part in _START.split(text)[1:] if (document := _split(part))[1]]


def _split(part: str) -> tuple[str, str]:
    titled = _TITLED.match(part)
    if titled is None:
        return "", " ".join(part.removeprefix(":").split())
    return (titled["quoted"] or titled["bare"] or "").strip(), " ".join(titled["text"].split())


def holds_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether an accepted answer stands in a text, as whole words."""
    words = span(text)
    return any(span(answer) in words for answer in answers)


def form(completion: str, asked: int) -> float:
    """1 if exactly as many documents were written as were asked for, and nothing before them; else 0."""
    begins = _START.match(completion) is not None
    return float(begins and len(split_documents(completion)) == asked)


def obeys(completion: str, answers: Sequence[str], asked: int, holds: bool) -> float:
    """1 if the form is right and the documents hold an answer exactly where the real ones do; else 0.

    Useful documents of a first hop need not hold the answer, and noise may: `holds` says what is the case.
    """
    if form(completion, asked) == 0:
        return 0.0
    texts = (f"{title} {text}" for title, text in split_documents(completion))
    return float(any(holds_answer(text, answers) for text in texts) == holds)
