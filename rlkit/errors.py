"""The errors rlkit raises on purpose, and argument checks that suggest the closest valid name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

PREEMPTED = 75  # exit code of a preempted run: sysexits.h's EX_TEMPFAIL


class UserError(Exception):
    """Bad input. The command line prints its one line and exits with code 2, without a traceback."""


class RewardError(Exception):
    """Rewards failed on too many rollouts to continue training (`rlkit.scoring`)."""


class GuardError(Exception):
    """A guard stopped a run that cannot learn or is going wrong (`rlkit.runs.guards`)."""


class Preempted(Exception):  # noqa: N818
    """A run was preempted (`rlkit.runs.preemption`); it can be resumed from its checkpoint."""


class InvalidItemError(UserError):
    """A line of a file of published items (`rlkit check --items`) is not a valid item."""


def first_line(message: BaseException | str) -> str:
    """Return a message's first line that is not blank, or an exception's type name if it has no message."""
    for line in str(message).splitlines():
        if line.strip():
            return line.strip()
    return "" if isinstance(message, str) else type(message).__name__


def one_line(message: BaseException | str) -> str:
    """Return a whole message on one line."""
    return " ".join(str(message).split()) or first_line(message)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the known name closest to `name`, or the list of known names.

    A long list is no help in an error: of more than 40 names nothing is listed.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {', '.join(known)})" if 0 < len(known) <= 40 else ""


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`; raise `UserError` naming the nearest one otherwise."""
    choices = list(choices)
    if value not in choices:
        raise UserError(f"there is no {name} {value!r}{nearest(str(value), choices)}")
    return value


def check_arguments(target: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Raise `UserError` for a keyword that a class or function does not take, naming the nearest one."""
    parameters = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in kwargs:
        if key not in parameters:
            raise UserError(f"{target.__name__} has no argument {key!r}{nearest(key, parameters)}")
