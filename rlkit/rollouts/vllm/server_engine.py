"""An engine on one or more vLLM servers, on this machine or others, that may fail and restart at any time.

An event loop in a separate thread makes the requests. Each turn is a request of its own, so no turn waits for
another. The requests of a server that fails are retried on the other servers. A sample is accepted only if
its server still held the pushed weights when the sample was finished (`rlkit.rollouts.vllm.endpoint`).
`rlkit.rollouts.vllm.pool` tracks which servers are up.
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

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
POLL_INTERVAL = 0.01  # seconds

T = TypeVar("T")


class ServerEngine:
    """Samples turns on vLLM servers, which `rlkit serve` starts.

    Args:
        urls: Addresses of the servers, e.g. http://127.0.0.1:8000. No other run may use the same servers.
        weights_dir: Directory for pushed weights, which servers on other machines must see under the same
            path. None uses shared memory or the temporary directory, for servers on this machine.
        retry_timeout: Seconds to wait while all servers are down, and at the start until all of them are up.
        timeout: Maximum number of seconds for one turn.
        concurrency: Maximum number of concurrent requests to one server. vLLM queues those that do not fit.

    Attributes:
        pushed_bytes: Size of the last push in bytes.
        push_seconds: Duration of the last push.

    Raises:
        UserError: An address is invalid, or a server is not up within `retry_timeout` seconds.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        weights_dir: str | Path | None = None,
        retry_timeout: float = 600.0,
        timeout: float = 1800.0,
        concurrency: int = 256,
    ):
        self.urls = check_urls(urls)
        self.pushed_bytes, self.push_seconds = 0, 0.0
        self._weights_dir = weights_dir
        self._folder: WeightsFolder | None = None
        self._num_outstanding = 0
        self._finished: queue.SimpleQueue[tuple[int, Sample] | Exception] = queue.SimpleQueue()
        self._client = _client()
        servers = [Server(self._client, url, timeout) for url in self.urls]
        self._pool = Pool(servers, NCCLSender(), retry_timeout, concurrency)
        self._loop = asyncio.new_event_loop()
        # A daemon thread, so that Ctrl-C does not wait for running requests.
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
        """Maximum number of tokens of a rollout, the prompt included: the smallest of all servers."""
        return min(server.context for server in self._pool.servers)

    @property
    def version(self) -> str:
        """Label of the servers' weights: the pushed version with a unique suffix."""
        return UNCHANGED if self.weights is None else self.weights.label

    @property
    def weights(self) -> Weights | None:
        """Weights that the servers must hold. None: their initial weights.

        If several processes sample, one pushes, and the others set this property to its value there.
        """
        return self._pool.weights

    @weights.setter
    def weights(self, weights: Weights | None) -> None:
        self._assert_idle()
        self._pool.weights = weights

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Send requests to the servers. Before the first of a batch, check which servers have restarted."""
        if not self._num_outstanding:
            self._run(self._pool.check())
        self._num_outstanding += len(requests)
        self._run(self._spawn_requests(requests, sampling))

    def collect(self, *, wait: bool) -> list[tuple[int, Sample]]:
        """Return the finished turns; without `wait`, block for `POLL_INTERVAL` seconds at most.

        Raises:
            GuardError: All servers were down for `retry_timeout` seconds, or a request failed repeatedly.
            UserError: A server rejected a request.
        """
        # Without `wait` the caller polls in a loop, so a short timeout avoids busy waiting.
        timeout: float | None = None if wait else POLL_INTERVAL
        finished: list[tuple[int, Sample]] = []
        while self._num_outstanding:
            try:
                item = self._finished.get(timeout=timeout)
            except queue.Empty:
                break
            if isinstance(item, Exception):
                self._run(self._drop_requests())
                raise item
            self._num_outstanding -= 1
            finished.append(item)
            timeout = 0
        return finished

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: str) -> None:
        """Load weights on all servers. No request may be outstanding.

        Args:
            named_tensors: Tensors with their names in the checkpoint; one of each set of tied weights.
            version: Name of the weights, e.g. the step.

        Raises:
            UserError: There is no room for the weights, or servers on other machines share no directory.
            GuardError: No server could load the weights within `retry_timeout` seconds.
        """
        self._assert_idle()
        started = time.monotonic()
        if self._pool.nccl.reaches(self.urls):
            label = f"{version}-{time.time_ns():x}"  # unique: a server may hold another run's weights
            weights, size = self._pool.nccl.prepare(named_tensors, label)
        else:
            weights, size = self._open_folder().write(named_tensors, version)
        self._load(weights, size, started)

    def push_adapter(self, folder: str | Path, version: str) -> None:
        """Load a LoRA adapter on all servers, on top of their initial weights. No request may be outstanding.

        Args:
            folder: Directory written by peft's `save_pretrained`; it is copied.
            version: Name of the adapter, e.g. the step.

        Raises:
            UserError: As in `push`, or a server does not accept adapters, or not of this rank.
            GuardError: As in `push`.
        """
        self._assert_idle()
        started = time.monotonic()
        weights, size = self._open_folder().copy_adapter(folder, version)
        self._load(weights, size, started)

    def close(self) -> None:
        """Disconnect from the servers and delete pushed weights. The servers keep running."""
        atexit.unregister(self.close)
        if self._thread.is_alive():
            self._run(self._stop())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        if self._folder is not None:
            self._folder.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _assert_idle(self) -> None:
        assert not self._num_outstanding, (
            f"{self._num_outstanding} requests are outstanding: push between batches"
        )

    def _open_folder(self) -> WeightsFolder:
        if self._folder is None:
            parents = [Path("/dev/shm"), Path(tempfile.gettempdir())]
            if self._weights_dir is not None:
                parents = [Path(self._weights_dir).absolute()]
                parents[0].mkdir(parents=True, exist_ok=True)
            elif remote := [url for url in self.urls if urlsplit(url).hostname not in LOCAL_HOSTS]:
                raise UserError(
                    "servers on other machines need a shared directory for weights: set weights_dir for "
                    + ", ".join(remote)
                )
            self._folder = WeightsFolder(parents)
        return self._folder

    def _load(self, weights: Weights, size: int, started: float) -> None:
        old, self.weights = self.weights, weights
        self._run(self._pool.load())
        # Only now can the old folder go: until then a restarting server may be reading it.
        if old is not None and self._folder is not None:
            self._folder.remove(old)
        self.pushed_bytes, self.push_seconds = size, time.monotonic() - started

    # The methods below run in the event loop's thread.

    async def _spawn_requests(self, requests: Sequence[Request], sampling: Sampling) -> None:
        for request in requests:
            self._pool.spawn(self._sample(request, sampling), name="request")

    async def _sample(self, request: Request, sampling: Sampling) -> None:
        try:
            self._finished.put((request.local_index, await self._pool.sample(request, sampling)))
        except Exception as error:
            self._finished.put(error)

    async def _drop_requests(self) -> None:
        """Cancel all outstanding requests, since the batch has failed."""
        await self._pool.cancel("request")
        self._num_outstanding, self._finished = 0, queue.SimpleQueue()

    async def _stop(self) -> None:
        await self._pool.cancel()
        for url in self.urls:
            self._pool.nccl.forget(url)
        await self._client.aclose()


def check_urls(urls: Sequence[str]) -> list[str]:
    """Validate server addresses; return them without a trailing slash.

    Raises:
        UserError: An address is invalid or has a path, or two are equal, or there are none.
    """
    if not urls:
        raise UserError("no vLLM server given: expected a URL, e.g. http://127.0.0.1:8000")
    stripped = [url.rstrip("/") for url in urls]
    for url in stripped:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not _is_valid_port(parts):
            raise UserError(f"invalid server address {url!r}: expected a URL, e.g. http://127.0.0.1:8000")
        if parts.path or parts.query:
            raise UserError(
                f"server address {url!r} must not contain a path: use {parts.scheme}://{parts.netloc}"
            )
    if len(set(stripped)) < len(stripped):
        raise UserError(f"duplicate vLLM server in {', '.join(stripped)}")
    return stripped


def _is_valid_port(parts: SplitResult) -> bool:
    try:  # `port` raises ValueError for a port that is not a number or out of range
        return parts.port is None or parts.port > 0
    except ValueError:
        return False


def _client() -> httpx.AsyncClient:
    # A request can be silent for minutes while it queues. Keepalive probes detect a machine that is gone. Not
    # every platform has these options.
    probes = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}
    options = [
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in probes.items()
        if hasattr(socket, name)
    ]
    transport = httpx.AsyncHTTPTransport(
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        socket_options=[(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *options],
        trust_env=False,  # ignore HTTP_PROXY: the servers are on the local network
    )
    return httpx.AsyncClient(transport=transport, trust_env=False)
