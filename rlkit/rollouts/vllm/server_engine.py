"""The engine for vLLM as a server: one or several, on this machine or others, that may die and come back.

A loop in a thread of its own makes the requests; each turn is one, so none waits for another. What a server
was sampling when it failed goes to the others. A sample counts only if its server had the pushed weights when
the sample was done (`rlkit.rollouts.vllm.endpoint`); servers come and go in `rlkit.rollouts.vllm.pool`.
"""

from __future__ import annotations

import asyncio
import atexit
import queue
import socket
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import httpx
import torch

from rlkit.errors import UserError
from rlkit.rollouts.types import Request, Sample, Sampling
from rlkit.rollouts.vllm.endpoint import UNCHANGED, Server
from rlkit.rollouts.vllm.nccl import NCCLSender
from rlkit.rollouts.vllm.pool import Pool
from rlkit.rollouts.vllm.weights import Weights, WeightsFolder

LOCAL = ("localhost", "127.0.0.1", "::1")
MOMENT = 0.01  # seconds

T = TypeVar("T")


class ServerEngine:
    """Samples turns with vLLM servers; `rlkit serve` starts one.

    Args:
        urls: their addresses, e.g. http://127.0.0.1:8000. They belong to this run alone.
        weights_dir: folder for pushed weights; servers on other machines must see it under the same path.
            None: memory or the temporary folder, for servers on this machine.
        patience: seconds to wait while no server is up; at the start, until all are.
        timeout: seconds that one turn may take.
        concurrency: turns that a server is given at a time; vLLM itself queues what it has no room for.

    Attributes:
        pushed_bytes: size of the last push.
        push_seconds: what it took.

    Raises:
        UserError: a wrong address, or a server that is not up within `patience`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        weights_dir: str | Path | None = None,
        patience: float = 600.0,
        timeout: float = 1800.0,
        concurrency: int = 256,
    ):
        self.urls = check_urls(urls)
        self.pushed_bytes, self.push_seconds = 0, 0.0
        self._weights_dir = weights_dir
        self._folder: WeightsFolder | None = None
        self._outstanding = 0
        self._finished: queue.SimpleQueue[tuple[int, Sample] | Exception] = queue.SimpleQueue()
        self._client = _client()
        servers = [Server(self._client, url, timeout) for url in self.urls]
        self._pool = Pool(servers, NCCLSender(), patience, concurrency)
        self._loop = asyncio.new_event_loop()
        # Daemon: Ctrl-C does not wait for what is being sampled.
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-servers", daemon=True)
        self._thread.start()
        atexit.register(self.close)
        try:
            self._run(self._pool.start())
        except BaseException:
            self.close()
            raise

    @property
    def context(self) -> int | None:
        """Most tokens of a rollout with its prompt."""
        return min(server.context for server in self._pool.servers)

    @property
    def version(self) -> str:
        """What the servers call the weights they have: the pushed version and a part of its own."""
        return UNCHANGED if self.weights is None else self.weights.label

    @property
    def weights(self) -> Weights | None:
        """Those that the servers must have; None: those they started with.

        Where several processes sample, one pushes and the others set this to what it has here.
        """
        return self._pool.weights

    @weights.setter
    def weights(self, weights: Weights | None) -> None:
        self._assert_idle()
        self._pool.weights = weights

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Send requests."""
        if not self._outstanding:
            self._run(self._pool.check())
        self._outstanding += len(requests)
        self._run(self._take(requests, sampling))

    def collect(self, *, wait: bool) -> list[tuple[int, Sample]]:
        """Return the finished; without `wait` after a moment at most.

        Raises:
            GuardError: no server was up for `patience` seconds, or a request failed everywhere.
            UserError: a server refused a request.
        """
        finished: list[tuple[int, Sample]] = []
        while self._outstanding:
            try:
                # A caller with other work comes back at once: a moment spares it the spinning.
                item = self._finished.get(timeout=0 if finished else None if wait else MOMENT)
            except queue.Empty:
                break
            if isinstance(item, Exception):
                self._run(self._drop())
                raise item
            self._outstanding -= 1
            finished.append(item)
        return finished

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: str) -> None:
        """Give all servers weights. Nothing may be being sampled.

        Args:
            named_tensors: under the checkpoint's names; of tied ones one is enough.
            version: what they are called, e.g. the step.

        Raises:
            UserError: there is no room for them, or servers elsewhere do not share a folder.
            GuardError: no server could load them within `patience` seconds.
        """
        self._assert_idle()
        started = time.monotonic()
        if self._pool.nccl.reaches(self.urls):
            label = f"{version}-{time.time_ns():x}"
            self._spread(*self._pool.nccl.prepare(named_tensors, label), started)
        else:
            self._spread(*self._store().write(named_tensors, version), started)

    def push_adapter(self, folder: str | Path, version: str) -> None:
        """Give all servers a LoRA adapter, over the weights they started with. Nothing may be being sampled.

        Args:
            folder: written by peft's `save_pretrained`; it is copied.
            version: what it is called.

        Raises:
            UserError: as `push`, or a server takes no adapters, or none of this rank.
            GuardError: as `push`.
        """
        self._assert_idle()
        started = time.monotonic()
        self._spread(*self._store().copy_adapter(folder, version), started)

    def close(self) -> None:
        """Let go of the servers and delete pushed weights."""
        atexit.unregister(self.close)
        if self._thread.is_alive():
            self._run(self._stop())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        if self._folder is not None:
            self._folder.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _assert_idle(self) -> None:
        assert not self._outstanding, f"{self._outstanding} turns are being sampled: push between batches"

    def _store(self) -> WeightsFolder:
        if self._folder is None:
            parents = [Path("/dev/shm"), Path(tempfile.gettempdir())]
            if self._weights_dir is not None:
                parents = [Path(self._weights_dir).absolute()]
                parents[0].mkdir(parents=True, exist_ok=True)
            elif far := [url for url in self.urls if urlsplit(url).hostname not in LOCAL]:
                raise UserError(f"{', '.join(far)}: servers on other machines need a folder that they share")
            self._folder = WeightsFolder(parents)
        return self._folder

    def _spread(self, weights: Weights, size: int, started: float) -> None:
        old, self.weights = self.weights, weights
        self._run(self._pool.load())
        if old is not None and self._folder is not None:
            self._folder.remove(old)
        self.pushed_bytes, self.push_seconds = size, time.monotonic() - started

    # The rest runs in the loop's thread.

    async def _take(self, requests: Sequence[Request], sampling: Sampling) -> None:
        for request in requests:
            self._pool.spawn(self._carry(request, sampling), name="request")

    async def _carry(self, request: Request, sampling: Sampling) -> None:
        try:
            self._finished.put((request.row, await self._pool.sample(request, sampling)))
        except Exception as error:
            self._finished.put(error)

    async def _drop(self) -> None:
        """Forget all requests: the batch has failed."""
        await self._pool.cancel("request")
        self._outstanding, self._finished = 0, queue.SimpleQueue()

    async def _stop(self) -> None:
        await self._pool.cancel()
        for url in self.urls:
            self._pool.nccl.forget(url)
        await self._client.aclose()


def check_urls(urls: Sequence[str]) -> list[str]:
    """Return addresses without a slash at their end; raises UserError for what is none."""
    if not urls:
        raise UserError("no vLLM server is named, e.g. http://127.0.0.1:8000")
    plain = [url.rstrip("/") for url in urls]
    for url in plain:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not _has_port(parts):
            raise UserError(f"{url!r} is no address of a server, e.g. http://127.0.0.1:8000")
        if parts.path or parts.query:
            raise UserError(f"{url!r}: give the address alone, {parts.scheme}://{parts.netloc}")
    if len(set(plain)) < len(plain):
        raise UserError(f"a server is named twice: {', '.join(plain)}")
    return plain


def _has_port(parts: SplitResult) -> bool:
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False


def _client() -> httpx.AsyncClient:
    # TCP asks in silence whether the other machine is still there, where the platform can be told when.
    probes = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}
    options = [
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in probes.items()
        if hasattr(socket, name)
    ]
    transport = httpx.AsyncHTTPTransport(
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        socket_options=[(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *options],
        trust_env=False,  # a proxy for the outer world is none for these
    )
    return httpx.AsyncClient(transport=transport, trust_env=False)
