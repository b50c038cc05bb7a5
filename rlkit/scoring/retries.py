"""Retrying rewards that call a service: which failures are transient, and exponential backoff."""

import http.client
import random
import urllib.error
from collections.abc import Iterator

INITIAL_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.5, 30.0
TRANSIENT_STATUSES = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # a retry may succeed
CONNECTION_ERRORS = (
    ConnectionError,
    TimeoutError,
    urllib.error.URLError,
    http.client.BadStatusLine,
    http.client.IncompleteRead,
)
# Classes of failed connections, by package: a worker must not import libraries that no reward uses.
LIBRARY_ERRORS = {
    ("aiohttp", "ClientConnectionError"),
    ("aiohttp", "ClientPayloadError"),
    ("httpx", "NetworkError"),
    ("httpx", "RemoteProtocolError"),
    ("httpx", "TimeoutException"),
    ("openai", "APIConnectionError"),
    ("requests", "ConnectionError"),
    ("requests", "Timeout"),
}

# rlkit's own generator: retries must not change the random numbers of a reward.
_jitter = random.Random()


def is_transient(error: BaseException | None) -> bool:
    """Return whether an error, or the error that it was raised from, says that a service is unavailable.

    That is a failed or timed-out connection, or an HTTP status of a busy or broken server, from the standard
    library, httpx, requests, aiohttp or openai.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # an error may be its own cause
        seen.add(id(error))
        status = _http_status(error)
        if status is not None:
            return status in TRANSIENT_STATUSES
        if isinstance(error, CONNECTION_ERRORS):
            return True
        classes = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(error).__mro__}
        if classes & LIBRARY_ERRORS:
            return True
        error = error.__cause__
    return False


def _http_status(error: BaseException) -> int | None:
    """Return the HTTP status that an error carries under one of the usual names, or None."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code
    response = getattr(error, "response", None)
    for holder, name in (
        (error, "status_code"),  # openai
        (error, "status"),  # aiohttp
        (response, "status_code"),  # httpx, requests
    ):
        status = getattr(holder, name, None)
        if isinstance(status, int) and 100 <= status <= 599:
            return status
    return None


def backoff_delays(num_retries: int) -> Iterator[float]:
    """Yield the seconds to wait before each retry: they double, with jitter so that workers spread out."""
    for retry in range(num_retries):
        yield min(INITIAL_BACKOFF_SECONDS * 2**retry, MAX_BACKOFF_SECONDS) * _jitter.uniform(0.5, 1.0)
