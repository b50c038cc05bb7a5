r"""Parse and compare LaTeX expressions with math-verify, without evaluating huge ones.

`9^{9^{9^{9}}}` is short, yet sympy never finishes evaluating it. So LaTeX is checked for length and depth
before it is parsed, and an expression for the size of its value before it is evaluated. Sizes are estimates:
the time limit of the reward process catches what slips through. Everything here works in any thread.
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

MAX_CHARACTERS = 300
MAX_DEPTH = 8  # of nested brackets: parsing time grows exponentially with it
MAX_DIGITS = 10_000
TERM_DIGITS = 50  # digits assumed for each term of an expanded power

# The parser evaluates these while it parses, before the size of the value can be estimated.
_EVALUATED_BY_PARSER = re.compile(r"binom|choose|[CP]_|gcd|lcm")


@cache
def _math_verify() -> ModuleType:
    import math_verify

    # math-verify warns that its timeouts are off. They are off on purpose: they work only in the main thread.
    for name in ("parser", "grader"):
        logging.getLogger(f"math_verify.{name}").setLevel(logging.ERROR)
    return math_verify


def parse_latex(text: str) -> Basic | None:
    """Parse LaTeX to an unevaluated sympy expression; None if it cannot be parsed or is too large.

    An integral, sum, product, limit or derivative counts as too large: it is a question, not an answer.
    """
    library = _math_verify()
    if not is_cheap_to_parse(text):
        return None
    # In a box, so that math-verify parses all of the LaTeX instead of searching it for an answer.
    parsed = library.parse(
        f"\\boxed{{{text}}}",
        [library.LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    if not parsed or estimate_digits(parsed[0]) > MAX_DIGITS:
        return None
    return parsed[0]


def same_value(answer: Basic, expression: Basic) -> bool:
    """Return whether math-verify finds two expressions equal. Raises whatever sympy raises."""
    import sympy

    if isinstance(expression, sympy.Expr) and expression.free_symbols and not answer.free_symbols:
        return False  # a formula with variables is not a number, and simplifying it would be slow
    return bool(_math_verify().verify(answer, expression, timeout_seconds=None, raise_on_error=True))


def is_cheap_to_parse(text: str) -> bool:
    """Return whether LaTeX is short and shallow, without large arguments of functions evaluated eagerly."""
    if not text or len(text) > MAX_CHARACTERS:
        return False
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth > MAX_DEPTH:
            return False
    return not (_EVALUATED_BY_PARSER.search(text) and re.search("[0-9]{4}", text))


def estimate_digits(expression: Basic) -> float:
    """Return a rough upper bound on the decimal digits of an expression's value; it may be infinite."""
    import sympy

    if isinstance(expression, sympy.Rational):
        # The denominator counts, too: 10^{-n} is as expensive as 10^n.
        return max(abs(expression.p), expression.q).bit_length() * math.log10(2)
    if isinstance(expression, sympy.Float):
        _, _, exponent, bits = expression._mpf_  # mpmath's (sign, mantissa, exponent, bits of the mantissa)
        return abs(exponent + bits) * math.log10(2)
    if isinstance(expression, sympy.Integral | sympy.Sum | sympy.Product | sympy.Limit | sympy.Derivative):
        return math.inf
    parts = [estimate_digits(argument) for argument in getattr(expression, "args", ())]
    if isinstance(expression, sympy.Pow | sympy.exp):
        return _estimate_power_digits(expression, parts)
    if isinstance(expression, sympy.factorial | sympy.factorial2 | sympy.binomial | sympy.gamma):
        return max(parts) * _power_of_ten(max(parts))  # log10(n!) < n log10(n)
    if isinstance(expression, sympy.Mul):
        return sum(parts)
    return max(parts, default=0.0) + (math.log10(len(parts)) if isinstance(expression, sympy.Add) else 0)


def _estimate_power_digits(power: Basic, parts: list[float]) -> float:
    """Return the digits of a power. (x1 + ... + xk)^n expands to C(n + k - 1, k - 1) terms."""
    exponent = _power_of_ten(parts[-1])
    base = power.args[0]
    if len(parts) == 1:  # exp(x), and log10(e) < 0.5
        return 0.5 * exponent
    if base.is_Add and base.free_symbols and exponent < math.inf:
        terms = math.comb(int(exponent) + len(base.args) - 1, len(base.args) - 1)
        return TERM_DIGITS * float(min(terms, MAX_DIGITS))
    return parts[0] * exponent


def _power_of_ten(exponent: float) -> float:
    return 10.0**exponent if exponent < 6 else math.inf  # far above MAX_DIGITS in any case
