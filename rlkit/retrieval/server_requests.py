"""Requests and responses of Search-R1's retrieval protocol, with the spellings of other clients.

A request and its response (`search_r1/search/retrieval_server.py`)::

    {"queries": ["who wrote it"], "topk": 3, "return_scores": true}
    {"result": [[{"document": {"id": "7", "contents": "\\"Title\\"\\nText"}, "score": 12.5}]]}

Search-R1's server reads requests with pydantic, which ignores unknown fields and converts `"3"` to 3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from rlkit.retrieval.documents import Document, Result

if TYPE_CHECKING:
    from pydantic import TypeAdapter

# Accepted names of the fields; the first one that is set counts. A reranking server retrieves
# `topk_retrieval` documents and returns the best `rerank_topk`, which is the number that its client expects.
QUERY_FIELDS = ("queries", "query")
TOPK_FIELDS = ("rerank_topk", "topk_rerank", "topk", "top_k", "k", "topk_retrieval")


@dataclass(frozen=True)
class RequestLimits:
    """Limits of the server on requests.

    The defaults admit the largest step of Search-R1's recipes, 512 prompts with 5 rollouts each, in one
    request of queries of the maximum length, even if their characters are escaped as `\\u6771`.

    Attributes:
        max_body_bytes: Maximum size of a request's body.
        max_queries: Maximum number of queries in a request.
        max_query_characters: Number of characters after which a query is truncated.
        max_topk: Maximum number of documents per query.
        timeout_seconds: Seconds to receive the head of a request, its body, and again to search for it.
        max_waiting: Maximum number of requests in progress or in the queue; the next one gets a 503.
        num_threads: Number of threads that search.
    """

    max_body_bytes: int = 64_000_000
    max_queries: int = 10_000
    max_query_characters: int = 4000
    max_topk: int = 1000
    timeout_seconds: float = 30.0
    max_waiting: int = 1024
    num_threads: int = 2


class RequestError(Exception):
    """A request that cannot be answered, with its HTTP status and a one-line reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class RetrieveRequest:
    """The validated fields of a `/retrieve` request."""

    queries: list[str]
    topk: int
    return_scores: bool


def parse_request(body: bytes, topk: int, limits: RequestLimits) -> RetrieveRequest:
    """Parse and validate the body of a request. A `topk` that is null, 0 or missing is the server's default.

    Raises:
        RequestError: The body is not a valid request (400), or has too many queries (413).
    """
    try:
        data = json.loads(body)
    # json.loads raises RecursionError for deeply nested brackets.
    except (ValueError, RecursionError):
        raise RequestError(400, "the body is not valid JSON") from None
    if not isinstance(data, dict):
        raise RequestError(400, "the body must be a JSON object with the field queries")
    queries = next((data[name] for name in QUERY_FIELDS if data.get(name) is not None), None)
    if isinstance(queries, str):
        queries = [queries]
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise RequestError(400, "queries must be a list of strings, or one string")
    if len(queries) > limits.max_queries:
        reason = f"the request has {len(queries)} queries: send at most {limits.max_queries}"
        raise RequestError(413, f"{reason}, or start the server with a higher --max_queries")
    queries = [_clean_query(query, limits.max_query_characters) for query in queries]
    num_documents = _read_topk(data) or topk
    if not 1 <= num_documents <= limits.max_topk:
        reason = f"topk must be from 1 to {limits.max_topk}, not {num_documents}"
        raise RequestError(400, f"{reason}; to allow more, start the server with a higher --max_topk")
    return_scores = _convert("return_scores", data.get("return_scores"), bool)
    return RetrieveRequest(queries, num_documents, bool(return_scores))


def _clean_query(query: str, max_characters: int) -> str:
    """Return a query that every engine can read, so that one query does not fail those sent with it."""
    # Truncated, as the encoder of Search-R1's server truncates at 256 tokens.
    query = query[:max_characters]
    # UTF-8 cannot encode a lone surrogate, so engines and tokenizers would fail on it.
    return query if query.isascii() else query.encode(errors="replace").decode()


def _read_topk(data: Mapping[str, Any]) -> int | None:
    """Return the number of documents that a client wants to get back; None or 0 if it does not say."""
    for name in TOPK_FIELDS:
        if number := _convert(name, data.get(name), int):
            return number
    return None


def _convert(name: str, value: object, kind: type) -> int | None:
    """Convert a value as pydantic does by default: `"3"` and `3.0` to 3, `"true"` and 1 to True.

    Raises:
        RequestError: The value cannot be converted (400).
    """
    if value is None:
        return None
    try:
        return _converter(kind).validate_python(value)
    except ValueError:  # pydantic's ValidationError is one
        expected = "true or false" if kind is bool else "an integer"
        shown = f"{value!r}"[:40] if isinstance(value, str | float | int) else f"a {type(value).__name__}"
        raise RequestError(400, f"{name} must be {expected}, not {shown}") from None


@cache
def _converter(kind: type) -> TypeAdapter:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def encode_result(result: Result, return_scores: bool) -> bytes:
    """Return the documents of one query as JSON in the format of the protocol."""
    documents = [{"id": document.id, "contents": format_contents(document)} for document in result.documents]
    ranking: list[dict[str, Any]] = documents
    if return_scores:
        scores = result.scores or (0.0,) * len(documents)
        ranking = [{"document": d, "score": score} for d, score in zip(documents, scores, strict=True)]
    text = json.dumps(ranking, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode(errors="replace")


def format_contents(document: Document) -> str:
    """Return the quoted title and the text on separate lines, or the text alone if the title is empty."""
    return f'"{document.title}"\n{document.text}' if document.title else document.text
