"""HTTP server of Search-R1's retrieval protocol, `POST /retrieve` (`rlkit serve-search`).

A request and its response (`search_r1/search/retrieval_server.py`)::

    {"queries": ["who wrote it"], "topk": 3, "return_scores": true}
    {"result": [[{"document": {"id": "7", "contents": "\\"Title\\"\\nText"}, "score": 12.5}]]}

Everything a client can send is limited: the size of the body, the number and length of the queries, the
number of documents, the seconds, and the number of waiting requests. A bad request gets a one-line error and
never stops the server.
"""

# No `from __future__ import annotations` here: FastAPI evaluates the annotations of its handlers at run time,
# and would not find `Request`, which `make_app` imports.
import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlkit.retrieval.collections.corpus import parse_world
from rlkit.retrieval.documents import Document, EngineError, Query, Result, SearchEngine
from rlkit.retrieval.engines.index import open_index
from rlkit.retrieval.engines.open import open_engine

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

FIELDS = ("queries", "topk", "return_scores")


@dataclass(frozen=True)
class RequestLimits:
    """Limits of the server on requests.

    Attributes:
        max_body_bytes: Maximum size of a request's body.
        max_queries: Maximum number of queries in a request.
        max_query_characters: Maximum length of a query.
        max_topk: Maximum number of documents per query.
        timeout_seconds: Seconds to receive a request, and again to search for it.
        max_waiting: Maximum number of requests in progress or in the queue; the next one gets a 503.
        num_threads: Number of requests that are searched for concurrently.
    """

    max_body_bytes: int = 1_000_000
    max_queries: int = 512
    max_query_characters: int = 4000
    max_topk: int = 100
    timeout_seconds: float = 30.0
    max_waiting: int = 1024
    num_threads: int = 2


