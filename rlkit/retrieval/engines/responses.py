"""Responses of search servers that speak Search-R1's protocol, as results.

Servers differ: documents may be nested or bare, objects or strings, and ids and scores may be missing. A
malformed ranking is an error of its query alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
from collections.abc import Mapping

from rlkit.encoding import encodable
from rlkit.retrieval.documents import Document, Result, split_contents


class RemoteError(Exception):
    """A request to a search server failed.

    Args:
        reason: What happened, on one line.
        remedy: What the user can do about it, if this is known.
        may_be_one_query: Whether one query of the request may be the cause, so that the others succeed alone.
        may_recover: Whether the same request may succeed later.
        is_overload: Whether the server says that it is busy. If it says so again and again, one query may be
            the cause here, too.
        retry_after: Seconds to wait before a retry that the server asked for.
    """

    def __init__(
        self,
        reason: str,
        remedy: str = "",
        *,
        may_be_one_query: bool = False,
        may_recover: bool = False,
        is_overload: bool = False,
        retry_after: float = 0.0,
    ):
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.remedy = remedy
        self.may_be_one_query, self.may_recover = may_be_one_query, may_recover
        self.is_overload, self.retry_after = is_overload, retry_after


def read_response(content: bytes, num_queries: int, k: int) -> list[Result]:
    """Read the body of a response: one result per query.

    Raises:
        RemoteError: The body is not the JSON of one ranking per query.
    """
    try:
        response = json.loads(content)
    except (ValueError, RecursionError):  # RecursionError: thousands of nested brackets
        start = content[:80].decode("utf-8", "replace")
        raise RemoteError(f"the response is not valid JSON: {start!r}", may_be_one_query=True) from None
    return parse_response(response, num_queries, k)


def parse_response(response: object, num_queries: int, k: int) -> list[Result]:
    """Return one result of at most `k` documents per query; a malformed ranking gives a result with an error.

    Raises:
        RemoteError: The response does not have one ranking per query.
    """
    rankings = response.get("result") if isinstance(response, Mapping) else None
    if not isinstance(rankings, list):
        reason = f"the response has no list of results: {_shorten(response)}"
        raise RemoteError(reason, may_be_one_query=True)
    if len(rankings) != num_queries:
        reason = f"the response has {len(rankings)} results for {num_queries} queries"
        raise RemoteError(reason, may_be_one_query=True)
    return [_parse_ranking(ranking, k) for ranking in rankings]


def _parse_ranking(ranking: object, k: int) -> Result:
    if not isinstance(ranking, list):
        return Result(error=f"the result is not a list of documents: {_shorten(ranking)}")
    documents, scores = [], []
    for item in ranking[:k]:
        value = item.get("document", item) if isinstance(item, Mapping) else item
        document = _parse_document(value)
        if document is None:
            return Result(error=f"a document has no text: {_shorten(value)}")
        documents.append(document)
        scores.append(_parse_score(item.get("score")) if isinstance(item, Mapping) else None)
    known_scores = tuple(score for score in scores if score is not None)
    # Scores are useful only if every document has one.
    return Result(tuple(documents), known_scores if len(known_scores) == len(documents) else ())


def _parse_document(value: object) -> Document | None:
    """Return a document from an object with `contents`, or `title` and `text`, or from a string.

    Returns:
        The document; None if it has no text.
    """
    fields = value if isinstance(value, Mapping) else {"contents": value}
    contents, text, title = (_string(fields.get(name)) for name in ("contents", "text", "title"))
    if contents is not None and (contents or text is None):
        title, text = _split_titled_contents(contents, title or "")
    if text is None:
        return None
    title = title or ""
    # A document without an id gets one from its content, so that it can be recognized in another result.
    digest = hashlib.sha256(f"{title}\n{text}".encode()).hexdigest()[:12]
    return Document(_parse_id(fields.get("id")) or digest, title, text)


def _split_titled_contents(contents: str, title: str) -> tuple[str, str]:
    """Return the title and the body of `contents`, whose first line may be the title, in quotes or not.

    Args:
        contents: Search-R1's `"Title"\\ntext`, `Title\\ntext`, or the text alone.
        title: The field `title` of the document; may be empty.
    """
    quoted_title, body = split_contents(contents)
    if body != contents or not title:
        return quoted_title or title, body
    first, newline, rest = contents.partition("\n")
    if first.strip() != title.strip():
        return title, contents
    # Servers derive the title from the first line. A single line is the body, without a title.
    return (title, rest) if newline else ("", contents)


def _string(value: object) -> str | None:
    return encodable(value) if isinstance(value, str) else None


def _parse_id(value: object) -> str:
    """Return an id as a string; "" if there is none, or it is not a scalar."""
    return encodable(str(value)) if isinstance(value, str | int | float) else ""


def _parse_score(value: object) -> float | None:
    """Return a score; None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        score = float(value)
    except (ValueError, OverflowError):
        return None
    return score if math.isfinite(score) else None


def _shorten(value: object) -> str:
    """Return the start of a value's representation; deeply nested values are abbreviated."""
    return encodable(reprlib.repr(value))[:80]


def serialize_result(result: Result) -> str:
    """Return the documents and scores of a result as JSON."""
    return json.dumps([[[d.id, d.title, d.text] for d in result.documents], result.scores])


def deserialize_result(text: str) -> Result:
    """Return the result that `serialize_result` has written."""
    documents, scores = json.loads(text)
    return Result(tuple(Document(*map(encodable, fields)) for fields in documents), tuple(scores))
