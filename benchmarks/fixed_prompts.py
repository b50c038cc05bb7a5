"""Environments of given or random prompts, with a reward that differs between rollouts.

A separate module, because every reward worker imports it and importing TRL takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from rlkit.environment import Environment

if TYPE_CHECKING:
    import datasets


def code_sum(completion: str) -> float:
    """Return a reward that differs between rollouts, so that there is a gradient."""
    return float(sum(map(ord, completion)) % 7)


class FixedPrompts(Environment):
    """Environment with the given prompts."""

    id = "fixed-v1"
    metric = "code_sum"
    rewards = {"code_sum": code_sum}  # noqa: RUF012
    reward_weights = {"code_sum": 1.0}  # noqa: RUF012

    def __init__(self, prompts: Sequence[str]):
        self.prompts = prompts

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Return a task for each prompt, whatever the arguments."""
        import datasets

        return datasets.Dataset.from_list(
            [{"prompt": prompt, "task_id": str(i)} for i, prompt in enumerate(self.prompts)]
        )

    def answer(self, task: Any) -> str:
        """Return no reference answer."""
        return ""


class RandomLetters(FixedPrompts):
    """Environment whose prompts are strings of random letters.

    Args:
        length: Number of letters of a prompt.
        count: Number of prompts.
    """

    def __init__(self, length: int = 16, count: int = 64):
        super().__init__(random_letters(count, length))


def random_letters(count: int, length: int) -> list[str]:
    """Return `count` strings of `length` random letters."""
    random = Random(0)
    return ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=length)) for _ in range(count)]
