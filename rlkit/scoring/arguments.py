"""Binding the arguments that a config passes to rewards (`reward_args`)."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from rlkit.errors import UserError, first_line, nearest
from rlkit.reward import COMPUTED_COLUMNS, TRL_ARGUMENTS, Reward

# Columns that come from the rollout, so that a config must not set them. `max_length` is not among them: a
# config may pass a reward a lower limit than the run's.
ROLLOUT_ARGUMENTS = {
    *("prompt", "completion", "task_id", "group"),
    *(column for column in COMPUTED_COLUMNS if column != "max_length"),
    *TRL_ARGUMENTS,
}
KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def bind(name: str, reward: Reward, arguments: Mapping[str, Any]) -> Reward:
    """Instantiate a reward class with the arguments, or bind them to a reward function.

    Raises:
        UserError: The reward has no such argument or rejects its value, or it is an object that is already
            constructed.
    """
    if isinstance(reward, type):
        signature = inspect.signature(reward)
        _check(name, signature, arguments, reserved=set())
        required = [
            p.name for p in signature.parameters.values() if p.default is p.empty and p.kind in KEYWORD
        ]
        if missing := [key for key in required if key not in arguments]:
            example = f"{{{name}: {{{missing[0]}: ...}}}}"
            raise UserError(
                f"reward {name!r} needs {', '.join(map(repr, missing))}; set reward_args, e.g. {example}"
            )
        return _instantiate(name, reward, arguments)
    if not arguments:
        return reward
    if hasattr(reward, "state_dict"):
        raise UserError(
            f"reward {name!r} is an instance, so reward_args cannot configure it; refer to its class instead"
        )
    _check(name, inspect.signature(reward), arguments, ROLLOUT_ARGUMENTS)
    return functools.partial(reward, **arguments)


def _check(name: str, signature: inspect.Signature, arguments: Mapping[str, Any], reserved: set[str]) -> None:
    parameters = signature.parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    keywords = {key: p for key, p in parameters.items() if p.kind in KEYWORD}
    for key, value in arguments.items():
        if key in reserved or (key not in keywords and not takes_any):
            raise UserError(
                f"reward {name!r} has no argument {key!r}{nearest(key, keywords.keys() - reserved)}"
            )
        default = keywords[key].default if key in keywords else None
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        if is_number and isinstance(value, str):
            # YAML 1.1 parses 1e-3, without a decimal point, as a string.
            raise UserError(
                f"argument {key!r} of reward {name!r} is the string {value!r}: use a number, e.g. 0.001"
            )


def _instantiate(name: str, cls: type, arguments: Mapping[str, Any]) -> Reward:
    try:
        return cls(**arguments)
    except TypeError as error:
        how = f"with arguments {', '.join(arguments)}" if arguments else "without arguments"
        raise UserError(f"reward {name!r} cannot be constructed {how}: {error}") from error
    except (ValueError, UserError) as error:
        raise UserError(f"reward {name!r}: {first_line(error)}") from error
