"""Prompts as token ids, and the token ids that end an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlkit.errors import UserError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase


def require_chat_template(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> None:
    """Raise UserError where prompts are chat messages and the tokenizer cannot write them as text."""
    if not isinstance(prompts[0], str) and tokenizer.chat_template is None:
        raise UserError("the prompts are chat messages, but the model's tokenizer has no chat template")


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], **template: Any) -> list[list[int]]:
    """Token ids of prompts, with the chat template where they are chat messages."""
    require_chat_template(tokenizer, prompts)
    if isinstance(prompts[0], str):
        return tokenizer(list(prompts))["input_ids"]
    encoding: BatchEncoding = tokenizer.apply_chat_template(  # type: ignore[assignment]
        list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True, **template
    )
    return encoding["input_ids"]


def eos_token_ids(declared: int | Sequence[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token that ends an answer: the tokenizer's, and those of a model's generation config."""
    declared = [declared] if isinstance(declared, int) else declared or []
    return sorted({tokenizer.eos_token_id, *declared})
