"""Sample completions with transformers' `generate`, computing each prompt once and not once per sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from rlkit.rollouts.local import sampling
from rlkit.rollouts.local.cache import is_plain, with_room

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def group_prompts(prompts: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[int]]:
    """Return the distinct prompts in order, and for each given prompt the position of its distinct one."""
    position: dict[tuple[int, ...], int] = {}
    index = [position.setdefault(tuple(prompt), len(position)) for prompt in prompts]
    return list(position), index


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask, both (B, P), of prompts padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def position_ids(mask: torch.Tensor) -> torch.Tensor:
    """Positions (B, T) that count real tokens only, so that left padding does not shift them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> DynamicCache:
    """Run prompts (B, P) through the model and return the cache of their keys and values."""
    cache = DynamicCache(config=model.config)
    model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position_ids(mask),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return cache


class Ends(StoppingCriteria):
    """Ends each row at its own limit or stop string; `generate` itself knows end tokens only.

    Args:
        start: tokens before the first sampled one, padding with them.
        limits: (B,) tokens of each row.
        stop: transformers' search for stop strings, or None.
    """

    def __init__(self, start: int, limits: torch.Tensor, stop: StopStringCriteria | None):
        self.start = start
        self.lengths = limits.clone()
        self.stop = stop

    def __call__(
        self, input_ids: torch.Tensor, scores: tuple[torch.FloatTensor] | None, **kwargs: object
    ) -> torch.Tensor:
        """Say which rows are done."""
        length = input_ids.size(1) - self.start
        if self.stop is not None:
            sampled = input_ids[:, self.start :]  # a stop string cannot begin in the prompt
            self.lengths[self.stop(sampled, scores) & (length < self.lengths)] = length
        return self.lengths <= length


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    device: torch.device | str,
    uniforms: torch.Tensor | None = None,
    *,
    limits: Sequence[int] | None = None,
    stop: StopStringCriteria | None = None,
) -> list[list[int]]:
    """Sample one completion for each prompt; equal prompts share one prefill.

    Args:
        model: a causal language model, not wrapped.
        prompts: token ids; a prompt that stands G times gets G samples.
        config: how to sample; its `eos_token_id` and `pad_token_id` must be set.
        uniforms: (B, T) random numbers to sample by (see `sampling.py`); None: torch's generator.
        limits: (B,) most tokens of each; None: the config's `max_new_tokens`.
        stop: finds stop strings; the tokens they stand in are kept.

    Returns:
        For each prompt the tokens after it, up to and with the first end token.
    """
    distinct, index = group_prompts(prompts)
    ids, mask = (t.to(device) for t in left_pad(distinct, config.pad_token_id))
    rows = torch.tensor(index, device=device)
    most = torch.full((len(rows),), config.max_new_tokens) if limits is None else torch.tensor(limits)
    ends = Ends(ids.size(1), most.to(device), stop)
    extra: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([ends])}
    if uniforms is not None and sampling.knows(config):
        extra["logits_processor"] = sampling.processors(config, uniforms.to(device))
        config = sampling.greedy(config)
    if ids.size(1) > 1:
        # All but the last prompt token: `generate` runs that one itself to get the first logits.
        cache = prefill(model, ids[:, :-1], mask[:, :-1])
        if is_plain(cache):
            extra["past_key_values"] = with_room(cache, rows, 1 + config.max_new_tokens)
    output = model.generate(  # type: ignore[operator]
        input_ids=ids[rows], attention_mask=mask[rows], generation_config=config, **extra
    )
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    sampled = output[:, ids.size(1) :].tolist()
    return [cut_after_end(row[:n], eos) for row, n in zip(sampled, ends.lengths.tolist(), strict=True)]


def cut_after_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Return the tokens up to and with the first end token; the rest is padding."""
    for position, token in enumerate(tokens):
        if token in ends:
            return tokens[: position + 1]
    return tokens
