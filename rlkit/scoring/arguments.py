"""Give rewards the arguments that a config has for them."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from rlkit.errors import UserError, first_line, nearest
from rlkit.reward import TRL_ARGUMENTS, Reward

# What a rollout says for itself, `max_length` apart: a config may set a lower limit than the run's.
OF_THE_ROLLOUT = {
    *("prompt", "completion", "task_id", "truncated", "length", "correct", "group"),
    *TRL_ARGUMENTS,
}


def bind(name: str, reward: Reward, arguments: Mapping[str, Any]) -> Reward:
    """Build a reward's class with arguments, or fix them in a function.

    Raises:
        UserError: an argument that it does not have, or a value that it refuses; an object that is built.
    """
    if isinstance(reward, type):
        _check(name, inspect.signature(reward), arguments, taken=set())
        return _build(name, reward, arguments)
    if not arguments:
        return reward
    if hasattr(reward, "state_dict"):
        raise UserError(f"the reward {name!r} is an object that is already built: it takes no arguments")
    _check(name, inspect.signature(reward), arguments, OF_THE_ROLLOUT)
    return functools.partial(reward, **arguments)


def _check(name: str, signature: inspect.Signature, arguments: Mapping[str, Any], taken: set[str]) -> None:
    parameters = signature.parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {key: p for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for key, value in arguments.items():
        if key in taken or (key not in named and not takes_any):
            raise UserError(
                f"the reward {name!r} has no argument {key!r}{nearest(key, named.keys() - taken)}"
            )
        default = named[key].default if key in named else None
        number = isinstance(default, int | float) and not isinstance(default, bool)
        if number and isinstance(value, str):
            # YAML reads 1e-3 as a text.
            raise UserError(f"{key!r} of the reward {name!r} is the text {value!r}: write a number, as 0.001")


def _build(name: str, cls: type, arguments: Mapping[str, Any]) -> Reward:
    try:
        return cls(**arguments)
    except TypeError as error:
        given = ", ".join(arguments)
        how = f"with the arguments {given}" if given else "without arguments"
        raise UserError(f"the reward {name!r} cannot be built {how}: {error}") from error
    except (ValueError, UserError) as error:
        raise UserError(f"the reward {name!r}: {first_line(error)}") from error
