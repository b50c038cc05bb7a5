"""The pool of a run's vLLM servers: it tracks which are up and have free capacity, and handles failures.

A server that fails gets no more requests. The pool polls it with exponential backoff until it is healthy. A
server that has restarted has its initial weights, so it gets the current ones before it is used.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from typing import Any

from filelock import AsyncFileLock

from rlkit.errors import GuardError, UserError
from rlkit.rollouts.types import Request, Sample, Sampling
from rlkit.rollouts.vllm.endpoint import LOAD_TIMEOUT, LOADING, FailedError, Server, UnavailableError
from rlkit.rollouts.vllm.nccl import NCCLSender
from rlkit.rollouts.vllm.weights import Weights

logger = logging.getLogger(__name__)
MAX_ATTEMPTS = 5  # per request; after that, assume that the request itself makes servers fail
MIN_DELAY, MAX_DELAY = 0.5, 30.0  # seconds of backoff between polls of a server that is down


class Pool:
    """Servers that all hold the same weights. Its coroutines must run in one event loop.

    Args:
        servers: Servers of this run, which no other run may use.
        nccl: Sender of weights over NCCL, used if they are not in a folder.
        retry_timeout: Seconds to wait while all servers are down, before giving up.
        concurrency: Maximum number of concurrent requests to one server.

    Attributes:
        weights: Weights that the servers must hold. None: their initial weights.
    """

    def __init__(self, servers: Sequence[Server], nccl: NCCLSender, retry_timeout: float, concurrency: int):
        self.servers, self.nccl = servers, nccl
        self.retry_timeout, self.concurrency = retry_timeout, concurrency
        self.weights: Weights | None = None
        self._tasks: set[asyncio.Task] = set()
        self._changed = asyncio.Condition()
        self._down_since = time.monotonic()  # when the last server went down
        self._failure: Exception | None = None

    async def start(self) -> None:
        """Wait until all servers are up.

        Raises:
            UserError: A server was not up within `retry_timeout` seconds.
        """
        for server in self.servers:
            self.spawn(self._recover(server))
        started = time.monotonic()
        while down := [server for server in self.servers if not server.up]:
            self._raise_failure()
            if time.monotonic() - started > self.retry_timeout:
                raise UserError(f"{describe(down)}; start them with `rlkit serve`")
            await asyncio.sleep(0.05)

    def spawn(self, coroutine: Coroutine[Any, Any, Any], name: str | None = None) -> None:
        """Start a coroutine as a background task."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)  # the event loop holds only a weak reference
        task.add_done_callback(self._tasks.discard)

    async def cancel(self, name: str | None = None) -> None:
        """Cancel the tasks with this name, or all of them, and wait until they have ended."""
        tasks = [task for task in self._tasks if name in (None, task.get_name())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def sample(self, request: Request, sampling: Sampling) -> Sample:
        """Sample a turn with the current weights, on any server.

        Raises:
            GuardError: All servers were down for `retry_timeout` seconds, or the request failed
                `MAX_ATTEMPTS` times.
            UserError: A server rejected the request.
        """
        reason = ""
        for _ in range(MAX_ATTEMPTS):
            server = await self._acquire()
            try:
                return await server.sample(request, sampling, self.weights)
            except UnavailableError as error:
                reason = f"{server.url}: {error}"
                self._mark_down(server, error)
            finally:
                server.busy -= 1
                async with self._changed:
                    self._changed.notify()
        raise GuardError(f"a request failed {MAX_ATTEMPTS} times, most recently on {reason}")

    async def check(self) -> None:
        """Mark servers as down that have failed or restarted since they were last used."""
        await asyncio.gather(*(self._check(server) for server in self.servers if server.up))

    async def load(self) -> None:
        """Load the current weights on all servers that are up; if none is, wait for one.

        Raises:
            GuardError: A server cannot load the weights, or all were down for `retry_timeout` seconds.
        """
        await asyncio.gather(*(self._load(server) for server in self.servers if server.up))
        (await self._acquire()).busy -= 1  # returns once at least one server holds the weights

    async def _acquire(self) -> Server:
        """Wait for a server that is up and has room; return the least busy one."""
        started = time.monotonic()
        async with self._changed:
            while True:
                self._raise_failure()
                up = [server for server in self.servers if server.up]
                if free := [server for server in up if server.busy < self.concurrency]:
                    server = min(free, key=lambda server: server.busy)
                    server.busy += 1
                    return server
                remaining = None  # no timeout: a busy server will finish a request
                if not up:
                    # Count from the later of this call and the time when the last server went down. Otherwise
                    # a downtime without requests would use up the timeout.
                    waited = time.monotonic() - max(started, self._down_since)
                    remaining = self.retry_timeout - waited
                    if remaining <= 0:
                        raise GuardError(describe(self.servers))
                with suppress(TimeoutError):
                    async with asyncio.timeout(remaining):
                        await self._changed.wait()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _check(self, server: Server) -> None:
        try:
            if not await server.holds(self.weights):
                raise UnavailableError("it does not hold the current weights")
        except UnavailableError as error:
            self._mark_down(server, error)

    async def _load(self, server: Server) -> None:
        try:
            await self._ensure_weights(server)
        except (UnavailableError, TimeoutError) as error:
            # A healthy server that reports a failure would fail again: stop the run instead of retrying.
            if isinstance(error, FailedError) and await server.healthy():
                raise GuardError(f"{server.url} cannot load the pushed weights: {error}") from error
            self._mark_down(server, error)

    def _mark_down(self, server: Server, error: Exception) -> None:
        if not server.up:  # another request on this server has failed first
            return
        server.up, server.since, server.reason = False, time.time(), str(error)
        if not any(server.up for server in self.servers):
            self._down_since = time.monotonic()
        self.nccl.forget(server.url)  # a restarted server needs a new communicator
        logger.warning("vLLM server %s is unavailable: %s", server.url, error)
        self.spawn(self._recover(server))

    async def _recover(self, server: Server) -> None:
        """Poll a server until it is healthy and holds the current weights."""
        delay = 0.0
        while not server.up and self._failure is None:
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # jitter: many processes poll one server
            try:
                await server.connect()
                await self._ensure_weights(server)
                server.up = True
            except (UnavailableError, TimeoutError) as error:
                server.reason = str(error)
                if not delay:
                    logger.warning("waiting for vLLM server %s: %s", server.url, error)
                delay = min(max(2 * delay, MIN_DELAY), MAX_DELAY)
            except Exception as error:  # no one awaits this task, so `_raise_failure` raises it
                self._failure = error
        async with self._changed:
            self._changed.notify_all()

    async def _ensure_weights(self, server: Server) -> None:
        """Load the current weights on a server that does not hold them."""
        async with server.lock:
            loaded: Weights | None = None
            while loaded is not self.weights:  # new weights may be pushed while these load
                loaded = self.weights
                assert loaded is not None
                async with _loading_lock(loaded, server.url):
                    if not await server.holds(loaded):
                        await self._send(server, loaded)

    async def _send(self, server: Server, weights: Weights) -> None:
        if weights.folder is not None:
            await server.load(weights)
            return
        await server.set_label(LOADING)
        try:
            await asyncio.to_thread(self.nccl.send, server.url)
        except Exception as error:  # TRL raises bare Exception
            raise UnavailableError(f"sending weights over NCCL failed: {error}") from error
        await server.reset_prefix_cache()
        await server.set_label(weights.label)


def _loading_lock(weights: Weights, url: str) -> AbstractAsyncContextManager[object]:
    """Return a lock on loading weights, since several processes of a run may load them at once.

    Weights sent over NCCL need no lock: only the process that pushed them has the tensors.
    """
    if weights.folder is None:
        return nullcontext()
    name = "".join(c if c.isalnum() else "-" for c in url)
    return AsyncFileLock(weights.folder.parent / f"{name}.lock", timeout=LOAD_TIMEOUT)


def describe(servers: Sequence[Server]) -> str:
    """Return one line that lists servers that are down, since when and why."""
    parts = []
    for server in servers:
        since = time.strftime("%H:%M:%S UTC", time.gmtime(server.since))
        parts.append(f"{server.url} since {since} ({server.reason})")
    return f"vLLM servers are down: {'; '.join(parts)}"
