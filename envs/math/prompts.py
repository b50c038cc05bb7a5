r"""The chat that asks a problem, and the token budget that it may name (L1, arXiv 2503.04697)."""

from __future__ import annotations

import random

# As in HAPO's training (arXiv 2505.11225).
SYSTEM_PROMPT = r"Please reason step by step, and put your final answer within \boxed{}."
SHORT_INSTRUCTION = r"Answer in \boxed{}."
STYLES = ("standard", "short")
BUDGETS = {"exact": "Think for {} tokens.", "max": "Think for maximum {} tokens."}


def write_prompt(problem: str, style: str, system_prompt: str | None, budget: str) -> list[dict[str, str]]:
    """The messages.

    Args:
        problem: the problem's text.
        style: "standard", or "short", which ends in `SHORT_INSTRUCTION`.
        system_prompt: None is `SYSTEM_PROMPT` in the standard style and none in the short one; "" is none.
        budget: a sentence to end in, or "".
    """
    if system_prompt is None:
        system_prompt = SYSTEM_PROMPT if style == "standard" else ""
    words = [problem, SHORT_INSTRUCTION if style == "short" else "", budget]
    user = {"role": "user", "content": " ".join(word for word in words if word)}
    return [{"role": "system", "content": system_prompt}, user] if system_prompt else [user]


def draw_budget(task_id: str, low: int, high: int) -> int:
    """The number of tokens of a task, uniform from `low` to `high`: the same whenever the task is drawn."""
    return random.Random(f"budget {task_id}").randint(low, high)
