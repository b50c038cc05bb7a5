"""Rewards for short completions that compare the rollouts of one task. See `rlkit.rewards.length`.

A group is a list of rollouts with `length` (L, in tokens), `correct` (y, 1 for a correct answer) and
`truncated`. Each reward function returns one reward per rollout, in the same order.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Group = Sequence[Mapping[str, Any]]


def arora_zanette(group: Group, alpha: float = 0.1) -> list[float]:
    """Return y (1 - alpha sigmoid(z)), z = (L - mean) / (std + 1e-7) over the correct answers. Replaces y.

    A truncated completion gets 0 and is excluded from the correct answers. `std` is the population standard
    deviation, over n. Code Zanette-Labs/efficient-reasoning, `reward_server/math_server.py`; alpha is that of
    its `run_rloo_1.5B.sh`.
    """
    correct = [is_correct(row) and not row["truncated"] for row in group]
    return [
        0.0 if row["truncated"] else row["correct"] * (1 - alpha * sigmoid(z))
        for row, z in zip(group, standardized_lengths(group, correct, 0, 1e-7), strict=True)
    ]


def kimi(group: Group) -> list[float]:
    """Return lambda for a correct answer, min(0, lambda) for a wrong one. Added to y.

    lambda = 1/2 - (L - Lmin) / (Lmax - Lmin), with Lmin and Lmax over all rollouts of the task; all rewards
    are 0 if Lmin = Lmax. Kimi k1.5, arXiv 2501.12599; code hkust-nlp/Laser, `compute_kimi_penalty`, which
    weights the reward by 0.4. (huggingface/open-r1's `len_reward` counts characters and takes Lmin and Lmax
    over the batch.)
    """
    lengths = [row["length"] for row in group]
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return [0.0] * len(lengths)
    scores = [0.5 - (length - shortest) / (longest - shortest) for length in lengths]
    return [score if is_correct(row) else min(0.0, score) for row, score in zip(group, scores, strict=True)]


def grpo_lead(group: Group, alpha: float = 0.05) -> list[float]:
    """Return exp(-alpha z) for a correct answer, -1 for a wrong one. Replaces y.

    z = (L - mean) / (std + 1e-6) over the correct answers, with the sample standard deviation (over n - 1),
    or 1 for a single correct answer. This is the reward of GRPO-LEAD, code aeroplanepaper/GRPO-LEAD,
    `main_ppo.py`, without its exception for tasks with short answers. GRPO-LEAD's weight of the advantage is
    not included: it belongs to the trainer.
    """
    correct = [is_correct(row) for row in group]
    z = standardized_lengths(group, correct, 1, 1e-6)
    return [math.exp(-alpha * z[i]) if correct[i] else -1.0 for i in range(len(group))]


def dast(group: Group, max_length: int) -> list[float]:
    """Return the length reward for a budget that grows with the difficulty of the task. Replaces y.

    The budget is B = p mean + (1 - p) max_length, with p the fraction of correct answers and mean their mean
    length. With lambda = (L - B) / B, a correct answer gets max(0.5 - 0.5 lambda, 0.1) and a wrong one
    min(0.9 lambda - 0.1, -0.1). The idea is that of arXiv 2503.04472, which builds preference pairs from it.
    The constants are those commonly quoted; they were not checked against the paper.
    """
    correct_lengths = [row["length"] for row in group if is_correct(row)]
    accuracy = len(correct_lengths) / len(group)
    budget = accuracy * mean(correct_lengths) + (1 - accuracy) * max_length if correct_lengths else max_length
    rewards = []
    for row in group:
        excess = (row["length"] - budget) / max(budget, 1)
        if is_correct(row):
            rewards.append(max(0.5 - 0.5 * excess, 0.1))
        else:
            rewards.append(min(0.9 * excess - 0.1, -0.1))
    return rewards


def is_correct(row: Mapping[str, Any]) -> bool:
    """Return whether the answer earns full marks; partial credit counts as wrong."""
    return row["correct"] >= 1.0


def mean(values: Sequence[float]) -> float:
    """Return the mean of a non-empty sequence."""
    return sum(values) / len(values)


def standardized_lengths(group: Group, mask: Sequence[bool], ddof: int, epsilon: float) -> list[float]:
    """Return (L - mean) / (std + epsilon) of every rollout; 0 if the mask is all False.

    Mean and standard deviation are over the n rollouts whose mask is True.

    Args:
        group: Rollouts of one task.
        mask: One value per rollout.
        ddof: The variance is the sum of squares divided by n - ddof. `std` is 1 if n = ddof.
        epsilon: Makes z 0, not NaN, if the selected rollouts are all equally long.
    """
    lengths = [row["length"] for row, selected in zip(group, mask, strict=True) if selected]
    if not lengths:
        return [0.0] * len(group)
    center = mean(lengths)
    deviation = 1.0
    if len(lengths) > ddof:
        deviation = math.sqrt(sum((length - center) ** 2 for length in lengths) / (len(lengths) - ddof))
    return [(row["length"] - center) / (deviation + epsilon) for row in group]


def sigmoid(x: float) -> float:
    """Return 1 / (1 + exp(-x)) without overflow for large |x|."""
    return (1 + math.tanh(x / 2)) / 2
