r"""Read a LaTeX expression and compare two, with math-verify, and without evaluating the huge ones.

`9^{9^{9^{9}}}` is short, and sympy never finishes it. Texts are judged by length and depth before they are
read, expressions by the size of their value before they are evaluated. Sizes are estimates: what slips
through is left to the time limit of the process. Everything here works in any thread.
"""

from __future__ import annotations

import logging
import math
import re
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sympy import Basic

MOST_CHARACTERS = 300
MOST_DEPTH = 8  # of brackets: the parser's time grows exponentially with it
MOST_DIGITS = 10_000
TERM_DIGITS = 50  # what a term of an expanded power counts

# The parser itself evaluates these.
_EAGER = re.compile(r"binom|choose|[CP]_|gcd|lcm")


@cache
def _math_verify() -> ModuleType:
    import math_verify

    # It warns once that its time limits are off, which is on purpose: they work in the main thread only.
    for name in ("parser", "grader"):
        logging.getLogger(f"math_verify.{name}").setLevel(logging.ERROR)
    return math_verify


def parse_latex(text: str) -> Basic | None:
    """The sympy expression that a text writes, unevaluated; None if it cannot be read or is too large.

    An integral, sum, product, limit or derivative counts as too large: it is a question, not an answer.
    """
    library = _math_verify()
    if not is_modest(text):
        return None
    found = library.parse(
        f"\\boxed{{{text}}}",
        [library.LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return found[0] if found and digits(found[0]) <= MOST_DIGITS else None


def same_value(answer: Basic, expression: Basic) -> bool:
    """Whether math-verify takes two expressions for the same. Raises whatever sympy raises."""
    import sympy

    if isinstance(expression, sympy.Expr) and expression.free_symbols and not answer.free_symbols:
        return False  # a formula is no number; to simplify it would take long
    return bool(_math_verify().verify(answer, expression, timeout_seconds=None, raise_on_error=True))


def is_modest(text: str) -> bool:
    """Whether a text is short, shallow and harmless enough to be read."""
    if not text or len(text) > MOST_CHARACTERS:
        return False
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth > MOST_DEPTH:
            return False
    return not (_EAGER.search(text) and re.search("[0-9]{4}", text))


def digits(expression: Basic) -> float:
    """A rough upper bound of the decimal digits that evaluating an expression takes, possibly infinite."""
    import sympy

    if isinstance(expression, sympy.Rational):
        return max(abs(expression.p), expression.q).bit_length() * math.log10(2)
    if isinstance(expression, sympy.Float):
        _, _, exponent, bits = expression._mpf_
        return abs(exponent + bits) * math.log10(2)
    if isinstance(expression, sympy.Integral | sympy.Sum | sympy.Product | sympy.Limit | sympy.Derivative):
        return math.inf
    parts = [digits(argument) for argument in getattr(expression, "args", ())]
    if isinstance(expression, sympy.Pow | sympy.exp):
        return _digits_of_power(expression, parts)
    if isinstance(expression, sympy.factorial | sympy.factorial2 | sympy.binomial | sympy.gamma):
        return max(parts) * _power_of_ten(max(parts))
    if isinstance(expression, sympy.Mul):
        return sum(parts)
    return max(parts, default=0.0) + (math.log10(len(parts)) if isinstance(expression, sympy.Add) else 0)


def _digits_of_power(power: Basic, parts: list[float]) -> float:
    """Digits of a power, or TERM_DIGITS for each term of an expanded sum: C(n + k - 1, k - 1) of them."""
    exponent = _power_of_ten(parts[-1])
    base = power.args[0]
    if len(parts) == 1:  # exp(x)
        return 0.5 * exponent
    if base.is_Add and base.free_symbols and exponent < math.inf:
        terms = math.comb(int(exponent) + len(base.args) - 1, len(base.args) - 1)
        return TERM_DIGITS * float(min(terms, MOST_DIGITS))
    return parts[0] * exponent


def _power_of_ten(exponent: float) -> float:
    return 10.0**exponent if exponent < 6 else math.inf
