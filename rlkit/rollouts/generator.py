"""Answer tasks with an engine: what evaluation needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlkit.errors import UserError
from rlkit.rollouts import Engine, Rollout, Sampling
from rlkit.rollouts.loop import Loop


class Generator:
    """Answers each task several times.

    Args:
        engine: samples.
        loop: carries the answers through the environment.
        sampling: how; temperature 0 is greedy.
    """

    def __init__(self, engine: Engine, loop: Loop, sampling: Sampling):
        self.engine = engine
        self.loop = loop
        self.sampling = sampling

    def __call__(self, tasks: Sequence[Mapping[str, Any]], samples: int) -> list[list[Rollout]]:
        """Answer each task `samples` times."""
        ids = tokenize(self.loop.tokenizer, [task["prompt"] for task in tasks], **self.loop.template)
        rows = [i for i in range(len(tasks)) for _ in range(samples)]
        rollouts = self.loop(self.engine, self.sampling, [tasks[i] for i in rows], [ids[i] for i in rows])
        return [rollouts[i : i + samples] for i in range(0, len(rows), samples)]


def require_chat_template(tokenizer: Any, prompts: Sequence[Any]) -> None:
    """Raise UserError where prompts are chat messages and the tokenizer cannot write them as text."""
    if not isinstance(prompts[0], str) and tokenizer.chat_template is None:
        raise UserError("the prompts are chat messages, but the model's tokenizer has no chat template")


def tokenize(tokenizer: Any, prompts: Sequence[Any], **template: Any) -> list[list[int]]:
    """Token ids of prompts, with the chat template where they are chat messages."""
    require_chat_template(tokenizer, prompts)
    if isinstance(prompts[0], str):
        return tokenizer(list(prompts))["input_ids"]
    return tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True, **template
    )["input_ids"]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's, and those that the model declares."""
    declared = model.generation_config.eos_token_id
    declared = [declared] if isinstance(declared, int) else declared or []
    return sorted({tokenizer.eos_token_id, *declared})
