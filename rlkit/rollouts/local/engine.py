"""An engine on transformers' `generate`, in the trainer's process. It needs no extra installation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import GenerationConfig, StopStringCriteria

from rlkit.rollouts.local.generate import generate
from rlkit.rollouts.local.sampling import draw
from rlkit.rollouts.types import Request, Sample, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TransformersEngine:
    """Samples all submitted turns in one batch, or in batches of `batch_size`.

    Args:
        model: Causal language model, without a DDP or FSDP wrapper.
        tokenizer: Tokenizer of the model, for padding and for stop strings.
        batch_size: Maximum number of turns per batch; turns of similar length share a batch. None: no limit.
    """

    context: int | None = None  # rotary embeddings set no hard limit, so the user decides

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int | None = None
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._pending: list[Request] = []
        self._sampling: Sampling | None = None
        self._cached_stop: tuple[tuple[str, ...], StopStringCriteria] | None = None

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Queue requests. The settings apply to all requests of the next `collect`."""
        self._pending += requests
        self._sampling = sampling

    def collect(self, *, wait: bool) -> list[tuple[int, Sample]]:
        """Sample all submitted turns, whether or not `wait` is set."""
        # Batches of similar length need less padding. The index makes the order deterministic.
        requests = sorted(self._pending, key=lambda request: (len(request.ids), request.local_index))
        self._pending = []
        size = self.batch_size or max(len(requests), 1)
        finished: list[tuple[int, Sample]] = []
        for start in range(0, len(requests), size):
            finished += self._sample(requests[start : start + size])
        return finished

    def _sample(self, requests: Sequence[Request]) -> list[tuple[int, Sample]]:
        sampling = self._sampling
        assert sampling is not None
        limits = [request.limit for request in requests]
        outputs = generate(
            self.model,
            [request.ids for request in requests],
            generation_config(sampling, max(limits), self.tokenizer.pad_token_id),
            self.model.device,
            None if sampling.key is None else random_numbers(sampling.key, requests),
            limits=limits,
            stop=self._stop_criteria(sampling.stop),
        )
        return [
            (request.local_index, Sample(ids, None, self._finish_reason(ids, request.limit, sampling)))
            for request, ids in zip(requests, outputs, strict=True)
        ]

    def _stop_criteria(self, stop: tuple[str, ...]) -> StopStringCriteria | None:
        if not stop:
            return None
        # Cached, since building the criteria goes through the whole vocabulary.
        if self._cached_stop is None or self._cached_stop[0] != stop:
            self._cached_stop = stop, StopStringCriteria(self.tokenizer, list(stop))
        return self._cached_stop[1]

    def _finish_reason(
        self, ids: list[int], limit: int, sampling: Sampling
    ) -> Literal["eos", "stop", "length"]:
        if ids[-1] in sampling.eos_token_ids:
            return "eos"
        # Only a stop string ends a turn before its limit. At the limit, search the text for one.
        if len(ids) < limit:
            return "stop"
        text = self.tokenizer.decode(ids)
        return "stop" if any(string in text for string in sampling.stop) else "length"


def generation_config(sampling: Sampling, limit: int, pad_token_id: int) -> GenerationConfig:
    """Convert sampling settings to a transformers config with `limit` as `max_new_tokens`.

    `generate` takes unset settings from the model's own generation config; Qwen2.5's, for example, has a
    repetition penalty. So every setting of `Sampling` is set here.
    """
    is_greedy = sampling.temperature == 0
    settings: dict[str, Any] = {
        "max_new_tokens": limit,
        "do_sample": not is_greedy,
        "repetition_penalty": sampling.repetition_penalty,
        "eos_token_id": list(sampling.eos_token_ids),
        "pad_token_id": pad_token_id,
    }
    if not is_greedy:
        settings |= {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
        }
    return GenerationConfig(**(settings | dict(sampling.extra)))


def random_numbers(key: Sequence[int], requests: Sequence[Request]) -> torch.Tensor:
    """Return the random numbers (B, T) of the requests.

    A rollout has one sequence of random numbers, and each turn continues where the previous one ended.
    """
    width = max(request.limit for request in requests)
    total = max(request.start for request in requests) + width
    table = draw(key, [request.global_index for request in requests], total)
    return torch.stack(
        [row[request.start : request.start + width] for request, row in zip(requests, table, strict=True)]
    )
