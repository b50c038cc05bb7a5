"""Find rewards by the names in a config, and check what they need before anything is generated."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlkit.environment import Environment
from rlkit.errors import UserError, nearest
from rlkit.registry import REWARDS, load_object
from rlkit.reward import Reward, RewardCall
from rlkit.scoring.arguments import bind

# Columns that the runner makes of a rollout, or a trainer of a run: a data set may not have them.
MADE_COLUMNS = ("length", "correct", "max_length", "turns", "stopped", "environment_tokens")
# Columns that every rollout has besides those of the data set.
ROLLOUT_COLUMNS = ("prompt", "completion", "completion_ids", "task_id", "truncated", *MADE_COLUMNS)


def load_rewards(
    names: Sequence[str] | None,
    environment: Environment,
    weights: Sequence[float] | None = None,
    arguments: Mapping[str, Mapping[str, Any] | None] | None = None,
) -> tuple[dict[str, Reward], list[float]]:
    """Load the rewards of a run, and the environment's metric.

    Args:
        names: an environment's own names, those of `REWARDS`, `package.module:function` or
            `path/file.py:function`; a class is built. None takes the environment's defaults.
        weights: one a name. None takes the environment's weight for its own rewards and 1.0 for others.
        arguments: keyword arguments of a reward, by its name as it stands in `names`: a class is built with
            them, in a function they are fixed.

    Returns:
        The rewards by the name of their metric, and their weights in the same order. Where the environment's
        metric is not among `names` it comes last with weight 0: it is run and logged, with no say.

    Raises:
        UserError: a name that is not known, or twice there; something that cannot be called; weights that are
            not finite or not as many as the names; arguments that a reward does not take, or of no reward.
    """
    names = list(environment.reward_weights) if names is None else list(names)
    if not names:
        raise UserError("there must be at least one reward")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the reward {name!r} is listed twice")
    weights = _weights(names, environment, weights)
    if environment.metric not in names:
        names.append(environment.metric)
        weights.append(0.0)
    arguments = _check_arguments(arguments or {}, names)
    rewards: dict[str, Reward] = {}
    for name in names:
        found = _find(name, environment)
        _check_reward(name, found)
        reward = bind(name, found, arguments.get(name) or {})
        _check_reward(name, reward)  # what a class has built
        # Short names are kept for those that bear them, so a foreign one of the same name becomes `name_2`.
        own = name in environment.rewards or name in REWARDS
        rewards[name if own else _metric_name(name, found, {*environment.rewards, *names, *rewards})] = reward
    return rewards, weights


def check_columns(rewards: Mapping[str, Reward], columns: Iterable[str]) -> None:
    """Check that data set and rollout have the columns which the rewards require.

    Raises:
        UserError: a column is missing, or the data set has one of a name that is the rollout's.
    """
    columns = list(columns)
    for column in MADE_COLUMNS:
        if column in columns:
            raise UserError(
                f"the data set has a column {column!r}, a name that is the rollout's own: rename it"
            )
    available = {*columns, *ROLLOUT_COLUMNS}
    for name, reward in rewards.items():
        for column in RewardCall(reward).required:
            if column not in available:
                raise UserError(f"the reward {name!r} needs a column {column!r}{nearest(column, available)}")


def _find(name: str, environment: Environment) -> Any:
    if name in environment.rewards:
        return environment.rewards[name]
    if name in REWARDS:
        return load_object(REWARDS[name])
    if ":" in name:
        return load_object(name)
    known = {*environment.rewards, *REWARDS}
    if name == environment.metric:
        raise UserError(f"the metric {name!r} is not among the rewards {sorted(environment.rewards)}")
    raise UserError(f"{environment.id} has no reward {name!r}{nearest(name, known)}")


def _check_arguments(
    arguments: Mapping[str, Mapping[str, Any] | None], names: Sequence[str]
) -> Mapping[str, Mapping[str, Any] | None]:
    for name, given in arguments.items():
        if name not in names:
            raise UserError(
                f"there are arguments for {name!r}, which is no reward here{nearest(name, names)}"
            )
        if given is not None and not isinstance(given, Mapping):
            raise UserError(f"the arguments of the reward {name!r} are {given!r}: write them as name: value")
    return arguments


def _check_reward(name: str, reward: object) -> None:
    if not callable(reward):
        raise UserError(f"the reward {name!r} cannot be called: it is of type {type(reward).__name__}")
    try:
        RewardCall(reward)
    except ValueError as error:
        raise UserError(f"the reward {name!r} does not say which columns it reads: {error}") from error


def _metric_name(reference: str, reward: Callable[..., Any], taken: set[str]) -> str:
    while isinstance(reward, functools.partial):
        reward = reward.func
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
