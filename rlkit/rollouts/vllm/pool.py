"""The vLLM servers of a run: which of them are up, which has room, and what to do when one fails.

A server that fails is left out while it is asked, ever more rarely, whether it is back. One that has started
anew has its first weights, and gets the current ones before it is used again.
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
from rlkit.rollouts.vllm.endpoint import LOAD, LOADING, FailedError, Server, UnavailableError
from rlkit.rollouts.vllm.nccl import NCCLSender
from rlkit.rollouts.vllm.weights import Weights

logger = logging.getLogger(__name__)
ATTEMPTS = 5  # of one request, before it is taken for the cause
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds between questions whether a server is back


class Pool:
    """Servers, all of which are to have the same weights. Its coroutines run in one loop.

    Args:
        servers: they belong to this run alone.
        nccl: sends weights that are in no folder.
        patience: seconds to wait while no server is up.
        concurrency: turns that a server is given at a time.

    Attributes:
        weights: what the servers must have; None: what they started with.
    """

    def __init__(self, servers: Sequence[Server], nccl: NCCLSender, patience: float, concurrency: int):
        self.servers, self.nccl = servers, nccl
        self.patience, self.concurrency = patience, concurrency
        self.weights: Weights | None = None
        self._tasks: set[asyncio.Task] = set()
        self._changed = asyncio.Condition()
        self._down_since = time.monotonic()  # when the last server went down
        self._failure: Exception | None = None

    async def start(self) -> None:
        """Wait until all servers are up."""
        for server in self.servers:
            self.spawn(self._recover(server))
        started = time.monotonic()
        while down := [server for server in self.servers if not server.up]:
            self._raise_failure()
            if time.monotonic() - started > self.patience:
                raise UserError(f"{describe(down)}; `rlkit serve` starts one")
            await asyncio.sleep(0.05)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str | None = None) -> None:
        """Run a coroutine beside the others."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self._tasks.discard)

    async def cancel(self, name: str | None = None) -> None:
        """Stop the coroutines of this name, or all."""
        tasks = [task for task in self._tasks if name in (None, task.get_name())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def sample(self, request: Request, sampling: Sampling) -> Sample:
        """Sample a turn with the current weights, by whatever server.

        Raises:
            GuardError: no server was up for `patience` seconds, or the request failed again and again.
            UserError: a server refused the request.
        """
        reason = ""
        for _ in range(ATTEMPTS):
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
        raise GuardError(f"a request failed {ATTEMPTS} times, at last at {reason}")

    async def check(self) -> None:
        """Leave out servers that have died or started anew since they were last used."""
        await asyncio.gather(*(self._check(server) for server in self.servers if server.up))

    async def load(self) -> None:
        """Give the current weights to all servers that are up; wait for one if none is.

        Raises:
            GuardError: a server cannot load them, or none was up for `patience` seconds.
        """
        await asyncio.gather(*(self._load(server) for server in self.servers if server.up))
        (await self._acquire()).busy -= 1

    async def _acquire(self) -> Server:
        """Wait for a server that is up and has room; take the one with the least to do."""
        asked = time.monotonic()
        async with self._changed:
            while True:
                self._raise_failure()
                up = [server for server in self.servers if server.up]
                if free := [server for server in up if server.busy < self.concurrency]:
                    server = min(free, key=lambda server: server.busy)
                    server.busy += 1
                    return server
                left = None if up else self.patience - (time.monotonic() - max(asked, self._down_since))
                if left is not None and left <= 0:
                    raise GuardError(describe(self.servers))
                with suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._changed.wait()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _check(self, server: Server) -> None:
        try:
            if not await server.holds(self.weights):
                raise UnavailableError("it has other weights than it should have")
        except UnavailableError as error:
            self._mark_down(server, error)

    async def _load(self, server: Server) -> None:
        try:
            await self._settle(server)
        except (UnavailableError, TimeoutError) as error:
            if isinstance(error, FailedError) and await server.healthy():
                raise GuardError(f"{server.url} cannot load what was pushed: {error}") from error
            self._mark_down(server, error)

    def _mark_down(self, server: Server, error: Exception) -> None:
        if not server.up:
            return
        server.up, server.since, server.reason = False, time.time(), str(error)
        if not any(other.up for other in self.servers):
            self._down_since = time.monotonic()
        self.nccl.forget(server.url)
        logger.warning("vLLM server %s is left out: %s", server.url, error)
        self.spawn(self._recover(server))

    async def _recover(self, server: Server) -> None:
        """Ask a server until it is back and has the current weights."""
        delay = 0.0
        while not server.up and self._failure is None:
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # many processes do not ask in step
            try:
                await server.connect()
                await self._settle(server)
                server.up = True
            except (UnavailableError, TimeoutError) as error:
                server.reason = str(error)
                if not delay:
                    logger.warning("waiting for vLLM server %s: %s", server.url, error)
                delay = min(max(2 * delay, FIRST_DELAY), LONGEST_DELAY)
            except Exception as error:  # for whoever waits
                self._failure = error
        async with self._changed:
            self._changed.notify_all()

    async def _settle(self, server: Server) -> None:
        """Give a server the current weights, should it not have them."""
        async with server.lock:
            settled: Weights | None = None
            while settled is not self.weights:  # others may be pushed while these load
                settled = self.weights
                assert settled is not None
                async with _one_process(settled, server.url):
                    if not await server.holds(settled):
                        await self._give(server, settled)

    async def _give(self, server: Server, weights: Weights) -> None:
        if weights.folder is not None:
            await server.load(weights)
            return
        await server.set_label(LOADING)
        try:
            await asyncio.to_thread(self.nccl.send, server.url)
        except Exception as error:  # TRL raises plain ones
            raise UnavailableError(f"weights cannot be sent to it: {error}") from error
        await server.forget_prefixes()
        await server.set_label(weights.label)


def _one_process(weights: Weights, url: str) -> AbstractAsyncContextManager[object]:
    """A lock: several processes of a run may find a server in need of weights."""
    if weights.folder is None:
        return nullcontext()
    name = "".join(c if c.isalnum() else "-" for c in url)
    return AsyncFileLock(weights.folder.parent / f"{name}.lock", timeout=LOAD)


def describe(servers: Sequence[Server]) -> str:
    """Which servers are down, since when and why, in one line."""
    times = [time.strftime("%H:%M:%S UTC", time.gmtime(server.since)) for server in servers]
    parts = [f"{s.url} since {t} ({s.reason})" for s, t in zip(servers, times, strict=True)]
    return f"no vLLM server answers: {'; '.join(parts)}"
