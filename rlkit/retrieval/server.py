"""An index as a server of Search-R1's protocol, `POST /retrieve` (`rlkit serve-search`).

A request and its reply (`search_r1/search/retrieval_server.py`)::

    {"queries": ["who wrote it"], "topk": 3, "return_scores": true}
    {"result": [[{"document": {"id": "7", "contents": "\\"Title\\"\\nText"}, "score": 12.5}]]}

Everything is bounded: bytes, queries, their length, documents, seconds, and how many requests wait. Whatever
is wrong with a request is said in one sentence, and the server lives on.
"""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlkit.retrieval.collections.corpus import read_world
from rlkit.retrieval.documents import Document, EngineError, Query, Result, SearchEngine
from rlkit.retrieval.engines.index import open_index
from rlkit.retrieval.engines.open import open_engine

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

FIELDS = ("queries", "topk", "return_scores")


@dataclass(frozen=True)
class RequestLimits:
    """What a request may be.

    Attributes:
        body: bytes.
        queries: of one request.
        characters: of one query.
        topk: documents of one query.
        seconds: until a request is given up.
        waiting: requests that wait; one more is told to come back.
        threads: requests that are searched for at a time.
    """

    body: int = 1_000_000
    queries: int = 512
    characters: int = 4000
    topk: int = 100
    seconds: float = 30.0
    waiting: int = 1024
    threads: int = 2


class RequestError(Exception):
    """A request that is not answered, with the HTTP status and a sentence that says why."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


def make_app(
    engine: SearchEngine, *, topk: int = 3, api_key: str | None = None, limits: RequestLimits | None = None
) -> "FastAPI":
    """Make the server's application (FastAPI).

    Args:
        engine: finds the documents, in several threads at a time.
        topk: documents of a query where a request does not say.
        api_key: what a request must bring as `Authorization: Bearer KEY`; None: nothing.
        limits: what a request may be.
    """
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse

    limits = limits or RequestLimits()
    pool = ThreadPoolExecutor(limits.threads)
    waiting = 0

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="rlkit search", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 503 else None
        return JSONResponse({"error": error.reason}, error.status, headers)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        status: dict[str, Any] = {"status": "ok", "waiting": waiting}
        documents = getattr(engine, "documents", None)
        return status if documents is None else status | {"documents": len(documents)}

    @app.post("/retrieve")
    async def retrieve(request: Request) -> JSONResponse:
        nonlocal waiting
        check_key(request.headers.get("authorization", ""), api_key)
        body = await read_body(request, limits)
        asked = read_request(body, topk, limits)
        if waiting >= limits.waiting:
            raise RequestError(503, f"{waiting} requests are waiting: come back later")
        waiting += 1
        try:
            search = asyncio.get_running_loop().run_in_executor(
                pool, engine.search, [Query(text) for text in asked.queries], asked.topk
            )
            results = await asyncio.wait_for(search, limits.seconds)
        except TimeoutError:
            raise RequestError(504, f"the search took more than {limits.seconds:g} seconds") from None
        except EngineError as error:
            raise RequestError(502, f"the search failed: {error}") from error
        finally:
            waiting -= 1
        return JSONResponse({"result": [write_result(result, asked.scores) for result in results]})

    return app


@dataclass(frozen=True)
class RetrieveRequest:
    """A request that was read."""

    queries: list[str]
    topk: int
    scores: bool


def check_key(authorization: str, api_key: str | None) -> None:
    """Raise RequestError where a key is needed and another one, or none, was given."""
    if api_key is not None and not hmac.compare_digest(authorization.encode(), f"Bearer {api_key}".encode()):
        raise RequestError(401, "an API key is needed: send the header Authorization: Bearer KEY")


async def read_body(request: "Request", limits: RequestLimits) -> bytes:
    """The body of a request; raises RequestError where it is too large or does not come."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.body:
                    reason = f"the request is larger than {limits.body:,} bytes: ask fewer queries at a time"
                    raise RequestError(413, reason)
                parts.append(part)
    except TimeoutError:
        raise RequestError(408, f"the request did not come within {limits.seconds:g} seconds") from None
    return b"".join(parts)


def read_request(body: bytes, topk: int, limits: RequestLimits) -> RetrieveRequest:
    """Read a request, whose `topk` may be null or 0 for the server's own.

    Raises:
        RequestError: it is wrong in some way, which is said.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError(400, "the body is no JSON") from None
    if not isinstance(data, dict):
        raise RequestError(400, "the body must be an object with the field queries")
    if unknown := [name for name in data if name not in FIELDS]:
        raise RequestError(400, f"unknown field {unknown[0][:40]!r}: there are {', '.join(FIELDS)}")
    queries, scores = data.get("queries"), data.get("return_scores", False)
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise RequestError(400, "queries must be a list of texts")
    if len(queries) > limits.queries:
        raise RequestError(413, f"{len(queries)} queries: at most {limits.queries} at a time")
    if any(len(query) > limits.characters for query in queries):
        raise RequestError(413, f"a query is longer than {limits.characters} characters")
    if any("\ud800" <= character <= "\udfff" for query in queries for character in query):
        raise RequestError(400, "a query holds half of a surrogate pair: was it cut within a character?")
    if not isinstance(scores, bool):
        raise RequestError(400, "return_scores must be true or false")
    wanted = data.get("topk")
    if wanted is not None and (isinstance(wanted, bool) or not isinstance(wanted, int)):
        raise RequestError(400, "topk must be a whole number or null")
    wanted = wanted or topk
    if not 1 <= wanted <= limits.topk:
        raise RequestError(400, f"topk is {wanted}: it must be from 1 to {limits.topk}")
    return RetrieveRequest(queries, wanted, scores)


def write_result(result: Result, scores: bool) -> list[Any]:
    """The documents of one query in the words of the protocol.

    Raises:
        RequestError: the search of this query failed, which is no empty result.
    """
    if result.error is not None:
        raise RequestError(502, f"the search failed: {result.error}")
    documents = [{"id": one.id, "contents": contents(one)} for one in result.documents]
    if not scores:
        return documents
    points = result.scores or (0.0,) * len(documents)
    return [{"document": d, "score": score} for d, score in zip(documents, points, strict=True)]


def contents(document: Document) -> str:
    """Title in quotes and text, a line each; the text alone where there is no title."""
    return f'"{document.title}"\n{document.text}' if document.title else document.text


def open_served(index: str) -> SearchEngine:
    """Open the folder of an index, or BM25 over a generated world."""
    world = read_world(index)
    return open_index(index) if world is None else open_engine("bm25", world, {})
