"""Find rewards by the names in a config, and check what they need before anything is generated."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlkit.environment import Environment, Reward
from rlkit.errors import UserError, nearest
from rlkit.loading import load_object
from rlkit.rewarding.calls import RewardCall

# Columns that every rollout has besides those of the data set.
ROLLOUT_COLUMNS = ("prompt", "completion", "completion_ids", "task_id", "truncated")


def load_rewards(
    names: Sequence[str] | None, environment: Environment, weights: Sequence[float] | None = None
) -> tuple[dict[str, Reward], list[float]]:
    """Load the rewards of a run.

    Args:
        names: an environment's own names, `package.module:function` or `path/file.py:function`; a class is
            built without arguments. None takes the environment's defaults.
        weights: one a name. None takes the environment's weight for its own rewards and 1.0 for others.

    Returns:
        The rewards by the name of their metric, and their weights in the same order.

    Raises:
        UserError: a name that is not known, or twice there; something that cannot be called; weights that are
            not finite or not as many as the names.
    """
    names = list(environment.reward_weights) if names is None else list(names)
    if not names:
        raise UserError("there must be at least one reward")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the reward {name!r} is listed twice")
    rewards: dict[str, Reward] = {}
    for name in names:
        key = name if name in environment.rewards else None
        reward = environment.rewards[name] if key else _load_foreign(name, environment)
        _check_reward(name, reward)
        rewards[key or _metric_name(name, reward, {*environment.rewards, *rewards})] = reward
    return rewards, _weights(names, environment, weights)


def check_columns(rewards: Mapping[str, Reward], columns: Iterable[str]) -> None:
    """Raise `UserError` for a reward that requires a column which neither data set nor rollout has."""
    available = {*columns, *ROLLOUT_COLUMNS}
    for name, reward in rewards.items():
        for column in RewardCall(reward).required:
            if column not in available:
                raise UserError(f"the reward {name!r} needs a column {column!r}{nearest(column, available)}")


def _load_foreign(name: str, environment: Environment) -> Reward:
    if ":" not in name:
        raise UserError(f"{environment.id} has no reward {name!r}{nearest(name, environment.rewards)}")
    reward = load_object(name)
    if not isinstance(reward, type):
        return reward
    try:
        return reward()
    except TypeError as error:
        raise UserError(f"the reward {name!r} cannot be built without arguments: {error}") from error


def _check_reward(name: str, reward: Any) -> None:
    if not callable(reward):
        raise UserError(f"the reward {name!r} cannot be called: it is of type {type(reward).__name__}")
    try:
        RewardCall(reward)
    except ValueError as error:
        raise UserError(f"the reward {name!r} does not say which columns it reads: {error}") from error


def _metric_name(reference: str, reward: Callable[..., Any], taken: set[str]) -> str:
    name = getattr(reward, "__name__", type(reward).__name__)
    if not name.isidentifier():  # a lambda's name says nothing: use the one it was loaded by
        name = reference.rpartition(":")[2]
    unique, count = name, 1
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    return unique


def _weights(names: Sequence[str], environment: Environment, weights: Sequence[float] | None) -> list[float]:
    if weights is None:
        weights = [environment.reward_weights.get(name, 1.0) for name in names]
    if len(weights) != len(names):
        raise UserError(f"there are {len(names)} rewards but {len(weights)} reward weights")
    for name, weight in zip(names, weights, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UserError(f"the weight of reward {name!r} is {weight!r}: it must be a finite number")
    return [float(weight) for weight in weights]
