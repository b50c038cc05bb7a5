"""Sampling with transformers' `generate`, where the samples of one prompt share its prefill."""

from __future__ import annotations

import inspect
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

from rlkit.errors import UserError
from rlkit.rollouts.local import sampling
from rlkit.rollouts.local.cache import has_only_dynamic_layers, preallocate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def group_prompts(prompts: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[int]]:
    """Return the U distinct prompts in order, and for each prompt its index among them."""
    positions: dict[tuple[int, ...], int] = {}
    index = [positions.setdefault(tuple(prompt), len(positions)) for prompt in prompts]
    return list(positions), index


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad prompts on the left; return token ids and attention mask, both (B, P)."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def position_ids(mask: torch.Tensor) -> torch.Tensor:
    """Return position ids (B, T) that skip padding, so that left padding does not shift the prompt."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def continues_from_cache(model: PreTrainedModel) -> bool:
    """Return whether a model can continue from a cache of keys and values that was computed before.

    Others have a cache of their own, a recurrent state or a window, or compute positions from the row's
    length. `generate` runs their prompts as the model's own code wants it, once for each sample.
    """
    base: Any = model
    if hasattr(model, "peft_config"):
        base = base.get_base_model()
    parameters = inspect.signature(type(base).forward).parameters
    if not {"past_key_values", "position_ids", "logits_to_keep"} <= parameters.keys():
        return False
    if getattr(base, "_is_stateful", False) or not base._supports_default_dynamic_cache():
        return False
    return has_only_dynamic_layers(DynamicCache(config=base.config))


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> DynamicCache:
    """Run prompts (B, P) through the model; return their key-value cache."""
    cache = DynamicCache(config=model.config)
    model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position_ids(mask),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,  # the logits are not used, and all of them would be (B, P, V)
    )
    return cache


class RowStoppingCriteria(StoppingCriteria):
    """Ends each row at its own limit or stop string; `generate` alone has one limit for all rows.

    Args:
        start: Number of tokens before the first sampled one, padding included.
        limits: (B,) maximum number of sampled tokens of each row.
        stop: transformers' stop string criteria, or None.

    Attributes:
        lengths: (B,) number of tokens to keep of each row: the limit, or less after a stop string.
    """

    def __init__(self, start: int, limits: torch.Tensor, stop: StopStringCriteria | None):
        self.start = start
        self.lengths = limits.clone()
        self.stop = stop

    def __call__(
        self, input_ids: torch.Tensor, scores: tuple[torch.FloatTensor] | None, **kwargs: object
    ) -> torch.Tensor:
        """Return which rows (B,) have ended."""
        length = input_ids.size(1) - self.start
        if self.stop is not None:
            sampled = input_ids[:, self.start :]  # without the prompt, where no stop string may begin
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
    """Sample one completion per prompt; equal prompts share one prefill.

    Args:
        model: Causal language model, without a DDP or FSDP wrapper.
        prompts: Token ids of each prompt; repeat a prompt G times for G samples.
        config: Generation config. `eos_token_id`, `pad_token_id` and `max_new_tokens` must be set.
        device: Device of the model.
        uniforms: (B, T) random numbers to sample with (see `sampling.py`). None uses torch's generator.
        limits: (B,) maximum number of tokens of each completion. None: `max_new_tokens` of the config.
        stop: Stop string criteria. The tokens that contain the stop string are kept.

    Returns:
        The sampled tokens of each prompt, up to and including the first EOS token.

    Raises:
        UserError: The model's cache is not supported, or its logits are not finite.
    """
    distinct, index = group_prompts(prompts)
    ids, mask = (tensor.to(device) for tensor in left_pad(distinct, config.pad_token_id))
    rows = torch.tensor(index, device=device)
    if limits is None:
        limits = [config.max_new_tokens] * len(rows)
    criteria = RowStoppingCriteria(ids.size(1), torch.tensor(limits).to(device), stop)
    arguments: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([criteria])}
    processors = None
    if uniforms is not None and sampling.is_supported(config):
        processors = sampling.processors(config, uniforms.to(device))
        arguments["logits_processor"] = processors
        config = sampling.greedy(config)  # the argmax is the token that the last processor selected
    stores_keys = [False]
    if ids.size(1) > 1 and continues_from_cache(model):
        # All but the last prompt token: `generate` runs that one itself to get the first logits.
        cache = prefill(model, ids[:, :-1], mask[:, :-1])
        stores_keys = [getattr(layer, "keys", None) is not None for layer in cache.layers]
        if not any(stores_keys):
            raise UserError(
                f"cannot sample from {type(model).__name__}: its attention does not write keys and values to "
                "the cache of transformers; set use_vllm: true"
            )
    if all(stores_keys):  # layers that share the keys of another layer write none
        # One more than `max_new_tokens`, for the last prompt token.
        arguments["past_key_values"] = preallocate(cache, rows, 1 + config.max_new_tokens)
    output = model.generate(  # type: ignore[operator]
        input_ids=ids[rows], attention_mask=mask[rows], generation_config=config, **arguments
    )
    if processors and not processors[-1].is_finite:
        raise UserError(
            "the model's logits are not finite, so no token can be sampled: check config.json and the "
            "weights, or resume from an earlier checkpoint with a lower learning_rate"
        )
    eos_ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    sampled = output[:, ids.size(1) :].tolist()
    lengths = criteria.lengths.tolist()
    return [cut_after_eos(row[:length], eos_ids) for row, length in zip(sampled, lengths, strict=True)]


def cut_after_eos(tokens: list[int], eos_token_ids: Sequence[int]) -> list[int]:
    """Return the tokens up to and including the first EOS token; padding follows it."""
    for position, token in enumerate(tokens):
        if token in eos_token_ids:
            return tokens[: position + 1]
    return tokens
