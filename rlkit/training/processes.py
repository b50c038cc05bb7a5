"""Calls that succeed or fail on all processes together, so that none waits for one that has stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from accelerate.utils import broadcast_object_list, gather_object

from rlkit.errors import GuardError, RewardError, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")


def on_main_process(accelerator: Accelerator, decide: Callable[[], Result]) -> Result:
    """Call `decide` on the main process, and return its result on all processes.

    Raises:
        UserError, RewardError: `decide` raised it. If only the main process did, the others would hang in the
            next collective.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = decide()
        except (UserError, RewardError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_every_process(call: Callable[[], Result]) -> Result:
    """Return the result of `call`, made on each process; if one raises an error for the user, all do."""
    result: Result | None = None
    error: UserError | RewardError | GuardError | None = None
    try:
        result = call()
    except (UserError, RewardError, GuardError) as caught:
        error = caught
    errors = [e for e in gather_object([error]) if e is not None]
    if errors:
        raise error or errors[0]
    return cast(Result, result)
