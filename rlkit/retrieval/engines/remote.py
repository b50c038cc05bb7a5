"""HTTP client of a search server that speaks Search-R1's protocol, `POST /retrieve`.

A failure is an error of its queries, never an empty result. One deadline covers all requests, retries and
pauses of a search. If a query may be the reason why its batch fails, all queries of the batch are sent alone,
so that only this query gets an error. If the server answers nothing before the deadline, a circuit breaker
opens: requests fail at once for `cooldown` seconds, so that a training step does not wait for each of its
batches to time out.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rlkit.encoding import encodable
from rlkit.errors import UnavailableError, UserError, one_line
from rlkit.event_loop import EventLoopThread
from rlkit.retrieval.documents import Query, Result, check_k
from rlkit.retrieval.engines.disk_cache import DiskCache
from rlkit.retrieval.engines.responses import (
    RemoteError,
    deserialize_result,
    read_response,
    serialize_result,
)

if TYPE_CHECKING:
    import httpx

API_KEY_VARIABLE = "RLKIT_SEARCH_KEY"  # environment variable with the API key
INITIAL_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.25, 8.0
# Share of the time left that a request may take if others depend on its end: the queries of a batch are sent
# alone after it timed out, and queries that are sent alone wait for one another.
SHARE_OF_TIME_LEFT = 2 / 3
# After this number of refusals of an overloaded server, the queries of a batch are sent alone.
MAX_ATTEMPTS_TOGETHER = 3
# A query that is sent alone fails for good after this number of attempts if the server answers others.
MAX_ATTEMPTS_ALONE = 2
MAX_REDIRECTS = 5
START_SERVER = "start the server with `rlkit serve-search INDEX`, or fix the URL"


class Remote:
    """Search engine on a server.

    Args:
        url: Address of the server, with or without `/retrieve`.
        timeout: Seconds that one request may take from its first byte to the last byte of its response.
        retry_timeout: Seconds that one call of `search` may take, with all its requests and retries.
        cooldown: Seconds for which the circuit breaker stays open after no request of a search was answered.
            Then it is half-open, and one request probes the server.
        concurrency: Maximum number of concurrent requests.
        batch: Maximum number of queries in a request.
        cache: Folder in which results are cached on disk; None disables the cache.

    Attributes:
        cache: The disk cache, which counts its hits and misses, or None.

    Raises:
        UserError: An argument is invalid.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        retry_timeout: float = 45.0,
        cooldown: float = 30.0,
        concurrency: int = 16,
        batch: int = 64,
        cache: str | None = None,
    ):
        numbers = {"timeout": timeout, "retry_timeout": retry_timeout, "cooldown": cooldown}
        counts = {"concurrency": concurrency, "batch": batch}
        for name, value in (numbers | counts).items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf:
                raise UserError(f"{name} of the search server must be positive, not {value!r}")
            if name in counts and not isinstance(value, int):
                raise UserError(f"{name} of the search server must be an integer, not {value!r}")
        self.url = _retrieve_url(url)
        self.timeout, self.retry_timeout, self.batch = timeout, retry_timeout, batch
        self.concurrency = concurrency
        self.cache = None if cache is None else DiskCache(Path(cache).expanduser())
        self._headers = _authorization(os.environ.get(API_KEY_VARIABLE, ""))
        self._breaker = CircuitBreaker(cooldown)
        # Number of responses, across all threads, that show that the server is up.
        self._num_answers = 0
        self._event_loop = EventLoopThread()
        self._loop_of_client: asyncio.AbstractEventLoop | None = None
        self._client: httpx.AsyncClient | None = None
        self._slots = asyncio.Semaphore(concurrency)  # of concurrent requests

    def search(self, queries: Sequence[Query], k: int) -> list[Result]:
        """Return at most `k` documents per query; a query that fails gets a result with its error.

        Equal queries are sent once. Empty queries are not sent; they have no results. The call takes at most
        `retry_timeout` seconds. Several threads may search at the same time.
        """
        check_k(k)
        texts = [encodable(query.text) for query in queries]
        # dict.fromkeys removes duplicates and keeps the order.
        distinct = list(dict.fromkeys(text for text in texts if text.strip()))
        results = self._read_cache(distinct, k)
        uncached = [text for text in distinct if text not in results]
        if uncached:
            searched = self._event_loop.run(self._search(uncached, k))
            self._write_cache(searched, k)
            results |= searched
        return [results[text] if text.strip() else Result() for text in texts]

    def probe(self, k: int = 1) -> None:
        """Send one query for `k` documents, without retries, to check the server before it is needed.

        Raises:
            UnavailableError: The server did not return a result within `timeout` seconds.
        """
        try:
            self._event_loop.run(self._probe(k))
        except RemoteError as error:
            remedy = "" if error.remedy else f"; {START_SERVER}"
            raise UnavailableError(
                f"the search server {self.url} did not answer a test query: {one_line(error)}{remedy}"
            ) from error

    async def _probe(self, k: int) -> None:
        # The timeout of any request: the first search on a cold index takes longest.
        deadline = asyncio.get_running_loop().time() + self.retry_timeout
        (result,) = await self._attempt(["test"], Search(k, deadline, 0))
        if result.error is not None:
            raise RemoteError(result.error)

    async def _search(self, texts: Sequence[str], k: int) -> dict[str, Result]:
        deadline = asyncio.get_running_loop().time() + self.retry_timeout
        search = Search(k, deadline, self._num_answers)
        batches = [texts[i : i + self.batch] for i in range(0, len(texts), self.batch)]
        batch_results = await asyncio.gather(*(self._search_batch(batch, search) for batch in batches))
        results: dict[str, Result] = {}
        for batch, of_batch in zip(batches, batch_results, strict=True):
            for text, result in zip(batch, of_batch, strict=True):
                error = None if result.error is None else f"{self.url}: {result.error}"
                results[text] = replace(result, error=error)
        return results

    async def _search_batch(
        self, texts: Sequence[str], search: Search, *, is_alone: bool = False, is_probe: bool = False
    ) -> list[Result]:
        """Return the results of a batch, with an error for the queries that fail until the deadline.

        Args:
            texts: Queries.
            search: The search that the batch belongs to.
            is_alone: Whether the batch is one query of a batch that failed.
            is_probe: Whether the batch probes the server for a half-open circuit breaker, which has admitted
                it already.
        """
        loop = asyncio.get_running_loop()
        backoff, num_attempts = INITIAL_BACKOFF_SECONDS, 0
        while True:
            try:
                is_probe = is_probe or self._breaker.acquire()
                return await self._attempt(texts, search, is_alone=is_alone)
            except RemoteError as error:
                failure = error
            num_attempts += 1
            is_refused = failure.is_overload and num_attempts >= MAX_ATTEMPTS_TOGETHER
            if (failure.may_be_one_query or is_refused) and len(texts) > 1:
                alone = [
                    self._search_batch([text], search, is_alone=True, is_probe=is_probe) for text in texts
                ]
                return [result for (result,) in await asyncio.gather(*alone)]
            # Jitter spreads the retries of concurrent requests, which failed at the same moment.
            delay = max(failure.retry_after, backoff * random.uniform(0.5, 1.0))
            is_up = self._num_answers > search.num_answers_before
            is_bad_query = failure.may_be_one_query and is_up and num_attempts >= MAX_ATTEMPTS_ALONE
            is_late = loop.time() + delay >= search.deadline
            # A probe is not retried: while it runs, all other requests fail.
            is_last = not failure.may_recover or is_bad_query or is_late or is_probe
            if is_last:
                if failure.may_recover and not is_up:
                    self._breaker.open(str(failure))
                return [Result(error=str(failure))] * len(texts)
            await asyncio.sleep(delay)
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)

    async def _attempt(self, texts: Sequence[str], search: Search, *, is_alone: bool = False) -> list[Result]:
        """Send one request and return its results.

        Raises:
            RemoteError: The request failed, or the response is malformed.
        """
        loop = asyncio.get_running_loop()
        client, slots = self._client_of_loop(loop)
        try:
            async with asyncio.timeout_at(search.deadline):
                await slots.acquire()
        except TimeoutError:
            reason = "the time of the search was used up before the query could be sent"
            raise RemoteError(reason, "increase retry_timeout or concurrency") from None
        try:
            seconds_left = max(search.deadline - loop.time(), 0.0)
            seconds = min(seconds_left, self.timeout)
            if is_alone or len(texts) > 1:
                # Not less than a tenth of the whole time: a healthy server must be able to respond.
                share = max(seconds_left * SHARE_OF_TIME_LEFT, self.retry_timeout / 10)
                seconds = min(seconds, share)
            body = {"queries": list(texts), "topk": search.k, "return_scores": True}
            try:
                # httpx limits the time between two bytes, not that of a request.
                async with asyncio.timeout(seconds):
                    response = await _post(client, self.url, body)
            except TimeoutError:
                reason = f"Timeout: the server did not respond within {seconds:.3g} s"
                if seconds == seconds_left < self.timeout:
                    reason += ", which was left of retry_timeout"
                raise RemoteError(reason, may_be_one_query=True, may_recover=True) from None
        finally:
            slots.release()
        failure = _status_error(response)
        if failure is None or not failure.may_recover:
            # The server is up, even if it rejected this request.
            self._num_answers += 1
            self._breaker.close()
        if failure is not None:
            raise failure
        return read_response(response.content, len(texts), search.k)

    def _client_of_loop(self, loop: asyncio.AbstractEventLoop) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        """Return the client and the semaphore of the loop; a forked process has a loop of its own."""
        import httpx

        if self._client is None or self._loop_of_client is not loop:
            # The semaphore limits the connections. httpx would count the seconds in its own queue, too.
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.concurrency)
            self._client = httpx.AsyncClient(timeout=None, headers=self._headers, limits=limits)
            self._slots = asyncio.Semaphore(self.concurrency)
            self._loop_of_client = loop
        return self._client, self._slots

    def _cache_key(self, text: str, k: int) -> str:
        # Servers differ in their collections, so the URL is part of the key.
        return hashlib.sha256(json.dumps([self.url, k, text]).encode()).hexdigest()

    def _read_cache(self, texts: Sequence[str], k: int) -> dict[str, Result]:
        if self.cache is None:
            return {}
        keys = {text: self._cache_key(text, k) for text in texts}
        values = self.cache.get(keys.values())
        return {text: deserialize_result(values[key]) for text, key in keys.items() if key in values}

    def _write_cache(self, results: Mapping[str, Result], k: int) -> None:
        if self.cache is None:
            return
        values = {}
        for text, result in results.items():
            if result.error is None:
                values[self._cache_key(text, k)] = serialize_result(result)
        self.cache.put(values)


