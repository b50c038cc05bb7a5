"""Rewards for short completions, which compare the rollouts of one task. See `rlkit.rewards.length`.

A group is a list of rollouts with `length` (tokens, L), `correct` (y, 1 for a right answer) and `truncated`.
The reward of each comes back in the same order.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Group = Sequence[Mapping[str, Any]]

EPSILON = 1e-7  # with one right answer, or several equally long, the deviation is 0 and so is z


def arora_zanette(group: Group, alpha: float = 0.1) -> list[float]:
    """y (1 - alpha sigmoid(z)), z = (L - mean) / (std + 1e-7) over the right answers. Replaces y.

    A truncated completion gets 0 and is not one of the right answers. Population deviation. Code
    Zanette-Labs/efficient-reasoning, `reward_server/math_server.py`; alpha as in its `run_rloo_1.5B.sh`.
    """
    right = [is_right(row) and not row["truncated"] for row in group]
    return [
        0.0 if row["truncated"] else row["correct"] * (1 - alpha * sigmoid(z))
        for row, z in zip(group, standardised(group, right), strict=True)
    ]


def kimi(group: Group) -> list[float]:
    """lambda = 1/2 - (L - Lmin) / (Lmax - Lmin) for a right answer, min(0, lambda) for a wrong. Added to y.

    Lmin and Lmax are over all rollouts of the task; all are 0 where they are equal. Kimi k1.5, arXiv
    2501.12599; code hkust-nlp/Laser, `compute_kimi_penalty`, which weights it by 0.4 (huggingface/open-r1's
    `len_reward` counts characters, and over the whole batch).
    """
    lengths = [row["length"] for row in group]
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return [0.0] * len(lengths)
    scores = [0.5 - (length - shortest) / (longest - shortest) for length in lengths]
    return [score if is_right(row) else min(0.0, score) for row, score in zip(group, scores, strict=True)]


def grpo_lead(group: Group, alpha: float = 0.05) -> list[float]:
    """exp(-alpha z) for a right answer, z = (L - mean) / (std + 1e-7) over those; -1 for a wrong. Replaces y.

    Population deviation. The reward of GRPO-LEAD, code aeroplanepaper/GRPO-LEAD, `main_ppo.py`, without its
    exception for tasks whose answers are short; its weight of the advantage belongs to the trainer.
    """
    right = [is_right(row) for row in group]
    z = standardised(group, right)
    return [math.exp(-alpha * z[i]) if right[i] else -1.0 for i in range(len(group))]


def dast(group: Group, max_length: int) -> list[float]:
    """More tokens for harder tasks: a budget B = p mean + (1 - p) max_length, p the share right. Replaces y.

    With lambda = (L - B) / B and the mean over the right answers: max(-0.5 lambda + 0.5, 0.1) for a right
    answer, min(0.9 lambda - 0.1, -0.1) for a wrong one. The idea is that of arXiv 2503.04472, which makes
    preference pairs of it; constants as commonly quoted; not checked against the paper.
    """
    right = [row["length"] for row in group if is_right(row)]
    share = len(right) / len(group)
    budget = share * mean(right) + (1 - share) * max_length if right else max_length
    relative = [(row["length"] - budget) / max(budget, 1) for row in group]
    return [
        max(0.5 - 0.5 * x, 0.1) if is_right(row) else min(0.9 * x - 0.1, -0.1)
        for row, x in zip(group, relative, strict=True)
    ]


def is_right(row: Mapping[str, Any]) -> bool:
    """Say whether the answer is right; partial credit is not."""
    return row["correct"] >= 1.0


def mean(values: Sequence[float]) -> float:
    """Mean of one value or more."""
    return sum(values) / len(values)


def standardised(group: Group, chosen: Sequence[bool]) -> list[float]:
    """(L - mean) / (std + 1e-7) of every rollout, mean and std over the chosen; 0 where there are none."""
    lengths = [row["length"] for row, choice in zip(group, chosen, strict=True) if choice]
    if not lengths:
        return [0.0] * len(group)
    centre = mean(lengths)
    deviation = math.sqrt(mean([(length - centre) ** 2 for length in lengths]))
    return [(row["length"] - centre) / (deviation + EPSILON) for row in group]


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), for any x."""
    return (1 + math.tanh(x / 2)) / 2
