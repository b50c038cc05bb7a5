r"""Names of quantities, as on the left of `f(x) = 2x`."""

from __future__ import annotations

import re

from rlkit.rewards.latex.operands import ACCENTS, NOT_NAMES
from rlkit.rewards.latex.tokens import FUNCTIONS, Token
from rlkit.rewards.latex.units import read_unit

_POINTS = re.compile(r"[A-Z]{1,4}'?")
_DERIVATIVE = re.compile(
    r"frac\{?(d|partial)\^?\{?\d?\}?[A-Za-z]?(\([a-z]\))?\}?\{?(d|partial)[a-z]\^?\{?\d?\}?\}?"
)
_COORDINATES = re.compile(r"[(\[](?:[a-z](?:_\{?[0-9]\}?)?[,;]?)+[)\]]")
_SCRIPT = r"(?:\{[^{}]*\}|[^{}()\[\]])"
# Subscripts, primes and the inverse of a function, then its arguments.
_SUFFIX = re.compile(
    rf"(?:_{_SCRIPT}(?!\d)|\^(?:\{{-1\}}(?=[(\[])|\{{?(?:prime|\*)+\}}?)|'|prime)*"
    r"(?:[(\[][^()]*(?:\([^()]*\)[^()]*)*[)\]])?\|?"
)
_GEOMETRIC = ("angle", "triangle", "overline", "|", "Delta")


def read_name(tokens: list[Token]) -> str | None:
    """Return the text of tokens that name a quantity, such as `f^{-1}(x)`, `AB` or `\\sin A`, else None."""
    text = "".join(token.text for token in tokens)
    if not tokens or len(text) > 60:
        return None
    if _POINTS.fullmatch(text) or _DERIVATIVE.fullmatch(text) or _COORDINATES.fullmatch(text):
        return text
    if len(tokens) > 2 and tokens[0].text == "{" and tokens[2].text == "}":  # from `\vec{v}`
        tokens = [tokens[1], *tokens[3:]]
    i = 0
    while i < len(tokens) and tokens[i].text in _GEOMETRIC:
        i += 1
    if i == len(tokens):
        return None
    first, suffix = tokens[i], "".join(token.text for token in tokens[i + 1 :])
    if first.kind == "word":
        return text if read_unit(first.text) is not None else None
    if first.kind == "command" and first.text in FUNCTIONS:
        return text
    if first.text in ACCENTS:
        suffix = re.sub(rf"^{_SCRIPT}", "", suffix)
    elif first.kind != "letter" and (first.kind != "command" or first.text in NOT_NAMES):
        return None
    is_geometric = i > 0 and re.fullmatch(r"[A-Z]{0,3}\|?", suffix) is not None
    return text if is_geometric or _SUFFIX.fullmatch(suffix) else None
