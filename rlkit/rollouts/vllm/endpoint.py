"""A client for one vLLM server: sample turns, query its weights, and load other weights.

It relies on these endpoints of vLLM: `/v1/completions` with token ids in and out, `/v1/load_lora_adapter`,
and in development mode `/weight_info`, `/update_weight_version`, `/abort_requests`, `/reset_prefix_cache` and
`/collective_rpc`, which calls the methods of `rlkit.rollouts.vllm.worker`.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import httpx

from rlkit.errors import UserError, first_line
from rlkit.rollouts.types import Request, Sample, Sampling
from rlkit.rollouts.vllm.weights import Weights

UNCHANGED = "default"  # vLLM's label of the weights it was started with
LOADING = "rlkit-loading"  # label while weights are being replaced, which no request accepts
QUICK_TIMEOUT, LOAD_TIMEOUT = 30.0, 1800.0  # seconds to wait for a response


class UnavailableError(Exception):
    """The server is down, failed, or does not hold the current weights. Another server may succeed."""


class FailedError(UnavailableError):
    """The server responded that it failed (5xx or 429)."""


class RejectedError(UserError):
    """The server rejected the request (4xx). Retrying will not help."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Server:
    """A vLLM server.

    Args:
        client: HTTP client that all servers share.
        url: Address of the server, without a path.
        timeout: Maximum number of seconds for one turn, queueing included.

    Attributes:
        up: Whether it is healthy and holds the current weights.
        busy: Number of requests that it is processing.
        since: When it went down, in seconds since the epoch.
        reason: Why it is down.
        model: Name under which it serves the model.
        context: Maximum number of tokens of a prompt and its completion.
        lock: Held while weights are loaded.
    """

    def __init__(self, client: httpx.AsyncClient, url: str, timeout: float):
        self.client, self.url, self.timeout = client, url, timeout
        self.up, self.busy = False, 0
        self.since, self.reason = time.time(), "not contacted yet"
        self.model, self.context = "", 0
        self.lock = asyncio.Lock()

    async def call(
        self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float = QUICK_TIMEOUT
    ) -> Any:
        """POST the body, or GET if it is None; return the parsed JSON, or None if the response has none.

        Raises:
            UnavailableError: There was no response, or the server failed.
            RejectedError: The server rejected the request.
            UserError: The server lacks the endpoint, so `rlkit serve` did not start it.
        """
        key = os.environ.get("VLLM_API_KEY")
        try:
            response = await self.client.request(
                "GET" if body is None else "POST",
                self.url + path,
                json=body,
                headers={"Authorization": f"Bearer {key}"} if key else None,
                timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            )
        except httpx.TransportError as error:
            raise UnavailableError(f"{path}: {type(error).__name__} {error}".strip()) from error
        if response.status_code >= 500 or response.status_code == 429:  # 429 is overload, which passes
            raise FailedError(f"{path}: {_message(response)}")
        if response.status_code == 404 and not path.startswith("/v1/"):
            raise UserError(f"{self.url} has no endpoint {path}: start the server with `rlkit serve`")
        if response.is_error:
            raise RejectedError(response.status_code, f"{self.url} rejected {path}: {_message(response)}")
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.json() if is_json and response.content else None

    async def connect(self) -> None:
        """Check that the server is healthy, and read the model's name and context length."""
        await self.call("/health")
        card = (await self.call("/v1/models"))["data"][0]
        self.model, self.context = card["id"], card["max_model_len"]

    async def healthy(self) -> bool:
        """Return whether the health check succeeds."""
        try:
            await self.call("/health")
        except UnavailableError:
            return False
        return True

    async def holds(self, weights: Weights | None) -> bool:
        """Return whether the server holds these weights; None stands for its initial weights."""
        if weights is not None and weights.adapter:
            models = await self.call("/v1/models")
            return weights.label in [card["id"] for card in models["data"]]
        return await self._label() == (UNCHANGED if weights is None else weights.label)

    async def load(self, weights: Weights) -> None:
        """Load weights from a folder. Requests that are still running are aborted."""
        if weights.adapter:
            await self._load_adapter(weights)
            return
        # From here on no sample is attributed to the old weights, even if loading fails halfway.
        await self.set_label(LOADING)
        await self.call("/abort_requests", {})
        reload = {"method": "rlkit_load", "kwargs": {"folder": str(weights.folder)}}
        await self.call("/collective_rpc", reload, timeout=LOAD_TIMEOUT)
        await self.reset_prefix_cache()
        await self.set_label(weights.label)

    async def reset_prefix_cache(self) -> None:
        """Drop the cached prefixes, which were computed with other weights.

        Raises:
            UnavailableError: The cache cannot be reset, since other clients' requests are running.
        """
        for _ in range(50):
            if (await self.call("/reset_prefix_cache", {}))["success"]:
                return
            await asyncio.sleep(0.2)  # aborted requests hold their cache blocks for a moment
        raise UnavailableError("its prefix cache cannot be reset while another client's requests are running")

    async def set_label(self, label: str) -> None:
        """Set the label of the server's weights."""
        await self.call("/update_weight_version", {"new_version": label})

    async def sample(self, request: Request, sampling: Sampling, weights: Weights | None) -> Sample:
        """Sample one turn with these weights.

        Raises:
            UnavailableError: There is no sample, or it was sampled with other weights.
            RejectedError: The request is invalid, e.g. longer than the context.
        """
        model = weights.label if weights is not None and weights.adapter else self.model
        try:
            completion = await self.call(
                "/v1/completions",
                {"model": model, **request_body(request, sampling)},
                timeout=self.timeout,
            )
        except RejectedError as error:
            if error.status == 404:  # the server has restarted, so the adapter is gone
                raise UnavailableError(str(error)) from error
            raise
        choice = completion["choices"][0]
        log_probs = choice["logprobs"]["token_logprobs"]
        sample = as_sample(choice["token_ids"], log_probs, choice["finish_reason"], choice["stop_reason"])
        # Checked after sampling: the server may have restarted in the meantime, with its initial weights.
        if not await self.holds(weights):
            raise UnavailableError("it does not hold the current weights")
        return sample

    async def _label(self) -> str:
        return (await self.call("/weight_info"))["weight_version"]

    async def _load_adapter(self, weights: Weights) -> None:
        if await self._label() != UNCHANGED:
            raise UnavailableError("an adapter requires the server's initial weights: restart the server")
        loaded = [card["id"] for card in (await self.call("/v1/models"))["data"] if card.get("parent")]
        # Each version gets a new name, because vLLM caches prefixes per adapter name.
        names = {"lora_name": weights.label, "lora_path": str(weights.folder)}
        try:
            await self.call("/v1/load_lora_adapter", names, timeout=LOAD_TIMEOUT)
            # Unload only now: if loading fails, the server still has the old adapter.
            for name in loaded:
                await self.call("/v1/unload_lora_adapter", {"lora_name": name})
        except RejectedError as error:
            if error.status == 404:
                hint = "start the server with `rlkit serve --lora_rank N`, with N at least the adapter's rank"
                raise UserError(f"{error}: {hint}") from error
            raise


