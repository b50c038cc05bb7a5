"""Validation of the arguments of `MathEnvironment`: each check returns the value or raises `UserError`."""

from __future__ import annotations

from collections.abc import Sequence

from rlkit.errors import UserError, check_choice, check_integer


def check_choices(name: str, values: str | Sequence[str], choices: Sequence[str]) -> list[str]:
    """Return the values as a list after checking that each is one of the choices."""
    values = [values] if isinstance(values, str) else list(values)
    if not values:
        raise UserError(f"{name} is empty: choose from {', '.join(choices)}")
    return [check_choice(name, value, choices) for value in values]


def check_range(name: str, value: int | Sequence[int], minimum: int, maximum: int) -> tuple[int, int]:
    """Return a (low, high) pair of integers; a single integer is used for both."""
    pair = [value, value] if isinstance(value, int) else value
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise UserError(f"{name} must be two integers, the minimum and the maximum, not {value!r}")
    low, high = (check_integer(name, number, minimum, maximum) for number in pair)
    if low > high:
        raise UserError(f"{name} must have its minimum first, not {value!r}")
    return low, high


def check_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    """Return the fractions of train, dev and test. They need not sum to 1."""
    is_triple = not isinstance(fractions, str) and isinstance(fractions, Sequence) and len(fractions) == 3
    if not is_triple or not all(isinstance(f, int | float) and 0 <= f < float("inf") for f in fractions):
        raise UserError(
            f"fractions must be three non-negative numbers, for train, dev and test, not {fractions!r}"
        )
    if sum(fractions) <= 0:
        raise UserError("fractions are all 0: at least one split needs a positive fraction")
    train, dev, test = fractions
    return train, dev, test
