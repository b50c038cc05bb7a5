"""One vLLM server over HTTP: sample a turn, ask which weights it has, give it others.

The seams of vLLM that this stands on: `/v1/completions` with token ids in and out, `/v1/load_lora_adapter`,
and of its development mode `/weight_info`, `/update_weight_version`, `/abort_requests`, `/reset_prefix_cache`
and `/collective_rpc`, by which `rlkit.rollouts.vllm.worker` is reached.
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

UNCHANGED = "default"  # what vLLM calls the weights it started with
LOADING = "rlkit-loading"
QUICK, LOAD = 30.0, 1800.0  # seconds for an answer


class UnavailableError(Exception):
    """A server did not answer, failed, or has not the weights it should have."""


class FailedError(UnavailableError):
    """A server answered that it failed."""


class RejectedError(UserError):
    """A server takes a request for wrong; it would again."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Server:
    """A vLLM server.

    Args:
        client: makes the requests.
        url: its address, without a path.
        timeout: seconds that a turn may take, with the time it queues.

    Attributes:
        up: it answers and has the current weights.
        busy: requests that it is answering.
        since: when it went down, seconds since the epoch.
        reason: why.
        context: most tokens of a prompt and its completion.
    """

    def __init__(self, client: httpx.AsyncClient, url: str, timeout: float):
        self.client, self.url, self.timeout = client, url, timeout
        self.up, self.busy = False, 0
        self.since, self.reason = time.time(), "not asked yet"
        self.model, self.context = "", 0
        self.lock = asyncio.Lock()  # one load at a time

    async def call(self, path: str, body: Mapping[str, Any] | None = None, *, seconds: float = QUICK) -> Any:
        """POST the body, or GET where there is none; return what is answered, as JSON if it is.

        Raises:
            UnavailableError: no answer, or a fault of the server's own.
            RejectedError: the request is wrong.
        """
        key = os.environ.get("VLLM_API_KEY")
        try:
            response = await self.client.request(
                "GET" if body is None else "POST",
                self.url + path,
                json=body,
                headers={"Authorization": f"Bearer {key}"} if key else None,
                timeout=httpx.Timeout(seconds, connect=min(seconds, 10.0)),
            )
        except httpx.TransportError as error:
            raise UnavailableError(f"{path}: {type(error).__name__} {error}".strip()) from error
        if response.status_code >= 500 or response.status_code == 429:
            raise FailedError(f"{path}: {_message(response)}")
        if response.status_code == 404 and not path.startswith("/v1/"):
            raise UserError(f"{self.url} has no {path}: start it with `rlkit serve`")
        if response.is_error:
            raise RejectedError(response.status_code, f"{self.url} refused {path}: {_message(response)}")
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.json() if is_json and response.content else None

    async def connect(self) -> None:
        """Ask what it serves."""
        await self.call("/health")
        card = (await self.call("/v1/models"))["data"][0]
        self.model, self.context = card["id"], card["max_model_len"]

    async def healthy(self) -> bool:
        """Whether it says that it is well."""
        try:
            await self.call("/health")
        except UnavailableError:
            return False
        return True

    async def holds(self, weights: Weights | None) -> bool:
        """Whether it has these weights; None: those it started with."""
        if weights is not None and weights.adapter:
            models = await self.call("/v1/models")
            return weights.label in [card["id"] for card in models["data"]]
        return await self._label() == (UNCHANGED if weights is None else weights.label)

    async def load(self, weights: Weights) -> None:
        """Give it weights of a folder; what it is still sampling is cut off."""
        if weights.adapter:
            await self._load_adapter(weights)
            return
        # From here on no sample counts as taken under the weights it had, even if the loading stops midway.
        await self.set_label(LOADING)
        await self.call("/abort_requests", {})
        reload = {"method": "rlkit_load", "kwargs": {"folder": str(weights.folder)}}
        await self.call("/collective_rpc", reload, seconds=LOAD)
        await self.forget_prefixes()
        await self.set_label(weights.label)

    async def forget_prefixes(self) -> None:
        """Make it drop the prefixes that it computed with other weights."""
        for _ in range(50):
            if (await self.call("/reset_prefix_cache", {}))["success"]:
                return
            await asyncio.sleep(0.2)  # requests that were cut off still hold blocks
        raise UnavailableError("its prefix cache cannot be reset: somebody else's requests are running")

    async def set_label(self, label: str) -> None:
        """Tell it what its weights are called."""
        await self.call("/update_weight_version", {"new_version": label})

    async def sample(self, request: Request, sampling: Sampling, weights: Weights | None) -> Sample:
        """Sample one turn with these weights.

        Raises:
            UnavailableError: no sample, or one that was taken with other weights.
            RejectedError: the request is wrong, e.g. longer than the context.
        """
        model = weights.label if weights is not None and weights.adapter else self.model
        try:
            answer = await self.call(
                "/v1/completions", {"model": model, **body(request, sampling)}, seconds=self.timeout
            )
        except RejectedError as error:
            if error.status == 404:  # the adapter is gone: it started anew
                raise UnavailableError(str(error)) from error
            raise
        choice = answer["choices"][0]
        log_probs = choice["logprobs"]["token_logprobs"]
        sample = as_sample(choice["token_ids"], log_probs, choice["finish_reason"], choice["stop_reason"])
        if not await self.holds(weights):
            raise UnavailableError("it has other weights than it should have")
        return sample

    async def _label(self) -> str:
        return (await self.call("/weight_info"))["weight_version"]

    async def _load_adapter(self, weights: Weights) -> None:
        if await self._label() != UNCHANGED:
            raise UnavailableError(
                "an adapter needs the weights it started with, and it has others: restart it"
            )
        loaded = [card["id"] for card in (await self.call("/v1/models"))["data"] if card.get("parent")]
        # A name of its own for each version: cached prefixes belong to a name.
        names = {"lora_name": weights.label, "lora_path": str(weights.folder)}
        try:
            await self.call("/v1/load_lora_adapter", names, seconds=LOAD)
            for name in loaded:
                await self.call("/v1/unload_lora_adapter", {"lora_name": name})
        except RejectedError as error:
            if error.status == 404:
                hint = "start it with `rlkit serve --lora_rank N`, N at least the adapter's"
                raise UserError(f"{error}: {hint}") from error
            raise


