"""Numerals: decimals, e-notation and other bases."""

from __future__ import annotations

from fractions import Fraction

from rlkit.rewards.latex.nodes import Number, UnreadableError

MAX_DIGITS = 1000  # of a literal
BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
          "twelve": 12, "sixteen": 16}  # fmt: skip
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def read_number(text: str) -> Number:
    """Parse a literal such as `3`, `0.50` or `3e8`; `digits` counts its significant digits."""
    mantissa, _, exponent = text.lower().partition("e")
    if len(mantissa) > MAX_DIGITS or abs(int(exponent or "0")) > MAX_DIGITS:
        raise UnreadableError("a number with too many digits")
    integer, _, places = mantissa.partition(".")
    value = Fraction(int((integer + places) or "0"), 10 ** len(places)) * Fraction(10) ** int(exponent or "0")
    if not places and not exponent:
        return Number(value)
    return Number(value, max(len((integer + places).lstrip("0")), 1))


def number_in_base(numeral: str, base: int) -> Number:
    """Return the number that a numeral means in a base."""
    digits = [_DIGITS.index(digit) for digit in numeral.lower()]
    if max(digits) >= base:
        raise UnreadableError(f"{numeral} is not a number in base {base}")
    value = 0
    for digit in digits:
        value = value * base + digit
    return Number(Fraction(value), base=base, numeral=numeral.lstrip("0") or "0")