class CircuitBreaker:
    """Make requests fail at once while a server is down.

    A closed breaker admits every request and an open one none. After `cooldown` seconds the breaker is
    half-open: one request may probe the server, and its outcome closes or reopens the breaker.

    Args:
        cooldown: Seconds for which the breaker stays open.
        clock: Function that returns a time in seconds.
    """

    def __init__(self, cooldown: float, clock: Callable[[], float] = time.monotonic):
        self.cooldown, self.clock = cooldown, clock
        self._open_until: float | None = None
        self._reason = ""
        self._lock = threading.Lock()

    def acquire(self) -> bool:
        """Admit a request, and return whether it is the probe of a half-open breaker.

        Raises:
            RemoteError: The breaker is open.
        """
        with self._lock:
            if self._open_until is None:
                return False
            if self.clock() < self._open_until:
                raise RemoteError(f"circuit breaker open for {self.cooldown:g} s after: {self._reason}")
            # Reopen for the others; if the probe never reports back, the next one follows a cooldown later.
            self._open_until = self.clock() + self.cooldown
            return True

    def open(self, reason: str) -> None:
        """Open the breaker: reject requests for `cooldown` seconds, with this reason."""
        with self._lock:
            self._open_until, self._reason = self.clock() + self.cooldown, reason

    def close(self) -> None:
        """Close the breaker: admit all requests."""
        with self._lock:
            self._open_until = None


