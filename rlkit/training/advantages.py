"""How much better a rollout did than it was to be expected: baselines that TRL's trainer does not have.

Rewards come as one vector over all ranks, (N,), NaN where a rollout is invalid; advantages are 0 there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

ALIKE = 1e-6  # rewards that differ by less are alike


def leave_one_out(rewards: torch.Tensor, keys: Sequence[Hashable]) -> torch.Tensor:
    """RLOO (arXiv 2402.14740): the reward minus the mean of the group's other valid rewards.

    A rollout that is the only valid one of its group has nothing to be compared with: 0.
    """
    advantages = torch.zeros_like(rewards)
    for members in groups(rewards, keys).values():
        group = rewards[members]
        if len(group) > 1:
            advantages[members] = (group - group.mean()) * len(group) / (len(group) - 1)
    return advantages


def by_key(
    rewards: torch.Tensor, keys: Sequence[Hashable], *, minimum: int = 2, scale: bool = True
) -> torch.Tensor:
    """HRPO (Dr. Zero): normalise over all rollouts of the batch that share a key, such as the number of hops.

    Args:
        rewards: (N,).
        keys: N of them.
        minimum: valid rollouts that a group needs. A smaller group has advantage 0: alone, a rollout would be
            compared with 0, and every one be found good.
        scale: divide by the group's standard deviation (n - 1) plus 1e-6.
    """
    advantages = torch.zeros_like(rewards)
    for members in groups(rewards, keys).values():
        group = rewards[members].double()
        # The rounding of equal rewards must not be divided by a deviation of its own size.
        if len(group) < max(minimum, 2) or group.max() - group.min() < ALIKE:
            continue
        centred = group - group.mean()
        advantages[members] = (centred / (group.std() + 1e-6) if scale else centred).to(rewards)
    return advantages


def spread(rewards: torch.Tensor, keys: Sequence[Hashable]) -> torch.Tensor:
    """Largest minus smallest valid reward of each group of rollouts with the same key; 0 for a lone one."""
    ranges = []
    for members in groups(rewards, keys).values():
        group = rewards[members]
        ranges.append(group.max() - group.min() if len(group) else rewards.new_zeros(()))
    return torch.stack(ranges)


def groups(rewards: torch.Tensor, keys: Sequence[Hashable]) -> dict[Hashable, torch.Tensor]:
    """For each key, in order, the positions of its valid rewards."""
    members: dict[Hashable, list[int]] = {key: [] for key in keys}
    for i, (key, invalid) in enumerate(zip(keys, rewards.isnan().tolist(), strict=True)):
        if not invalid:
            members[key].append(i)
    return {key: torch.tensor(rows, dtype=torch.long, device=rewards.device) for key, rows in members.items()}


def solve_rate(metric: torch.Tensor, keys: Sequence[Hashable]) -> torch.Tensor:
    """Return the share of correct rollouts among the valid ones of each rollout's group.

    Args:
        metric: (N,) 1 where a rollout is correct, NaN where it is invalid.
        keys: (N,) the group of each rollout.
    """
    rates = dict.fromkeys(keys, 0.0)
    for key, rows in groups(metric, keys).items():
        if len(rows):
            rates[key] = (metric[rows] >= 1.0).float().mean().item()
    return metric.new_tensor([rates[key] for key in keys])


def difficulty_weight(advantages: torch.Tensor, solve_rate: torch.Tensor) -> torch.Tensor:
    """GRPO-LEAD's weight of an advantage (its code, `logistic_reweight`): more for what is rare in the group.

    Args:
        advantages: (N,).
        solve_rate: (N,) the share of correct answers in the rollout's group.
    """
    x = torch.where(advantages > 0, solve_rate, 1 - solve_rate)
    low, high, middle, slope = 0.4, 1.5, 0.75, 10.0  # the published code's
    return low + (high - low) / (1 + torch.exp(slope * (x - middle)))