def body(request: Request, sampling: Sampling) -> dict[str, Any]:
    """A request in the words of `/v1/completions`."""
    return {"prompt": list(request.ids), "return_token_ids": True, **settings_of(request, sampling)}


def settings_of(request: Request, sampling: Sampling) -> dict[str, Any]:
    """How to sample a request, in vLLM's words."""
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
        "stop_token_ids": list(sampling.ends),
        "ignore_eos": True,  # these ends and no others of the model's
        "logprobs": 0,  # of the sampled token
        **sampling.further,
    }


def as_sample(
    ids: Sequence[int], log_probs: Iterable[float | None], finish: str | None, stop: str | int | None
) -> Sample:
    """A sample from vLLM's words. A log-probability that it could not compute is NaN, as TRL expects it.

    Args:
        ids: the tokens.
        log_probs: of each.
        finish: vLLM's `finish_reason`.
        stop: its `stop_reason`: the string that ended the turn, or the id of an end token.

    Raises:
        UnavailableError: it was cut off.
    """
    if finish not in ("stop", "length"):
        raise UnavailableError(f"a request ended by {finish!r}")
    ended: Literal["end", "stop"] = "stop" if isinstance(stop, str) else "end"
    known = [math.nan if value is None else value for value in log_probs]
    return Sample(list(ids), known, "length" if finish == "length" else ended)


def started_with(url: str) -> dict[str, Any]:
    """The settings of vLLM at this address.

    Raises:
        UserError: it does not tell them.
    """
    try:
        answer = httpx.get(
            f"{url}/server_info", params={"config_format": "json"}, trust_env=False, timeout=QUICK
        )
        return answer.raise_for_status().json()["vllm_config"]
    except httpx.HTTPError as error:
        raise UserError(f"{url} does not tell its settings ({error}): start it with `rlkit serve`") from error


def _message(response: httpx.Response) -> str:
    try:
        text = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = response.text
    return f"{response.status_code} {first_line(str(text))[:300]}".strip()
