"""Numerals: decimals, e-notation and other bases."""

from __future__ import annotations

from fractions import Fraction

from rlkit.rewards.latex.nodes import Number, UnreadableError

MAX_LITERAL_DIGITS = 1000
BASES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "twelve": 12, "sixteen": 16,
}  # fmt: skip


def read_number(text: str) -> Number:
    """Parse a literal such as `3`, `0.50` or `3e8`; `digits` counts its significant digits."""
    mantissa, _, exponent = text.lower().partition("e")
    if len(mantissa) > MAX_LITERAL_DIGITS or abs(int(exponent or "0")) > MAX_LITERAL_DIGITS:
        raise UnreadableError("a number with too many digits")
    integer, _, places = mantissa.partition(".")
    value = Fraction(int((integer + places) or "0"), 10 ** len(places)) * Fraction(10) ** int(exponent or "0")
    if not places and not exponent:
        return Number(value)
    return Number(value, max(len((integer + places).lstrip("0")), 1))


def number_in_base(numeral: str, base: int) -> Number:
    """Return the number that a numeral means in a base."""
    try:
        value = int(numeral, base)
    except ValueError as error:
        raise UnreadableError(f"{numeral} is not a number in base {base}") from error
    return Number(Fraction(value), base=base, numeral=numeral.lstrip("0") or "0")
