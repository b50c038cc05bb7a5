"""Documents, queries, and search engines behind one interface.

`search` takes a batch of queries and returns for each, in order, its documents, best first. An engine that
cannot answer raises `EngineError`, or gives a result with `error`, and the rollouts that asked are invalid:
a failure is never an empty result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rlkit.errors import UserError


class EngineError(Exception):
    """The engine cannot answer now: it is down, too slow, or broken."""


@dataclass(frozen=True)
class Document:
    """One passage: its id in the collection, a title and a text; a title may be empty."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Query:
    """What is asked; for an engine that a model plays, also what the asker wants to know.

    Attributes:
        text: the words to search for.
        question: the task's question, "" where nobody knows it.
        answers: the accepted answers, the first as a passage would have it; empty where they are not known.
        key: decides the random numbers of the answer, e.g. task and turn: the same key, the same answer.
    """

    text: str
    question: str = ""
    answers: tuple[str, ...] = ()
    key: tuple[str | int, ...] = ()


@dataclass(frozen=True)
class Result:
    """The documents of one query, best first.

    Attributes:
        documents: at most as many as were asked for.
        scores: one for each document, higher is better; empty where the engine gives none.
        error: why there is no answer to this query; None where there is one.
        label: "useful" or "noisy", as a simulated engine was asked to write; "" of a real engine.
    """

    documents: tuple[Document, ...] = ()
    scores: tuple[float, ...] = ()
    error: str | None = None
    label: str = ""


class SearchEngine(Protocol):
    """Finds documents."""

    def search(self, queries: Sequence[Query], k: int) -> list[Result]:
        """Return one result for each query, in order.

        Raises:
            EngineError: it cannot answer at all.
        """


def full_text(document: Document) -> str:
    """Title and text, as the engines read them."""
    return f"{document.title}\n{document.text}" if document.title else document.text


def check_k(k: int) -> None:
    """Raise a `UserError` unless at least one document is asked for."""
    if k < 1:
        raise UserError(f"{k} documents were asked for: ask for at least 1")


def split_contents(contents: str) -> tuple[str, str]:
    r"""Title and text of `"Title"\ntext`, Search-R1's form; contents of another form are all text."""
    first, line_end, rest = contents.partition("\n")
    if line_end and len(first) >= 2 and first[0] == first[-1] == '"':
        return first[1:-1], rest
    return "", contents
