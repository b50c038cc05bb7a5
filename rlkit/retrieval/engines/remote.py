"""HTTP client of a search server that speaks Search-R1's protocol, `POST /retrieve`.

A failure is an error of its queries, never an empty result. A failing request is retried with exponential
backoff. After `retry_timeout` seconds without success, a circuit breaker opens: requests fail at once for
`cooldown` seconds, so that a training step does not wait for each of its batches to time out.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlkit.errors import UserError
from rlkit.retrieval.documents import Document, Query, Result, check_k, split_contents
from rlkit.retrieval.engines.disk_cache import DiskCache

API_KEY_VARIABLE = "RLKIT_SEARCH_KEY"  # environment variable with the API key
RETRYABLE_STATUSES = (429, 500, 502, 503, 504)  # a retry may succeed
INITIAL_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.25, 8.0


class Remote:
    """Search engine on a server.

    Args:
        url: Address of the server, with or without `/retrieve`.
        timeout: Timeout of one request, in seconds.
        retry_timeout: Seconds for which a failing request is retried.
        cooldown: Seconds for which the circuit breaker stays open after retries have failed. Then it is
            half-open, and one request probes the server.
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
        import httpx

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url!r} is not the URL of a server: write http://host:8000")
        numbers = {
            "timeout": timeout,
            "retry_timeout": retry_timeout,
            "cooldown": cooldown,
            "concurrency": concurrency,
            "batch": batch,
        }
        for name, value in numbers.items():
            if value <= 0:
                raise UserError(f"{name} of the search server must be positive, not {value}")
        self.url = url if parts.path.strip("/") else f"{url.rstrip('/')}/retrieve"
        self.retry_timeout, self.cooldown, self.batch = retry_timeout, cooldown, batch
        self.cache = None if cache is None else DiskCache(Path(cache).expanduser())
        key = os.environ.get(API_KEY_VARIABLE)
        self._client = httpx.Client(
            timeout=timeout,
            headers={"Authorization": f"Bearer {key}"} if key else None,
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )
        self._pool = ThreadPoolExecutor(concurrency)
        self._breaker = CircuitBreaker(cooldown)

    def search(self, queries: Sequence[Query], k: int) -> list[Result]:
        """Return at most `k` documents per query; a query that fails gets a result with its error.

        Equal queries are sent once. Empty queries are not sent; they have no results.
        """
        check_k(k)
        # dict.fromkeys removes duplicates and keeps the order.
        texts = list(dict.fromkeys(query.text for query in queries if query.text.strip()))
        results = self._read_cache(texts, k)
        uncached = [text for text in texts if text not in results]
        batches = [uncached[i : i + self.batch] for i in range(0, len(uncached), self.batch)]
        for batch_results in self._pool.map(lambda batch: self._search_batch(batch, k), batches):
            results |= batch_results
            self._write_cache(batch_results, k)
        return [results[query.text] if query.text.strip() else Result() for query in queries]

    def _search_batch(self, texts: Sequence[str], k: int) -> dict[str, Result]:
        body = {"queries": list(texts), "topk": k, "return_scores": True}
        try:
            results = parse_response(self._post(body), len(texts), k)
        except RemoteError as error:
            results = [Result(error=f"{self.url}: {error}")] * len(texts)
        return dict(zip(texts, results, strict=True))

    def _post(self, body: Mapping[str, Any]) -> object:
        """Send a request, with retries, and return the JSON of the response.

        Raises:
            RemoteError: All attempts failed, the server rejected the request, or the circuit breaker is open.
        """
        deadline = time.monotonic() + self.retry_timeout
        backoff = INITIAL_BACKOFF_SECONDS
        while True:
            is_probe = self._breaker.acquire()
            response, retry_after = self._send(body)
            if isinstance(response, bytes):
                self._breaker.close()
                try:
                    return json.loads(response)
                except ValueError:
                    raise RemoteError("the response is not valid JSON") from None
            # Jitter spreads the retries of concurrent requests, which failed at the same moment.
            delay = max(retry_after, backoff * random.uniform(0.5, 1.0))
            # A probe is not retried: while it runs, all other requests fail.
            if is_probe or time.monotonic() + delay > deadline:
                self._breaker.open(response)
                raise RemoteError(response)
            time.sleep(delay)
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)

    def _send(self, body: Mapping[str, Any]) -> tuple[str | bytes, float]:
        """Send one request.

        Returns:
            The body of the response, or the reason of a failure that may be retried; and the seconds to wait
            before a retry that the server asked for (`Retry-After`), or 0.

        Raises:
            RemoteError: The server rejected the request (4xx); a retry would not help.
        """
        import httpx

        try:
            response = self._client.post(self.url, json=body)
        except httpx.HTTPError as error:
            return f"{type(error).__name__} {error}".strip(), 0.0
        if response.is_success:
            return response.content, 0.0
        reason = f"status {response.status_code}: {response.text[:200]}"
        if response.status_code not in RETRYABLE_STATUSES:
            self._breaker.close()  # the server is up, even though it rejected this request
            raise RemoteError(reason)
        retry_after = response.headers.get("Retry-After", "")  # or an HTTP date, which is ignored
        return reason, float(retry_after) if retry_after.isdigit() else 0.0

    def _cache_key(self, text: str, k: int) -> str:
        # Servers differ in their collections, so the URL is part of the key.
        return hashlib.sha256(json.dumps([self.url, k, text]).encode()).hexdigest()

    def _read_cache(self, texts: Sequence[str], k: int) -> dict[str, Result]:
        if self.cache is None:
            return {}
        keys = {text: self._cache_key(text, k) for text in texts}
        values = self.cache.get(keys.values())
        return {text: _deserialize(values[key]) for text, key in keys.items() if key in values}

    def _write_cache(self, results: Mapping[str, Result], k: int) -> None:
        if self.cache is None:
            return
        values = {}
        for text, result in results.items():
            if result.error is None:
                values[self._cache_key(text, k)] = _serialize(result)
        self.cache.put(values)


