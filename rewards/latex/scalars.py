"""Compare values: numbers and formulas, with units, percent signs and ratios.

Expressions are equal if their values are: exactly if both are fractions, otherwise to at least 40 digits
relative to their size, and for formulas at several random points. Only a decimal with `MIN_DIGITS` or more
significant digits may be rounded: `0.333333` is 1/3, `0.33` is not.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from fractions import Fraction
from itertools import pairwise

from rlkit.rewards.latex.nodes import (
    Call,
    Name,
    Node,
    Number,
    Quantity,
    Words,
    variables,
    walk,
)
from rlkit.rewards.latex.units import Unit
from rlkit.rewards.latex.values import (
    TooLarge,
    Value,
    as_float,
    difference,
    evaluate,
    evaluate_both,
    half_unit,
    is_real,
    point_for,
    power_of_ten,
)

MIN_DIGITS = 6  # significant digits from which a decimal may be a rounded value
NUM_POINTS = 8  # number of points at which two formulas are compared
MIN_POINTS = 2  # number of these points at which both must have a value
ZERO, ONE = Number(Fraction(0)), Number(Fraction(1))
EXACTLY = 10**9  # as `min_digits`: no decimal may be rounded
SLACK = Fraction(1, 10**30)  # for rounding errors, where a decimal is off by exactly half a unit
DEGREES, RADIANS = Unit((("angle", 1),)), Unit((("radian", 1),))


def same_quantities(gold: Node, answer: Node) -> bool:
    """Compare values with units. A unit is optional, but must not be a wrong one."""
    gold_value, gold_unit = _split_unit(gold)
    answer_value, answer_unit = _split_unit(answer)
    gold_kind, answer_kind = gold_unit.dimensions, answer_unit.dimensions
    words = gold_unit.words, answer_unit.words
    if all(words) and not (words[0] <= words[1] or words[1] <= words[0]):
        return False
    if (gold_kind and answer_unit.words) or (gold_unit.words and answer_kind):
        return False
    if gold_kind == answer_kind:
        if gold_unit.scale != answer_unit.scale:
            gold_value = Call("*", (gold_value, Number(gold_unit.scale / answer_unit.scale)))
        return _same_plain(gold_value, answer_value)
    in_radians = [
        Call("degree", (value,)) if kind == DEGREES.dimensions else value
        for value, kind in ((gold_value, gold_kind), (answer_value, answer_kind))
    ]
    if {gold_kind, answer_kind} == {DEGREES.dimensions, RADIANS.dimensions}:
        return _same_plain(*in_radians)
    if (gold_kind and answer_kind) or _is_percentage(gold_value) or _is_percentage(answer_value):
        return False
    if _same_plain(gold_value, answer_value):
        return True
    # A number without a unit may be the angle in radians.
    return DEGREES.dimensions in (gold_kind, answer_kind) and _same_plain(*in_radians)


def _is_percentage(node: Node) -> bool:
    return isinstance(node, Call) and node.operator == "%"


def _split_unit(node: Node) -> tuple[Node, Unit]:
    if isinstance(node, Quantity):
        return node.value, node.unit
    if isinstance(node, Call) and node.operator == "degree":
        return node.arguments[0], DEGREES
    if isinstance(node, Call) and node.operator == "unary -":
        inner = node.arguments[0]
        if isinstance(inner, Call) and inner.operator == "degree":
            return Call("unary -", inner.arguments), DEGREES
    return node, Unit()


def _same_plain(gold: Node, answer: Node) -> bool:
    """Compare values without units: infinities, ratios, percentages and expressions."""
    signs = _sign_of_infinity(gold), _sign_of_infinity(answer)
    if any(signs):
        return signs[0] == signs[1]
    operators = [node.operator if isinstance(node, Call) else "" for node in (gold, answer)]
    if ":" in operators:
        return _same_ratios(gold, answer)
    if "mod" in operators:
        arguments = [
            node.arguments for node in (gold, answer) if isinstance(node, Call) and node.operator == "mod"
        ]
        return len(arguments) == 2 and all(same_value(a, b) for a, b in zip(*arguments, strict=True))
    if (operators[0] == "%") != (operators[1] == "%"):
        # The sign may be left out, where the question asks for a percentage, but not of a number below 1.
        plain, percentage = (answer, gold) if operators[0] == "%" else (gold, answer)
        number = percentage.arguments[0] if isinstance(percentage, Call) else percentage
        if same_value(gold, answer):
            return True
        value = evaluate(number, {}) if not variables(number) else None
        return value is not None and is_real(value) and abs(value) >= 1 and same_value(number, plain)
    return same_value(gold, answer)


def _sign_of_infinity(node: Node) -> int:
    if isinstance(node, Name) and node.name == "infinity" and node.is_constant:
        return 1
    if isinstance(node, Call) and node.operator == "unary -":
        return -_sign_of_infinity(node.arguments[0])
    return 0


def _same_ratios(gold: Node, answer: Node) -> bool:
    """Compare `1:2:3` up to a factor, a time such as `12:30` exactly, and `1:2` with the quotient 1/2."""
    parts, answer_parts = [
        node.arguments if isinstance(node, Call) and node.operator == ":" else () for node in (gold, answer)
    ]
    if not parts or not answer_parts:
        ratio, value = (parts, answer) if parts else (answer_parts, gold)
        if len(ratio) != 2 or _is_exact(ratio) or _is_clock_time(ratio):
            return False
        return same_value(Call("/", ratio), value)
    if len(parts) != len(answer_parts):
        return False
    if _is_exact(parts) or _is_exact(answer_parts) or _is_clock_time(parts):
        return all(_same_part(a, b) for a, b in zip(parts, answer_parts, strict=True))
    return all(
        same_value(Call("*", (a, d)), Call("*", (c, b)))
        for (a, b), (c, d) in zip(pairwise(parts), pairwise(answer_parts), strict=True)
    )


def _same_part(gold: Node, answer: Node) -> bool:
    return gold == answer or (not isinstance(gold, Words) and same_value(gold, answer))


def _is_exact(parts: Items[Node]) -> bool:
    """Return whether a ratio has a zero, or is a time with a.m. or p.m.: it has no multiples."""
    return isinstance(parts[-1], Words) or any(isinstance(part, Number) and part.value == 0 for part in parts)


def _is_clock_time(parts: Items[Node]) -> bool:
    """Return whether a ratio may be a time such as `12:30`."""
    numbers = [part.value for part in parts if isinstance(part, Number) and part.digits is None]
    return len(parts) == len(numbers) == 2 and numbers[0] <= 24 and 10 <= numbers[1] < 60


def same_value(gold: Node, answer: Node, min_digits: int = MIN_DIGITS) -> bool:
    """Return whether two expressions have the same value, wherever the first one is real.

    Raises:
        UnreadableError: One of them is no expression, or is too large.
    """
    if based := _compare_bases(gold, answer):
        return based == "same"
    names = variables(gold)
    if _has_base(answer) and not _has_base(gold):
        return False  # it may be the question
    if variables(answer) - names:
        return False
    num_equal = num_equal_complex = 0
    has_absolute_value = any(isinstance(below, Call) and below.operator == "abs" for below in walk(gold))
    for seed in range(NUM_POINTS if names else 1):
        try:
            pair = evaluate_both(gold, answer, point_for(names, seed))
        except TooLarge:
            if seed < MIN_POINTS or not names:
                raise
            continue
        a, b = pair.first, pair.second
        if a is None:
            continue
        if b is None:
            return False
        is_equal = _is_close(a, b, pair.magnitude, pair.digits) or _is_rounded(gold, a, answer, b, min_digits)
        if names and pair.is_first_complex:
            # Roots and logarithms of negative numbers have branches, so these points count only for formulas
            # that are complex everywhere.
            num_equal_complex += is_equal
            continue
        is_branch = bool(names) and pair.is_second_complex and (is_real(b) or not has_absolute_value)
        if not is_equal and not is_branch:
            return False
        num_equal += is_equal
    return num_equal >= (MIN_POINTS if names else 1) or (num_equal == 0 and num_equal_complex == NUM_POINTS)


def _compare_bases(gold: Node, answer: Node) -> str:
    """Compare numerals in a base: the base may be left out of the answer, but must not be another one."""
    bases = [node.base if isinstance(node, Number) else None for node in (gold, answer)]
    if bases == [None, None]:
        return ""
    if not (isinstance(gold, Number) and isinstance(answer, Number)):
        return "different"
    if gold.base is None:
        is_same = answer.base == 10 and gold.value == answer.value
    elif answer.base is None:
        is_same = answer.digits is None and str(answer.value) == gold.numeral
    else:
        is_same = gold.base == answer.base and gold.numeral == answer.numeral
    return "same" if is_same else "different"


def _has_base(node: Node) -> bool:
    return any(isinstance(below, Number) and below.base not in (None, 10) for below in walk(node))


def _is_close(a: Value, b: Value, magnitude: float, digits: float) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    return abs(difference(a, b)) <= power_of_ten(magnitude + 15 - digits)


def _is_rounded(gold: Node, gold_value: Value, answer: Node, answer_value: Value, min_digits: int) -> bool:
    """Return whether one is a decimal and the other is a number that rounds to it.

    A decimal may also round another decimal that has at least three more digits, but never an integer.
    """
    sides = ((gold, gold_value, answer, answer_value), (answer, answer_value, gold, gold_value))
    for decimal, rounded, exact, value in sides:
        digits, exact_digits = literal_digits(decimal), literal_digits(exact)
        is_integer = isinstance(value, Fraction) and value.denominator == 1
        if digits < min_digits or rounded == 0 or is_integer or (exact_digits and exact_digits < digits + 3):
            continue
        gap, limit = abs(as_float(difference(rounded, value))), half_unit(abs(as_float(rounded)), digits)
        if gap <= limit * (1 + as_float(SLACK)):
            return True
    return False


def literal_digits(node: Node) -> int:
    """Return the significant digits of a decimal, also with a sign or a power of ten; 0 for anything else."""
    if isinstance(node, Number):
        return node.digits or 0
    if isinstance(node, Call) and node.operator in ("unary -", "%", "degree"):
        return literal_digits(node.arguments[0])
    if isinstance(node, Call) and node.operator == "*" and not variables(node):
        factor = node.arguments[1]
        is_power = (
            isinstance(factor, Call)
            and factor.operator == "^"
            and factor.arguments[0] == Number(Fraction(10))
        )
        return literal_digits(node.arguments[0]) if is_power else 0
    return 0
