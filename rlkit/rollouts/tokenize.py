"""Prompts as token ids, and the ids of EOS tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlkit.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

PREFIX_TOKENS = 8  # at the end of a prompt, enough for "<think>" and line breaks


def require_chat_template(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> None:
    """Raise UserError if the prompts are chat messages and the tokenizer has no chat template."""
    if not isinstance(prompts[0], str) and tokenizer.chat_template is None:
        raise UserError(
            "the prompts are chat messages, but the model's tokenizer has no chat template: "
            "use an instruction-tuned model"
        )


def check_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], **template: Any) -> None:
    """Check that the chat template formats prompts, and does not ignore their messages.

    Args:
        tokenizer: Tokenizer of the model.
        prompts: First prompts of the training tasks.
        template: Extra arguments of the chat template.

    Raises:
        UserError: The template fails, or formats different prompts alike.
    """
    ids = tokenize(tokenizer, prompts, **template)
    are_messages = not isinstance(prompts[0], str)
    if are_messages and any(prompt != prompts[0] for prompt in prompts) and all(row == ids[0] for row in ids):
        raise UserError(
            f"the chat template of {tokenizer.name_or_path or 'the model'} formats different prompts alike; "
            "fix the template in the model's folder"
        )


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], **template: Any) -> list[list[int]]:
    """Return the token ids of each prompt; chat messages are formatted with the chat template.

    Args:
        tokenizer: Tokenizer of the model.
        prompts: Strings, or lists of chat messages; not a mix.
        template: Extra arguments of the chat template.

    Raises:
        UserError: There is no chat template, or it cannot format the messages.
    """
    require_chat_template(tokenizer, prompts)
    if isinstance(prompts[0], str):
        return tokenizer(list(prompts))["input_ids"]
    try:
        encoding: BatchEncoding = tokenizer.apply_chat_template(  # type: ignore[assignment]
            list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True, **template
        )
    except Exception as error:  # a template is a program: jinja raises whatever its code raises
        name = tokenizer.name_or_path or "the model"
        raise UserError(
            f"the chat template of {name} cannot format the prompts: {first_line(error)}; fix the template "
            "in the model's folder"
        ) from error
    return encoding["input_ids"]


def eos_token_ids(declared: int | Sequence[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of all tokens that end a turn, sorted.

    Args:
        declared: `eos_token_id` of the model's generation config. A chat model often lists several, e.g.
            `<|im_end|>` and `<|endoftext|>`.
        tokenizer: Tokenizer of the model, whose EOS token is added.
    """
    declared = [declared] if isinstance(declared, int) else declared or []
    return sorted({tokenizer.eos_token_id, *declared})


def opens_thought(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    """Return whether a prompt ends with `<think>`, which chat templates of reasoning models write."""
    return str(tokenizer.decode(list(ids[-PREFIX_TOKENS:]))).rstrip().endswith("<think>")


def decode_turn(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], eos_token_ids: Sequence[int]) -> str:
    """Return the text of an assistant turn without the EOS token that ends it.

    Other special tokens stay: tags and the marks of a function call may be special tokens, without which the
    turn could not be understood.
    """
    end = len(ids)
    while end and ids[end - 1] in (*eos_token_ids, tokenizer.pad_token_id):
        end -= 1
    return str(tokenizer.decode(list(ids[:end]), skip_special_tokens=False))