class RemoteError(Exception):
    """A request to the server failed."""


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


def parse_response(response: object, num_queries: int, k: int) -> list[Result]:
    """Parse the response of a server. Servers differ: scores and ids may be missing.

    Raises:
        RemoteError: The response is malformed, or does not have one result per query.
    """
    rankings = response.get("result") if isinstance(response, Mapping) else None
    if not isinstance(rankings, list) or not all(isinstance(ranking, list) for ranking in rankings):
        raise RemoteError("the response has no list of results")
    if len(rankings) != num_queries:
        raise RemoteError(f"the response has {len(rankings)} results for {num_queries} queries")
    return [_parse_ranking(ranking[:k]) for ranking in rankings]


def _parse_ranking(items: Sequence[Any]) -> Result:
    documents = []
    scores: list[float] = []
    for item in items:
        if isinstance(item, Mapping):
            documents.append(_parse_document(item.get("document", item)))
            score = item.get("score")
            if isinstance(score, int | float):
                scores.append(float(score))
        else:
            documents.append(_parse_document(item))
    # Scores are useful only if every document has one.
    return Result(tuple(documents), tuple(scores) if len(scores) == len(documents) else ())


def _parse_document(value: object) -> Document:
    """Parse a document: an object with `contents`, or with `title` and `text`, or a bare string."""
    fields = value if isinstance(value, Mapping) else {"contents": value}
    text = fields.get("contents", fields.get("text"))
    if not isinstance(text, str):
        raise RemoteError(f"a document has no text: {str(value)[:80]}")
    title, body = split_contents(text) if "contents" in fields else (str(fields.get("title") or ""), text)
    # A document without an id gets one from its content, so that it can be recognized in another result.
    digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:12]
    return Document(digest if fields.get("id") is None else str(fields["id"]), title, body)


def _serialize(result: Result) -> str:
    return json.dumps([[[d.id, d.title, d.text] for d in result.documents], result.scores])


def _deserialize(text: str) -> Result:
    documents, scores = json.loads(text)
    return Result(tuple(Document(*fields) for fields in documents), tuple(scores))