class RequestError(Exception):
    """A request that cannot be answered, with its HTTP status and a one-line reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


def make_app(
    engine: SearchEngine, *, topk: int = 3, api_key: str | None = None, limits: RequestLimits | None = None
) -> "FastAPI":
    """Build the FastAPI application of the server.

    Args:
        engine: Search engine; it is called from several threads at once.
        topk: Number of documents per query if the request does not set it.
        api_key: Key that requests must send as `Authorization: Bearer KEY`; None disables authentication.
        limits: Limits on requests.
    """
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse

    limits = limits or RequestLimits()
    pool = ThreadPoolExecutor(limits.num_threads)
    num_waiting = 0

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="rlkit search", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(RequestError)
    async def send_error(request: Request, error: RequestError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 503 else None
        return JSONResponse({"error": error.reason}, error.status, headers)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        status: dict[str, Any] = {"status": "ok", "waiting": num_waiting}
        documents = getattr(engine, "documents", None)
        return status if documents is None else status | {"documents": len(documents)}

    @app.post("/retrieve")
    async def retrieve(request: Request) -> JSONResponse:
        nonlocal num_waiting
        # The key first: a request without one must not cost memory.
        check_key(request.headers.get("authorization", ""), api_key)
        body = await read_body(request, limits)
        search_request = parse_request(body, topk, limits)
        if num_waiting >= limits.max_waiting:
            raise RequestError(503, f"the server is busy with {num_waiting} requests: retry later")
        num_waiting += 1
        try:
            queries = [Query(text) for text in search_request.queries]
            search = asyncio.get_running_loop().run_in_executor(
                pool, engine.search, queries, search_request.topk
            )
            # A thread cannot be interrupted: after a timeout, the search still runs to its end.
            results = await asyncio.wait_for(search, limits.timeout_seconds)
        except TimeoutError:
            reason = f"the search took more than {limits.timeout_seconds:g} seconds"
            raise RequestError(504, reason) from None
        except EngineError as error:
            raise RequestError(502, f"the search failed: {error}") from error
        finally:
            num_waiting -= 1
        return JSONResponse(
            {"result": [format_result(result, search_request.return_scores) for result in results]}
        )

    return app


@dataclass(frozen=True)
class RetrieveRequest:
    """The validated fields of a `/retrieve` request."""

    queries: list[str]
    topk: int
    return_scores: bool


def check_key(authorization: str, api_key: str | None) -> None:
    """Raise RequestError (401) if a key is required and the Authorization header does not carry it."""
    # compare_digest takes constant time, so response times do not reveal the key.
    if api_key is not None and not hmac.compare_digest(authorization.encode(), f"Bearer {api_key}".encode()):
        raise RequestError(401, "an API key is required: send the header Authorization: Bearer KEY")


async def read_body(request: "Request", limits: RequestLimits) -> bytes:
    """Return the body of a request; raises RequestError if it is too large (413) or too slow (408)."""
    # Read as a stream: `await request.body()` would hold a body of any size in memory before it is rejected.
    chunks, num_bytes = [], 0
    try:
        async with asyncio.timeout(limits.timeout_seconds):
            async for chunk in request.stream():
                num_bytes += len(chunk)
                if num_bytes > limits.max_body_bytes:
                    reason = f"the request is larger than {limits.max_body_bytes:,} bytes: send fewer queries"
                    raise RequestError(413, reason)
                chunks.append(chunk)
    except TimeoutError:
        reason = f"the request did not arrive within {limits.timeout_seconds:g} seconds"
        raise RequestError(408, reason) from None
    return b"".join(chunks)


def parse_request(body: bytes, topk: int, limits: RequestLimits) -> RetrieveRequest:
    """Parse and validate the body of a request. A `topk` that is null, 0 or missing is the server's default.

    Raises:
        RequestError: The body is not a valid request (400), or exceeds a limit (413).
    """
    try:
        data = json.loads(body)
    # json.loads raises RecursionError for deeply nested brackets.
    except (ValueError, RecursionError):
        raise RequestError(400, "the body is not valid JSON") from None
    if not isinstance(data, dict):
        raise RequestError(400, "the body must be a JSON object with the field queries")
    if unknown := [name for name in data if name not in FIELDS]:
        raise RequestError(400, f"unknown field {unknown[0][:40]!r}: the fields are {', '.join(FIELDS)}")
    queries, return_scores = data.get("queries"), data.get("return_scores", False)
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise RequestError(400, "queries must be a list of strings")
    if len(queries) > limits.max_queries:
        raise RequestError(413, f"the request has {len(queries)} queries: send at most {limits.max_queries}")
    if any(len(query) > limits.max_query_characters for query in queries):
        raise RequestError(413, f"a query is longer than {limits.max_query_characters} characters")
    # UTF-8 cannot encode a lone surrogate, so engines and tokenizers would fail on it.
    if any("\ud800" <= character <= "\udfff" for query in queries for character in query):
        raise RequestError(400, "a query contains a lone surrogate; was it cut inside a character?")
    if not isinstance(return_scores, bool):
        raise RequestError(400, "return_scores must be true or false")
    num_documents = data.get("topk")
    # In Python, True is an int.
    if num_documents is not None and (isinstance(num_documents, bool) or not isinstance(num_documents, int)):
        raise RequestError(400, "topk must be an integer or null")
    num_documents = num_documents or topk
    if not 1 <= num_documents <= limits.max_topk:
        raise RequestError(400, f"topk must be from 1 to {limits.max_topk}, not {num_documents}")
    return RetrieveRequest(queries, num_documents, return_scores)


def format_result(result: Result, return_scores: bool) -> list[Any]:
    """Return the documents of one query in the format of the protocol.

    Raises:
        RequestError: The search of this query failed (502); an empty list would hide that.
    """
    if result.error is not None:
        raise RequestError(502, f"the search failed: {result.error}")
    documents = [{"id": document.id, "contents": format_contents(document)} for document in result.documents]
    if not return_scores:
        return documents
    scores = result.scores or (0.0,) * len(documents)
    return [{"document": d, "score": score} for d, score in zip(documents, scores, strict=True)]


def format_contents(document: Document) -> str:
    """Return the quoted title and the text on separate lines, or the text alone if the title is empty."""
    return f'"{document.title}"\n{document.text}' if document.title else document.text


def open_served_engine(index: str) -> SearchEngine:
    """Open an index folder, or BM25 over the generated world `world:SIZE:SEED`."""
    world = parse_world(index)
    return open_index(index) if world is None else open_engine("bm25", world, {})
