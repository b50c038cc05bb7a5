"""A search engine on another machine, by Search-R1's protocol `POST /retrieve`.

What it cannot answer is an error of those queries, never an empty result. A server that fails is asked again
with growing pauses; one that stays away is left alone for a while: a step need not wait for each batch.
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

API_KEY_VARIABLE = "RLKIT_SEARCH_KEY"  # the environment variable with the API key
AGAIN = (429, 500, 502, 503, 504)  # statuses that may be others next time
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0  # seconds


class Remote:
    """A server of search results.

    Args:
        url: its address, with or without `/retrieve`.
        timeout: seconds that a request may take.
        patience: seconds for which a failing request is tried again.
        cool: seconds for which a server whose patience ran out is left alone; then one request tries.
        concurrency: requests at a time.
        batch: queries of a request.
        cache: a folder in which results are kept; None: nothing is kept.

    Attributes:
        cache: counts its hits and misses.

    Raises:
        UserError: arguments that do not fit.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        patience: float = 45.0,
        cool: float = 30.0,
        concurrency: int = 16,
        batch: int = 64,
        cache: str | None = None,
    ):
        import httpx

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url!r} is no address of a server: write http://host:8000")
        if min(timeout, patience, cool, concurrency, batch) <= 0:
            raise UserError("timeout, patience, cool, concurrency and batch of a server must be positive")
        self.url = url if parts.path.strip("/") else f"{url.rstrip('/')}/retrieve"
        self.patience, self.cool, self.batch = patience, cool, batch
        self.cache = None if cache is None else DiskCache(Path(cache).expanduser())
        key = os.environ.get(API_KEY_VARIABLE)
        self._client = httpx.Client(
            timeout=timeout,
            headers={"Authorization": f"Bearer {key}"} if key else None,
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )
        self._pool = ThreadPoolExecutor(concurrency)
        self._breaker = Breaker(cool)

    def search(self, queries: Sequence[Query], k: int) -> list[Result]:
        """Ask the server; equal queries are sent once, and empty ones, which find nothing, not at all."""
        check_k(k)
        texts = list(dict.fromkeys(query.text for query in queries if query.text.strip()))
        found = self._read(texts, k)
        rest = [text for text in texts if text not in found]
        batches = [rest[i : i + self.batch] for i in range(0, len(rest), self.batch)]
        for results in self._pool.map(lambda batch: self._ask(batch, k), batches):
            found |= results
            self._keep(results, k)
        return [found[query.text] if query.text.strip() else Result() for query in queries]

    def _ask(self, texts: Sequence[str], k: int) -> dict[str, Result]:
        body = {"queries": list(texts), "topk": k, "return_scores": True}
        try:
            results = read_reply(self._post(body), len(texts), k)
        except RemoteError as error:
            results = [Result(error=f"{self.url}: {error}")] * len(texts)
        return dict(zip(texts, results, strict=True))

    def _post(self, body: Mapping[str, Any]) -> object:
        """The server's reply; raises RemoteError where there is none."""
        deadline = time.monotonic() + self.patience
        pause = FIRST_PAUSE
        while True:
            trial = self._breaker.enter()
            answer, wait = self._try(body)
            if isinstance(answer, bytes):
                self._breaker.close()
                try:
                    return json.loads(answer)
                except ValueError:
                    raise RemoteError("its reply is no JSON") from None
            wait = max(wait, pause * random.uniform(0.5, 1.0))  # apart from the others that wait
            if trial or time.monotonic() + wait > deadline:
                self._breaker.open(answer)
                raise RemoteError(answer)
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _try(self, body: Mapping[str, Any]) -> tuple[str | bytes, float]:
        """One request: the reply, or what went wrong, and how many seconds the server wants to be left alone.

        Raises:
            RemoteError: the server refuses, and would again.
        """
        import httpx

        try:
            response = self._client.post(self.url, json=body)
        except httpx.HTTPError as error:
            return f"{type(error).__name__} {error}".strip(), 0.0
        if response.is_success:
            return response.content, 0.0
        reason = f"status {response.status_code}: {response.text[:200]}"
        if response.status_code not in AGAIN:
            self._breaker.close()  # it lives
            raise RemoteError(reason)
        after = response.headers.get("Retry-After", "")
        return reason, float(after) if after.isdigit() else 0.0

    def _key(self, text: str, k: int) -> str:
        return hashlib.sha256(json.dumps([self.url, k, text]).encode()).hexdigest()

    def _read(self, texts: Sequence[str], k: int) -> dict[str, Result]:
        if self.cache is None:
            return {}
        kept = self.cache.get([self._key(text, k) for text in texts])
        return {text: _load(kept[key]) for text in texts if (key := self._key(text, k)) in kept}

    def _keep(self, results: Mapping[str, Result], k: int) -> None:
        if self.cache is not None:
            good = {text: result for text, result in results.items() if result.error is None}
            self.cache.put({self._key(text, k): _dump(result) for text, result in good.items()})


class RemoteError(Exception):
    """The server gave no answer."""


class Breaker:
    """Keeps requests from a server that has failed for long.

    Args:
        seconds: for which it is left alone; after them one request at a time may try.
        clock: tells the time, in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.seconds, self.clock = seconds, clock
        self._until: float | None = None
        self._reason = ""
        self._lock = threading.Lock()

    def enter(self) -> bool:
        """Whether this request is the one that tries; raises RemoteError where the server is left alone."""
        with self._lock:
            if self._until is None:
                return False
            if self.clock() < self._until:
                raise RemoteError(f"left alone for {self.seconds:g} s since it failed: {self._reason}")
            self._until = self.clock() + self.seconds
            return True

    def open(self, reason: str) -> None:
        """Leave the server alone from now on."""
        with self._lock:
            self._until, self._reason = self.clock() + self.seconds, reason

    def close(self) -> None:
        """The server is well."""
        with self._lock:
            self._until = None


def read_reply(reply: object, queries: int, k: int) -> list[Result]:
    """Read what a server of the protocol gave; servers differ, and a score or an id may be missing.

    Raises:
        RemoteError: it is no reply to so many queries.
    """
    lists = reply.get("result") if isinstance(reply, Mapping) else None
    if not isinstance(lists, list) or not all(isinstance(one, list) for one in lists):
        raise RemoteError("its reply has no list of results")
    if len(lists) != queries:
        raise RemoteError(f"it gave {len(lists)} results for {queries} queries")
    return [_read_result(one[:k]) for one in lists]


def _read_result(items: Sequence[Any]) -> Result:
    documents = []
    scores = []
    for item in items:
        inner = item.get("document", item) if isinstance(item, Mapping) else item
        documents.append(_read_document(inner))
        scores.append(item.get("score") if isinstance(item, Mapping) else None)
    known = all(isinstance(score, int | float) for score in scores)
    return Result(tuple(documents), tuple(map(float, scores)) if known else ())  # type: ignore[arg-type]


def _read_document(value: object) -> Document:
    fields = value if isinstance(value, Mapping) else {"contents": value}
    text = fields.get("contents", fields.get("text"))
    if not isinstance(text, str):
        raise RemoteError(f"a document without text: {str(value)[:80]}")
    title, body = split_contents(text) if "contents" in fields else (str(fields.get("title") or ""), text)
    digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:12]
    return Document(digest if fields.get("id") is None else str(fields["id"]), title, body)


def _dump(result: Result) -> str:
    return json.dumps([[[d.id, d.title, d.text] for d in result.documents], result.scores])


def _load(text: str) -> Result:
    documents, scores = json.loads(text)
    return Result(tuple(Document(*fields) for fields in documents), tuple(scores))
