r"""Names of quantities, as on the left of `f(x) = 2x`."""

from __future__ import annotations

import re

from rlkit.rewards.latex.operands import NOT_NAMES
from rlkit.rewards.latex.tokens import FUNCTIONS, Token
from rlkit.rewards.latex.units import read_unit

_MEASURED_NAME = re.compile(r"[A-Z]{1,4}'?")


def read_name(tokens: list[Token]) -> str | None:
    """Return the text of tokens that name a quantity, such as `f^{-1}(x)`, `AB` or `\\sin A`, else None."""
    text = "".join(token.text for token in tokens)
    if not tokens or len(text) > 60:
        return None
    if _MEASURED_NAME.fullmatch(text):
        return text
    if len(tokens) > 2 and tokens[0].text == "{" and tokens[2].text == "}":  # from `\\vec{v}`
        tokens = [tokens[1], *tokens[3:]]
    i = 0
    while i < len(tokens) and tokens[i].text in (
        "angle",
        "triangle",
        "overline",
        "|",
        "Delta",
        "operatorname",
    ):
        i += 1
    first = tokens[i] if i < len(tokens) else None
    if first is None:
        return None
    if first.text == "frac":
        return (
            text
            if re.fullmatch(
                r"frac\{?(d|partial)\^?\{?\d?\}?[A-Za-z]?(\([a-z]\))?\}?\{?(d|partial)[a-z]\^?\{?\d?\}?\}?",
                text,
            )
            else None
        )
    if first.text in ("(", "["):  # a point: `(x, y) = (1, 2)`
        return text if re.fullmatch(r"[(\[](?:[a-z](?:_\{?\w+\}?)?[,;]?)+[)\]]", text) else None
    if first.kind == "word":
        return text if read_unit(first.text) is not None else None
    if first.kind == "command" and first.text in FUNCTIONS:
        return text
    is_decorated = first.kind == "command" and first.text in (
        "hat",
        "bar",
        "dot",
        "ddot",
        "tilde",
        "widehat",
        "overline",
    )
    if not (
        first.kind == "letter" or (first.kind == "command" and first.text not in NOT_NAMES) or is_decorated
    ):
        return None
    suffix = "".join(token.text for token in tokens[i + 1 :])
    if i and re.fullmatch(r"[A-Z]{0,3}\|?", suffix):
        return text
    script = r"(?:\{[^{}]*\}|[^{}()\[\]])"
    decoration = rf"{script}?" if is_decorated else ""
    scripts = rf"(?:_{script}(?!\d)|\^(?:\{{-1\}}(?=[(\[])|\{{?(?:prime|\*)+\}}?)|'|prime)*"
    pattern = rf"{decoration}{scripts}(?:[(\[][^()]*(?:\([^()]*\)[^()]*)*[)\]])?\|?"
    if (
        any(token.text in "+-*/" for token in tokens if token.kind == "symbol")
        and "(" not in suffix
        and "^" not in suffix
    ):
        return None
    return text if re.fullmatch(pattern, suffix) else None
