"""Checks of the arguments of `MathEnvironment`: each returns the argument or raises a `UserError`."""

from __future__ import annotations

from collections.abc import Sequence

from rlkit.errors import UserError, check_choice


def check_choices(name: str, values: str | Sequence[str], choices: Sequence[str]) -> list[str]:
    """One of the choices or a list of some."""
    values = [values] if isinstance(values, str) else list(values)
    if not values:
        raise UserError(f"{name} is empty: choose from {', '.join(choices)}")
    return [check_choice(name, value, choices) for value in values]


def check_number(name: str, value: int, least: int, most: int) -> int:
    """A whole number from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(f"{name} is {value!r}: it must be a whole number from {least} to {most}")
    return value


def check_range(name: str, value: int | Sequence[int], least: int, most: int) -> tuple[int, int]:
    """Two whole numbers in order; one number stands for both."""
    pair = [value, value] if isinstance(value, int) else value
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise UserError(f"{name} is {value!r}: it must be two whole numbers, the least and the most")
    low, high = (check_number(name, number, least, most) for number in pair)
    if low > high:
        raise UserError(f"{name} is {value!r}: the least comes first")
    return low, high


def check_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    """Shares of train, dev and test."""
    good = not isinstance(fractions, str) and isinstance(fractions, Sequence) and len(fractions) == 3
    if not good or not all(isinstance(f, int | float) and 0 <= f < float("inf") for f in fractions):
        raise UserError(
            f"fractions is {fractions!r}: it must be three numbers, the shares of train, dev, test"
        )
    if sum(fractions) <= 0:
        raise UserError("fractions are all 0: one split must have a share")
    train, dev, test = fractions
    return train, dev, test