def request_body(request: Request, sampling: Sampling) -> dict[str, Any]:
    """Return the JSON body of `/v1/completions` for a request, without the model's name."""
    return {"prompt": list(request.ids), "return_token_ids": True, **sampling_params(request, sampling)}


def sampling_params(request: Request, sampling: Sampling) -> dict[str, Any]:
    """Return the arguments of vLLM's `SamplingParams` for a request."""
    return {
        "max_tokens": request.limit,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "stop": list(sampling.stop),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # a stop string may be a special token
        "stop_token_ids": list(sampling.eos_token_ids),
        "ignore_eos": True,  # only `stop_token_ids` count, not the model's own EOS tokens
        "logprobs": 0,  # the sampled token's only
        **sampling.extra,
    }


def as_sample(
    ids: Sequence[int], log_probs: Iterable[float | None], finish_reason: str | None, stop: str | int | None
) -> Sample:
    """Convert an output of vLLM to a sample. A missing log-probability becomes NaN, as in TRL.

    Args:
        ids: Sampled token ids.
        log_probs: Log-probability of each token, or None where vLLM could not compute it.
        finish_reason: vLLM's `finish_reason`.
        stop: vLLM's `stop_reason`: the stop string, or the id of the EOS token.

    Raises:
        UnavailableError: The request was aborted.
    """
    if finish_reason not in ("stop", "length"):
        raise UnavailableError(f"a request ended with finish_reason {finish_reason!r}")
    reason: Literal["eos", "stop", "length"] = "stop" if isinstance(stop, str) else "eos"
    if finish_reason == "length":
        reason = "length"
    values = [math.nan if value is None else value for value in log_probs]
    return Sample(list(ids), values, reason)


def server_settings(url: str) -> dict[str, Any]:
    """Return the vLLM settings with which the server at this address was started.

    Raises:
        UserError: The server does not report its settings.
    """
    try:
        response = httpx.get(
            f"{url}/server_info", params={"config_format": "json"}, trust_env=False, timeout=QUICK_TIMEOUT
        )
        return response.raise_for_status().json()["vllm_config"]
    except httpx.HTTPError as error:
        raise UserError(
            f"{url} does not report its settings ({error}): start the server with `rlkit serve`"
        ) from error


def _message(response: httpx.Response) -> str:
    try:
        text = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = response.text
    return f"{response.status_code} {first_line(str(text))[:300]}".strip()
