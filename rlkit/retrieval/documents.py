"""Documents, queries, results, and the interface of every search engine.

`SearchEngine.search` takes a batch of queries and returns one ranking per query, in order. A failure is never
an empty result: an engine that cannot answer raises `EngineError` or returns a result with `error` set, and
the rollouts that sent the query become invalid.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rlkit.errors import UserError

# A number in brackets of any width, in any script's digits and with spaces, as models write and read it.
MARKER = re.compile(
    r"[\[\uff3b\u3010\u3014\u27e6][\s\u200b-\u200d\u2060\ufeff]*+(\d++)[\s\u200b-\u200d\u2060\ufeff]*+"
    r"[\]\uff3d\u3011\u3015\u27e7]"
)


class EngineError(Exception):
    """A search engine is down, too slow or broken and cannot answer now."""


# The repr of a document is part of cache keys: renaming a field would rebuild every cached index.
@dataclass(frozen=True)
class Document:
    """One passage of a collection.

    Attributes:
        id: Identifier, unique in the collection.
        title: Title; may be empty.
        text: Body without the title.
    """

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Query:
    """A search query, with the context that a simulated engine needs to write documents for it.

    Attributes:
        text: The query string.
        question: Question of the task; "" if unknown.
        answers: Accepted answers, the first one in the form that a passage would use; empty if unknown.
        key: Random seed of a simulated answer, e.g. task and turn; the same key gives the same answer.
    """

    text: str
    question: str = ""
    answers: tuple[str, ...] = ()
    key: tuple[str | int, ...] = ()


@dataclass(frozen=True)
class Result:
    """The documents retrieved for one query, best first.

    Attributes:
        documents: At most `k` documents.
        scores: Score of each document, higher is better; empty if the engine returns no scores.
        error: Reason why the query failed; None if it succeeded.
        label: Kind of documents requested from a simulated engine, "useful" or "noisy"; "" for a real engine.
    """

    documents: tuple[Document, ...] = ()
    scores: tuple[float, ...] = ()
    error: str | None = None
    label: str = ""


@dataclass(frozen=True)
class Ranking:
    """The ids of the documents retrieved for one query, best first, where their texts are not needed.

    Attributes:
        ids: At most `k` ids.
        scores: Score of each document, higher is better; empty if the engine returns no scores.
        error: Reason why the query failed; None if it succeeded.
    """

    ids: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    error: str | None = None


class SearchEngine(Protocol):
    """Interface of a search engine."""

    def search(self, queries: Sequence[Query], k: int) -> list[Result]:
        """Return the top `k` documents of each query, in the order of the queries.

        Raises:
            EngineError: The engine cannot answer any of the queries.
        """


def ranking_of(result: Result) -> Ranking:
    """Return the ids, the scores and the error of a result."""
    return Ranking(tuple(document.id for document in result.documents), result.scores, result.error)


def search_ids(engine: SearchEngine, queries: Sequence[Query], k: int) -> list[Ranking]:
    """Return what `engine.search` finds, without texts. Engines with a method `search_ids` do not read them.

    Raises:
        EngineError: The engine cannot answer any of the queries.
    """
    if (method := getattr(engine, "search_ids", None)) is not None:
        return method(queries, k)
    return [ranking_of(result) for result in engine.search(queries, k)]


def full_text(document: Document) -> str:
    """Return the title and the text of a document on separate lines, as engines index it."""
    return f"{document.title}\n{document.text}" if document.title else document.text


def passage_text(document: Document) -> str:
    """Return the title and the text of a document in one string, as rankers and prompts see it."""
    return f"{document.title}: {document.text}" if document.title else document.text


def without_markers(text: str) -> str:
    """Return a string in which `[12]` is written as `(12)`.

    Prompts number passages with such markers. One inside a passage or a query, such as a reference in a
    paper, would look like the number of another passage.
    """
    return MARKER.sub(r"(\1)", text)


def check_k(k: int) -> None:
    """Raise `UserError` unless `k` is at least 1."""
    if k < 1:
        raise UserError(f"k, the number of documents per query, must be at least 1, not {k}")


def split_contents(contents: str) -> tuple[str, str]:
    r"""Split Search-R1's `"Title"\ntext` into (title, text); other contents are all text, without a title."""
    first, newline, body = contents.partition("\n")
    if newline and len(first) >= 2 and first[0] == first[-1] == '"':
        return first[1:-1], body
    return "", contents
