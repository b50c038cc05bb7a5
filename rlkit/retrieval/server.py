"""HTTP server of Search-R1's retrieval protocol, `POST /retrieve` (`rlkit serve-search`).

Everything a client can send is limited (`RequestLimits`). A bad request gets a one-line error and never stops
the server; a client that sends nothing, or only a part of a request, is disconnected.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import socket
from collections.abc import Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rlkit.errors import UserError
from rlkit.retrieval.collections.corpus import parse_world
from rlkit.retrieval.documents import SearchEngine
from rlkit.retrieval.engines.index import open_index
from rlkit.retrieval.engines.open import open_engine
from rlkit.retrieval.server_requests import RequestError, RequestLimits, parse_request
from rlkit.retrieval.server_scheduler import Scheduler
from rlkit.retrieval.store import HEADER

if TYPE_CHECKING:
    import uvicorn
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)

# Longer than the pauses of a busy client: a request on a connection that the server just closed would fail.
KEEP_ALIVE_SECONDS = 75
MAX_HEAD_BYTES = 65_536


def make_app(
    engine: SearchEngine, *, topk: int = 3, api_key: str | None = None, limits: RequestLimits | None = None
) -> ASGIApp:
    """Build the ASGI application of the server.

    Args:
        engine: Search engine; it is called from several threads at once.
        topk: Number of documents per query if the request does not set it.
        api_key: Key that requests must send as `Authorization: Bearer KEY`; None disables authentication.
        limits: Limits on requests.
    """
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response

    limits = limits or RequestLimits()
    scheduler = Scheduler(engine, limits.num_threads)
    num_waiting = 0

    # Not a Starlette application: its routing and its middleware would take as long as a search.
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            scheduler.close()
            await send({"type": "lifespan.shutdown.complete"})
            return
        try:
            response = await respond(Request(scope, receive))
        except RequestError as error:
            headers = {"Retry-After": "1"} if error.status == 503 else None
            response = JSONResponse({"error": error.reason}, error.status, headers)
        except ClientDisconnect:
            logger.info("a client disconnected before it got its response")
            return
        await response(scope, receive, send)

    async def respond(request: Request) -> Response:
        method, path = request.scope["method"], request.scope["path"]
        if path == "/health":
            status: dict[str, Any] = {"status": "ok", "waiting": num_waiting}
            documents = getattr(engine, "documents", None)
            return JSONResponse(status if documents is None else status | {"documents": len(documents)})
        # Some clients send a trailing slash, and many do not follow the redirect of a POST.
        if path.removesuffix("/") != "/retrieve":
            raise RequestError(404, "the paths are /retrieve and /health")
        if method != "POST":
            raise RequestError(405, f"send a POST request, not {method}")
        # The key first: a request without one must not cost memory.
        check_key(dict(request.scope["headers"]).get(b"authorization", b""), api_key)
        return Response(await retrieve(request), media_type="application/json")

    async def retrieve(request: Request) -> bytes:
        nonlocal num_waiting
        # Before the body is read: what takes memory is the bodies of waiting requests.
        if num_waiting >= limits.max_waiting:
            raise RequestError(503, f"the server is busy with {num_waiting} requests: retry later")
        num_waiting += 1
        try:
            search_request = parse_request(await read_body(request, limits), topk, limits)
            # A thread cannot be interrupted: after a timeout, a search still runs to the end of its chunk.
            async with asyncio.timeout(limits.timeout_seconds):
                return await until_disconnect(scheduler.search(search_request), request)
        except TimeoutError:
            reason = f"the search took more than {limits.timeout_seconds:g} seconds"
            raise RequestError(504, reason) from None
        finally:
            num_waiting -= 1

    return app


def check_key(authorization: bytes, api_key: str | None) -> None:
    """Raise RequestError (401) if a key is required and the Authorization header does not carry it."""
    if api_key is None:
        return
    scheme, _, token = authorization.partition(b" ")
    # curl and rlkit send UTF-8, other clients Latin-1. The bytes of an environment variable that is not valid
    # UTF-8 are surrogates in Python.
    keys = [os.fsencode(api_key)]
    with suppress(UnicodeEncodeError):
        keys.append(api_key.encode("latin-1"))
    # compare_digest takes constant time, so response times do not reveal the key.
    if scheme.lower() != b"bearer" or not any(hmac.compare_digest(token.strip(), key) for key in keys):
        raise RequestError(401, "an API key is required: send the header Authorization: Bearer KEY")


async def read_body(request: Request, limits: RequestLimits) -> bytes:
    """Return the body of a request; raises RequestError if it is too large (413) or too slow (408)."""
    # Read as a stream: `await request.body()` would hold a body of any size in memory before it is rejected.
    chunks, num_bytes = [], 0
    try:
        async with asyncio.timeout(limits.timeout_seconds):
            async for chunk in request.stream():
                num_bytes += len(chunk)
                if num_bytes > limits.max_body_bytes:
                    reason = f"the request is larger than {limits.max_body_bytes:,} bytes: send fewer queries"
                    raise RequestError(413, f"{reason}, or start the server with a higher --max_body_bytes")
                chunks.append(chunk)
    except TimeoutError:
        reason = f"the request did not arrive within {limits.timeout_seconds:g} seconds"
        raise RequestError(408, reason) from None
    return b"".join(chunks)


async def until_disconnect(search: Coroutine[Any, Any, bytes], request: Request) -> bytes:
    """Return the result of a search; cancel it and raise ClientDisconnect if the client disconnects."""
    from starlette.requests import ClientDisconnect

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    # A client that timed out retries: the searches that it gave up must not delay the new ones.
    search_task, disconnect = asyncio.create_task(search), asyncio.create_task(wait_for_disconnect())
    try:
        await asyncio.wait([search_task, disconnect], return_when=asyncio.FIRST_COMPLETED)
        if not search_task.done():
            raise ClientDisconnect
        return search_task.result()
    finally:
        search_task.cancel()
        disconnect.cancel()


class HeadLimits(asyncio.Protocol):
    """Mixin for uvicorn's connections: closes one on which the head of a request is too slow or too large.

    uvicorn itself limits only the time between two requests, so that connections without a complete head
    would stay open forever. With httptools, a head may have any size.

    Attributes:
        head_timeout_seconds: Seconds from the connection, or from the first byte of a later request.
    """

    head_timeout_seconds: float
    # Attributes of uvicorn's classes.
    transport: asyncio.Transport
    cycle: Any  # request in progress or last request; None before the first head is complete
    loop: asyncio.AbstractEventLoop

    _timer: asyncio.TimerHandle | None = None
    _num_head_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the timeout of the first request."""
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        """Close the connection if a head is too large; its timeout ends when the head is complete."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._num_head_bytes = 0
            self._stop_timer()
            return
        self._start_timer()
        # After an early response, such as a 413, the data is the rest of a body.
        if self.cycle is None or not self.cycle.more_body:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timeout."""
        self._stop_timer()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        # A running timer is not restarted: a client could send one byte from time to time.
        if self._timer is None:
            self._timer = self.loop.call_later(self.head_timeout_seconds, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def make_server(app: ASGIApp, limits: RequestLimits) -> uvicorn.Server:
    """Build the HTTP server of an application. Its method `run` takes a list of listening sockets."""
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, ws="none", timeout_keep_alive=KEEP_ALIVE_SECONDS
    )
    config.load()  # selects the fastest HTTP parser that is installed
    bases = (HeadLimits, config.http_protocol_class)
    attributes = {"head_timeout_seconds": limits.timeout_seconds}
    config.http_protocol_class = type("Connection", bases, attributes)
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Raises:
        UserError: The port is in use, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # As many connections as uvicorn lets wait.
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:  # UnicodeError: not the name of a host
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host} port {port} ({reason}): choose another --port") from error


def open_served_engine(index: str) -> SearchEngine:
    """Open an index folder, or BM25 over the generated world `world:SIZE:SEED`.

    Raises:
        UserError: The index does not exist or cannot be opened.
    """
    world = parse_world(index)
    if world is not None:
        return open_engine("bm25", world, {})
    if not os.path.exists(index):
        raise UserError(f"there is no index {index!r}: give a folder written by `rlkit index`")
    if not os.path.exists(os.path.join(index, HEADER)):
        raise UserError(
            f"{index} is not an index: build one with `rlkit index {index} -o FOLDER`, then serve FOLDER"
        )
    return open_index(index)