@dataclass(frozen=True)
class Search:
    """One call of `Remote.search`.

    Attributes:
        k: Number of documents per query.
        deadline: Time of the event loop at which the call must have ended.
        num_answers_before: Number of answers of the server before the call.
    """

    k: int
    deadline: float
    num_answers_before: int


def _retrieve_url(url: str) -> str:
    """Return the URL of the requests; raise UserError if `url` is not the address of a server."""
    import httpx

    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(httpx.URL(url).host) and parts.port != 0
    except (ValueError, httpx.InvalidURL):
        is_valid = False
    if not is_valid:
        raise UserError(f"{url!r} is not the URL of a server: write http://host:8000")
    return url if parts.path.strip("/") else parts._replace(path="/retrieve").geturl()


def _authorization(key: str) -> dict[bytes, bytes]:
    """Return the header with the API key, none for an empty key.

    Raises:
        UserError: The key has control characters, which no HTTP header may have.
    """
    key = key.strip()
    if any(ord(character) < 32 or ord(character) == 127 for character in key):
        raise UserError(f"the API key in {API_KEY_VARIABLE} has control characters, such as a line break")
    # In bytes: httpx encodes strings as ASCII. Bytes that are not UTF-8 are surrogates in `os.environ`.
    return {b"Authorization": f"Bearer {key}".encode("utf-8", "surrogateescape")} if key else {}


