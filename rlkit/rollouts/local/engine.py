"""The engine that every machine has: transformers' `generate`, in the trainer's process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from transformers import GenerationConfig, StopStringCriteria

from rlkit.rollouts.local.generate import generate
from rlkit.rollouts.local.sampling import draw
from rlkit.rollouts.types import Request, Sample, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TransformersEngine:
    """Samples all submitted turns at once, or `batch_size` at a time.

    Args:
        model: a causal language model, not wrapped.
        tokenizer: for padding and to find stop strings.
        batch_size: turns at a time, like lengths together; None: all.
    """

    context: int | None = None  # rotary positions go on; quality is the user's matter

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int | None = None
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._waiting: list[Request] = []
        self._sampling: Sampling | None = None
        self._stop: tuple[tuple[str, ...], StopStringCriteria] | None = None

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Take requests."""
        self._waiting += requests
        self._sampling = sampling

    def collect(self, *, wait: bool) -> list[tuple[int, Sample]]:
        """Sample everything that was submitted; it is never left for later, whatever `wait` says."""
        requests, self._waiting = sorted(self._waiting, key=lambda r: (len(r.ids), r.row)), []
        size = self.batch_size or max(len(requests), 1)
        batches = [requests[i : i + size] for i in range(0, len(requests), size)]
        return [finished for batch in batches for finished in self._sample(batch)]

    def _sample(self, requests: Sequence[Request]) -> list[tuple[int, Sample]]:
        sampling = self._sampling
        assert sampling is not None
        limits = [request.limit for request in requests]
        outputs = generate(
            self.model,
            [request.ids for request in requests],
            generation_config(sampling, max(limits), self.tokenizer.pad_token_id),
            self.model.device,
            None if sampling.key is None else numbers(sampling.key, requests),
            limits=limits,
            stop=self._criteria(sampling.stop),
        )
        return [
            (request.row, Sample(ids, None, self._finish(ids, request.limit, sampling)))
            for request, ids in zip(requests, outputs, strict=True)
        ]

    def _criteria(self, stop: tuple[str, ...]) -> StopStringCriteria | None:
        if stop and (self._stop is None or self._stop[0] != stop):  # it looks at the whole vocabulary
            self._stop = stop, StopStringCriteria(self.tokenizer, list(stop))
        return self._stop[1] if stop and self._stop else None

    def _finish(self, ids: list[int], limit: int, sampling: Sampling) -> Literal["end", "stop", "length"]:
        if ids[-1] in sampling.ends:
            return "end"
        # What is shorter than its limit was ended by a stop string; at the limit the text must tell.
        stopped = len(ids) < limit or any(s in self.tokenizer.decode(ids) for s in sampling.stop)
        return "stop" if stopped else "length"


def generation_config(sampling: Sampling, limit: int, pad_token_id: int) -> GenerationConfig:
    """The same in transformers' words. What is not said comes from the model, Qwen2.5's penalty for one."""
    greedy = sampling.temperature == 0
    chosen = {} if greedy else {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
    }  # fmt: skip
    return GenerationConfig(
        **{
            "max_new_tokens": limit,
            "do_sample": not greedy,
            "repetition_penalty": sampling.repetition_penalty,
            "eos_token_id": list(sampling.ends),
            "pad_token_id": pad_token_id,
            **chosen,
            **sampling.further,
        }
    )


def numbers(key: Sequence[int], requests: Sequence[Request]) -> torch.Tensor:
    """Random numbers (B, T) of requests: a rollout's go on where its last turn ended."""
    width = max(request.limit for request in requests)
    total = max(request.start for request in requests) + width
    table = draw(key, [request.place for request in requests], total)
    return torch.stack([row[r.start : r.start + width] for r, row in zip(requests, table, strict=True)])
