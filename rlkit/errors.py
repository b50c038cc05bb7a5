"""Exceptions that rlkit raises on purpose, and argument checks that suggest the nearest valid name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

PREEMPTED = 75  # exit code of a preempted run: sysexits.h's EX_TEMPFAIL
# A misspelling has at least this share of its letters in common with the name. Unrelated keys of the same
# form, such as num_generations and demonstrations, have up to 0.7.
SIMILARITY = 0.75
# Other words for a name, whose letters differ.
SYNONYMS = {"val": "dev", "valid": "dev", "validation": "dev", "development": "dev"}


class UserError(Exception):
    """Invalid input. The command line prints the one-line message without a traceback and exits with 2."""


class RewardError(Exception):
    """Too many rollouts are invalid to continue training, or the reward workers do not start."""


class GuardError(Exception):
    """A run cannot continue: a guard stopped it (`rlkit.runs.guards`), or its vLLM servers failed."""


class Preempted(Exception):  # noqa: N818
    """A run was preempted (`rlkit.runs.preemption`); it can be resumed from its checkpoint."""


class UnavailableError(UserError):
    """A server that is needed is down or rejects requests. What was to be run or checked is not at fault."""


class InvalidItemError(UserError):
    """A line of a file of published items (`rlkit check --items`) is not a valid item."""


def first_line(message: BaseException | str) -> str:
    """Return the first non-blank line of a message, or the type name of an exception without a message."""
    for line in str(message).splitlines():
        if line.strip():
            return line.strip()
    return "" if isinstance(message, str) else type(message).__name__


def one_line(message: BaseException | str) -> str:
    """Return a message on one line, with its line breaks replaced by spaces."""
    return " ".join(str(message).split()) or first_line(message)


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the choice most similar to `name`, else a list of all choices.

    Returns an empty string if nothing is similar and there are more than 40 choices: a long list is no help
    in an error message.
    """
    choices = sorted(choices)
    if SYNONYMS.get(name) in choices:
        return f" (did you mean {SYNONYMS[name]!r}?)"
    close = difflib.get_close_matches(name, choices, n=1, cutoff=SIMILARITY)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (choices: {', '.join(choices)})" if 0 < len(choices) <= 40 else ""


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`; otherwise raise `UserError` with the nearest choice."""
    choices = list(choices)
    if value not in choices:
        raise UserError(f"unknown {name} {value!r:.60}{nearest(str(value), choices)}")
    return value


def check_arguments(target: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Raise `UserError` if a class or function does not accept one of these keyword arguments."""
    parameters = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in kwargs:
        if key not in parameters:
            raise UserError(f"{target.__name__} has no argument {key!r}{nearest(key, parameters)}")


def check_integer(name: str, value: int, minimum: int, maximum: int | None = None) -> int:
    """Return `value` if it is an integer from `minimum` to `maximum`; otherwise raise `UserError`."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)  # bool is a subclass of int
    if not is_integer or value < minimum or (maximum is not None and value > maximum):
        allowed = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise UserError(f"{name} must be an integer {allowed}, not {value!r}")
    return value
