"""Baselines that TRL's trainer does not have: the advantages of RLOO and HRPO, and GRPO-LEAD's weights.

All functions take the rewards of the rollouts of all processes as one vector, (N,). Invalid rollouts have the
reward NaN and get the advantage 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

EQUAL_REWARDS = 1e-6  # rewards that differ by less count as equal: sums of float32 are rounded


def leave_one_out(rewards: torch.Tensor, keys: Sequence[Hashable]) -> torch.Tensor:
    """Return RLOO's advantages (arXiv 2402.14740): the reward minus the mean of the group's other rewards.

    A rollout that is the only valid one of its group gets 0.

    Args:
        rewards: Rewards, (N,).
        keys: Group of each rollout, (N,).
    """
    advantages = torch.zeros_like(rewards)
    for members in groups(rewards, keys).values():
        group = rewards[members]
        if len(group) > 1:
            # r - mean of the others = (r - mean of all) * n / (n - 1)
            advantages[members] = (group - group.mean()) * len(group) / (len(group) - 1)
    return advantages


def by_key(
    rewards: torch.Tensor, keys: Sequence[Hashable], *, minimum: int = 2, scale: bool = True
) -> torch.Tensor:
    """Return HRPO's advantages (Dr. Zero): rewards normalized over all rollouts with the same key.

    Args:
        rewards: Rewards, (N,).
        keys: Group of each rollout, (N,), such as the number of hops of its task.
        minimum: Minimum number of valid rollouts in a group, at least 2. Smaller groups get the advantage 0:
            compared with 0 instead of a mean, a rollout on its own would always look good.
        scale: Whether to divide by the group's standard deviation (n - 1) plus 1e-6.
    """
    advantages = torch.zeros_like(rewards)
    for members in groups(rewards, keys).values():
        group = rewards[members].double()
        # Equal rewards differ by rounding. Dividing by a standard deviation of that size would amplify it.
        if len(group) < max(minimum, 2) or group.max() - group.min() < EQUAL_REWARDS:
            continue
        centered = group - group.mean()
        if scale:
            centered = centered / (group.std() + 1e-6)
        advantages[members] = centered.to(rewards)
    return advantages


def reward_range(rewards: torch.Tensor, keys: Sequence[Hashable]) -> torch.Tensor:
    """Return the largest minus the smallest valid reward of each group, (number of groups,).

    It is 0 for groups with fewer than two valid rewards.
    """
    ranges = []
    for members in groups(rewards, keys).values():
        group = rewards[members]
        ranges.append(group.max() - group.min() if len(group) else rewards.new_zeros(()))
    return torch.stack(ranges)


def groups(rewards: torch.Tensor, keys: Sequence[Hashable]) -> dict[Hashable, torch.Tensor]:
    """Return the indices of the valid rewards of each key, keys in order of first occurrence."""
    members: dict[Hashable, list[int]] = {key: [] for key in keys}
    for i, (key, invalid) in enumerate(zip(keys, rewards.isnan().tolist(), strict=True)):
        if not invalid:
            members[key].append(i)
    return {key: torch.tensor(rows, dtype=torch.long, device=rewards.device) for key, rows in members.items()}


def solve_rate(metric: torch.Tensor, keys: Sequence[Hashable]) -> torch.Tensor:
    """Return, for each rollout, the fraction of correct ones among the valid rollouts of its group, (N,).

    Args:
        metric: Environment's metric, (N,): 1 for a correct rollout, NaN for an invalid one.
        keys: Group of each rollout, (N,).
    """
    rates = dict.fromkeys(keys, 0.0)
    for key, rows in groups(metric, keys).items():
        if len(rows):
            rates[key] = (metric[rows] >= 1.0).float().mean().item()
    return metric.new_tensor([rates[key] for key in keys])


def difficulty_weight(advantages: torch.Tensor, solve_rate: torch.Tensor) -> torch.Tensor:
    """Return GRPO-LEAD's weights of advantages, (N,), as in `logistic_reweight` of its code.

    A rollout whose outcome is rare in its group gets a larger weight: a correct answer to a hard task, or a
    wrong answer to an easy one. The weight is 0.4 + 1.1 / (1 + exp(10 (x - 0.75))) with x the frequency of
    the outcome.

    Args:
        advantages: Advantages, (N,).
        solve_rate: Fraction of correct rollouts in the group of each rollout, (N,).
    """
    x = torch.where(advantages > 0, solve_rate, 1 - solve_rate)
    low, high, middle, slope = 0.4, 1.5, 0.75, 10.0  # constants of the published code
    return low + (high - low) / (1 + torch.exp(slope * (x - middle)))


def nan_std(x: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation (n - 1) of each row of (G, n), ignoring NaN: (G, 1), NaN if n < 2."""
    count = (~x.isnan()).sum(1, keepdim=True)
    squares = (x - x.nanmean(1, keepdim=True)).square().nansum(1, keepdim=True)
    return (squares / (count - 1)).masked_fill(count < 2, torch.nan).sqrt()
