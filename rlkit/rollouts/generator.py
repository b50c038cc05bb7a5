"""Answer chat prompts with a model in this process: what evaluation needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from rlkit.errors import UserError
from rlkit.rollouts import Completion
from rlkit.rollouts.generate import generate


class Generator:
    """Samples completions from a causal language model.

    Args:
        model: not wrapped.
        tokenizer: with a chat template, for prompts that are chat messages.
        max_completion_length: tokens.
        temperature: 0 is greedy.
        top_p: nucleus.
        batch_size: completions at a time.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_completion_length: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        batch_size: int = 64,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.config = GenerationConfig(
            max_new_tokens=max_completion_length,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_p=top_p if temperature > 0 else None,
            top_k=0 if temperature > 0 else None,
            repetition_penalty=1.0,  # what is not given here comes from the model, Qwen2.5's 1.05 for one
            eos_token_id=end_tokens(model, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )

    def __call__(self, prompts: Sequence[Any], samples: int) -> list[list[Completion]]:
        """Answer each prompt (chat messages or text) `samples` times."""
        ids = [tokens for tokens in tokenize(self.tokenizer, prompts) for _ in range(samples)]
        # Prompts of like length together: less padding.
        order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
        completions: dict[int, Completion] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            outputs = self._generate([ids[i] for i in batch])
            completions |= {i: self._completion(tokens) for i, tokens in zip(batch, outputs, strict=True)}
        return [
            [completions[i] for i in range(first, first + samples)] for first in range(0, len(ids), samples)
        ]

    def _generate(self, ids: list[list[int]]) -> list[list[int]]:
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            output = generate(self.model, ids, self.config, self.model.device)
        self.model.train(training)
        return output

    def _completion(self, tokens: list[int]) -> Completion:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return Completion(text, tokens, truncated=not tokens or tokens[-1] not in self.config.eos_token_id)


def require_chat_template(tokenizer: Any, prompts: Sequence[Any]) -> None:
    """Raise UserError where prompts are chat messages and the tokenizer cannot write them as text."""
    if not isinstance(prompts[0], str) and tokenizer.chat_template is None:
        raise UserError("the prompts are chat messages, but the model's tokenizer has no chat template")


def tokenize(tokenizer: Any, prompts: Sequence[Any]) -> list[list[int]]:
    """Token ids of prompts, with the chat template where they are chat messages."""
    require_chat_template(tokenizer, prompts)
    if isinstance(prompts[0], str):
        return tokenizer(list(prompts))["input_ids"]
    return tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's, and those that the model declares."""
    declared = model.generation_config.eos_token_id
    declared = [declared] if isinstance(declared, int) else declared or []
    return sorted({tokenizer.eos_token_id, *declared})
