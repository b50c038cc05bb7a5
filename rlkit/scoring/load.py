"""Loading rewards by the names in a config, and checking their columns before anything is sampled."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlkit.environment import Environment
from rlkit.errors import UserError, nearest
from rlkit.registry import REWARDS, load_object
from rlkit.reward import COMPUTED_COLUMNS, Reward, RewardCall
from rlkit.scoring.arguments import bind

# Columns of every rollout, in addition to those of the dataset, which must not contain the computed ones.
ROLLOUT_COLUMNS = ("prompt", "completion", "completion_ids", "task_id", *COMPUTED_COLUMNS)


def load_rewards(
    names: Sequence[str] | None,
    environment: Environment,
    weights: Sequence[float] | None = None,
    arguments: Mapping[str, Mapping[str, Any] | None] | None = None,
) -> tuple[dict[str, Reward], list[float]]:
    """Load the rewards of a run, and the environment's metric.

    Args:
        names: Rewards of the environment, names in `REWARDS`, `package.module:function` or
            `path/file.py:function`. A class is instantiated. None loads the environment's default rewards.
        weights: One weight per name. None uses the environment's weights, and 1.0 for other rewards.
        arguments: Keyword arguments of rewards, by their names in `names`. They are passed to the constructor
            of a class, and bound to a function.

    Returns:
        The rewards by the names under which they are logged, and their weights in the same order. If the
        environment's metric is not in `names`, it is added with weight 0: it is logged but not trained on.

    Raises:
        UserError: A name is unknown or listed twice, an object cannot be called, a weight is not finite, the
            number of weights is wrong, or a reward does not accept its arguments.
    """
    names = list(environment.reward_weights) if names is None else list(names)
    if not names:
        raise UserError("at least one reward is required")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"reward {name!r} is listed twice")
    weights = _weights(names, environment, weights)
    if environment.metric not in names:
        names.append(environment.metric)
        weights.append(0.0)
    arguments = _check_arguments(arguments or {}, names)
    rewards: dict[str, Reward] = {}
    for name in names:
        loaded = _find(name, environment)
        _check_reward(name, loaded)
        reward = bind(name, loaded, arguments.get(name) or {})
        _check_reward(name, reward)  # for a class, the instance
        key = name
        if name not in environment.rewards and name not in REWARDS:
            # Short names are reserved, so a user's reward with the same name becomes `name_2`.
            key = _unique_name(name, loaded, {*environment.rewards, *names, *rewards})
        rewards[key] = reward
    return rewards, weights


def check_columns(rewards: Mapping[str, Reward], columns: Iterable[str]) -> None:
    """Check that the dataset and the rollout have the columns that the rewards require.

    Raises:
        UserError: A column is missing, or the dataset has a column with a reserved name.
    """
    columns = list(columns)
    for column in COMPUTED_COLUMNS:
        if column in columns:
            raise UserError(
                f"the dataset has a column {column!r}, which is a reserved name: rename the column"
            )
    available = {*columns, *ROLLOUT_COLUMNS}
    for name, reward in rewards.items():
        for column in RewardCall(reward).required:
            if column not in available:
                raise UserError(f"reward {name!r} needs a column {column!r}{nearest(column, available)}")


def _find(name: str, environment: Environment) -> Any:
    if name in environment.rewards:
        return environment.rewards[name]
    if name in REWARDS:
        return load_object(REWARDS[name])
    if ":" in name:
        return load_object(name)
    if name == environment.metric:
        raise UserError(
            f"the metric {name!r} of {environment.id} is not one of its rewards {sorted(environment.rewards)}"
        )
    available = {*environment.rewards, *REWARDS}
    raise UserError(f"{environment.id} has no reward {name!r}{nearest(name, available)}")


def _check_arguments(
    arguments: Mapping[str, Mapping[str, Any] | None], names: Sequence[str]
) -> Mapping[str, Mapping[str, Any] | None]:
    for name, keywords in arguments.items():
        if name not in names:
            raise UserError(
                f"reward_args has arguments for {name!r}, which is not a reward of this run"
                f"{nearest(name, names)}"
            )
        if keywords is not None and not isinstance(keywords, Mapping):
            raise UserError(f"the arguments of reward {name!r} must be a mapping, not {keywords!r}")
    return arguments


def _check_reward(name: str, reward: object) -> None:
    if not callable(reward):
        raise UserError(f"reward {name!r} cannot be called: it is an object of type {type(reward).__name__}")
    try:
        RewardCall(reward)
    except ValueError as error:
        raise UserError(f"reward {name!r} has no signature that names its columns: {error}") from error


def _unique_name(reference: str, reward: Callable[..., Any], used_names: set[str]) -> str:
    """Return the name under which to log a reward that was loaded by a reference like `module:function`."""
    while isinstance(reward, functools.partial):  # a partial has no name of its own
        reward = reward.func
    name = getattr(reward, "__name__", type(reward).__name__)
    if not name.isidentifier():  # a lambda is called "<lambda>", so use its name in the module
        name = reference.rpartition(":")[2]
    unique, count = name, 1
    while unique in used_names:
        count += 1
        unique = f"{name}_{count}"
    return unique


def _weights(names: Sequence[str], environment: Environment, weights: Sequence[float] | None) -> list[float]:
    if weights is None:
        weights = [environment.reward_weights.get(name, 1.0) for name in names]
    if len(weights) != len(names):
        raise UserError(f"{len(names)} rewards but {len(weights)} reward weights: give one weight per reward")
    for name, weight in zip(names, weights, strict=True):
        # bool is a subclass of int, and YAML reads `yes` as True.
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UserError(f"the weight of reward {name!r} must be a finite number, not {weight!r}")
    return [float(weight) for weight in weights]