async def _post(client: httpx.AsyncClient, url: str, body: Mapping[str, object]) -> httpx.Response:
    """Return the response to a POST request, after redirects and at most one retry of a broken connection.

    Raises:
        RemoteError: There is no connection, or no end of redirects.
    """
    import httpx

    request = client.build_request("POST", url, json=body)
    num_redirects = num_disconnects = 0
    while True:
        try:
            response = await client.send(request)
        except (httpx.ConnectError, httpx.ProxyError) as error:
            raise RemoteError(_describe(error), may_recover=True) from error
        except (httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
            raise RemoteError(_describe(error)) from error
        except httpx.TransportError as error:
            # The server has restarted, or closed an idle connection at this moment. If it happens twice, the
            # request may be the reason.
            num_disconnects += 1
            if num_disconnects > 1:
                raise RemoteError(_describe(error), may_be_one_query=True, may_recover=True) from error
            request = _copy_request(client, request, request.url, body)
            continue
        except Exception as error:  # e.g. the body cannot be decompressed, or a redirect has an invalid port
            raise RemoteError(_describe(error), may_be_one_query=True) from error
        redirect = response.next_request
        if redirect is None:
            return response
        num_redirects += 1
        if num_redirects > MAX_REDIRECTS:
            raise RemoteError(f"more than {MAX_REDIRECTS} redirects, the last one to {redirect.url}")
        # After status 301 and 302, httpx would continue with a GET request, which has no body.
        request = _copy_request(client, redirect, redirect.url, body)


def _copy_request(
    client: httpx.AsyncClient, request: httpx.Request, url: httpx.URL, body: Mapping[str, object]
) -> httpx.Request:
    """Return a POST request; it has the API key only if `request` has it, which may go to another host."""
    copy = client.build_request("POST", url, json=body)
    if "Authorization" not in request.headers:
        copy.headers.pop("Authorization", None)
    return copy


def _describe(error: Exception) -> str:
    return one_line(f"{type(error).__name__} {error}")


def _status_error(response: httpx.Response) -> RemoteError | None:
    """Return the error that the status of a response means; None for success."""
    status = response.status_code
    if response.is_success:
        return None
    reason = one_line(f"status {status}: {response.content[:200].decode('utf-8', 'replace')}")
    if status in (401, 403):
        return RemoteError(reason, f"set the environment variable {API_KEY_VARIABLE} to the server's API key")
    if status in (404, 405):
        return RemoteError(
            reason, "the URL must be that of a search server's POST endpoint, usually /retrieve"
        )
    if status in (429, 503):
        retry_after = _retry_after_seconds(response.headers.get("Retry-After", ""))
        remedy = "the server is overloaded or starting: retry later"
        return RemoteError(reason, remedy, may_recover=True, is_overload=True, retry_after=retry_after)
    if status == 408 or status >= 500:
        return RemoteError(reason, may_be_one_query=True, may_recover=True)
    # A redirect without a target concerns all queries.
    return RemoteError(reason, may_be_one_query=status >= 400)


def _retry_after_seconds(value: str) -> float:
    """Return the seconds of a Retry-After header: a number, or a date; 0 if it is neither."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
            seconds = (date - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):  # TypeError: a date without a time zone
            return 0.0
    return max(seconds, 0.0) if not math.isnan(seconds) else 0.0
