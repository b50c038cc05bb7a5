r"""Chat prompts for problems, optionally with a token budget (L1, arXiv 2503.04697)."""

from __future__ import annotations

import random

# The system prompt of HAPO (arXiv 2505.11225).
SYSTEM_PROMPT = r"Please reason step by step, and put your final answer within \boxed{}."
SHORT_INSTRUCTION = r"Answer in \boxed{}."
STYLES = ("standard", "short")
BUDGETS = {"exact": "Think for {} tokens.", "max": "Think for maximum {} tokens."}


def write_prompt(problem: str, style: str, system_prompt: str | None, budget: str) -> list[dict[str, str]]:
    """Return the chat messages of a problem.

    Args:
        problem: Statement of the problem.
        style: "standard", or "short", which appends `SHORT_INSTRUCTION`.
        system_prompt: System prompt; "" means no system message. None means `SYSTEM_PROMPT` in the standard
            style and no system message in the short one.
        budget: Sentence to append about the token budget, or "".
    """
    if system_prompt is None:  # the short style stays short
        system_prompt = SYSTEM_PROMPT if style == "standard" else ""
    sentences = [problem]
    if style == "short":
        sentences.append(SHORT_INSTRUCTION)
    if budget:
        sentences.append(budget)
    user = {"role": "user", "content": " ".join(sentences)}
    return [{"role": "system", "content": system_prompt}, user] if system_prompt else [user]


def draw_budget(task_id: str, low: int, high: int) -> int:
    """Return the token budget of a task, uniform from `low` to `high` and determined by the task id."""
    # Not from the stream of the tasks: the same task has the same budget under every seed.
    return random.Random(f"budget {task_id}").randint(low, high)
