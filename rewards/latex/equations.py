"""Equivalence of equations and inequalities: the differences of their sides are multiples of each other."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from rlkit.rewards.latex.nodes import Call, Name, Node, transform, variables, walk
from rlkit.rewards.latex.scalars import EXACTLY, NUM_POINTS, ONE, ZERO, same_value
from rlkit.rewards.latex.values import TooLarge, difference, evaluate, is_real, point_for

MAX_DIVISIONS = 8  # maximum number of divisions to clear; each one doubles the equation


def are_proportional(gold: Node, answer: Node, positive: bool) -> bool:
    """Return whether one expression is a constant multiple of the other and neither is 0 everywhere."""
    names = variables(gold)
    if not names or names != variables(answer):
        return False
    num_divisions = sum(
        isinstance(b, Call) and b.operator == "/" for node in (gold, answer) for b in walk(node)
    )
    if not positive and num_divisions <= MAX_DIVISIONS:
        # An equation may be multiplied by its denominators, an inequality may not.
        gold, answer = _numerator(gold)[0], _numerator(answer)[0]
    if same_value(gold, ZERO, EXACTLY) or same_value(answer, ZERO, EXACTLY):
        return False
    # f = c g for a constant c exactly if f(x) g(y) = f(y) g(x).
    elsewhere = {name: f"{name} elsewhere" for name in names}
    renamed = [_rename(node, elsewhere) for node in (gold, answer)]
    if not same_value(Call("*", (gold, renamed[1])), Call("*", (renamed[0], answer)), EXACTLY):
        return False
    return not positive or _is_positive(Call("*", (gold, answer)))


def _rename(node: Node, names: Mapping[str, str]) -> Node:
    def change(below: Node) -> Node:
        return Name(names[below.name]) if isinstance(below, Name) and not below.is_constant else below

    return transform(node, change)


def _is_positive(node: Node) -> bool:
    for seed in range(NUM_POINTS):
        try:
            value = evaluate(node, point_for(variables(node), seed))
        except TooLarge:
            continue
        if value is not None and (not is_real(value) or difference(value, Fraction(0)).real <= 0):
            return False
    return True


def _numerator(node: Node) -> tuple[Node, Node]:
    """Return the numerator and denominator of an expression as one fraction."""
    if isinstance(node, Call) and node.operator in ("+", "-"):
        (a, b), (c, d) = map(_numerator, node.arguments)
        if b == d:
            return Call(node.operator, (a, c)), b
        return Call(node.operator, (_product(a, d), _product(c, b))), _product(b, d)
    if isinstance(node, Call) and node.operator in ("*", "/"):
        (a, b), (c, d) = map(_numerator, node.arguments)
        if node.operator == "/":
            c, d = d, c
        return _product(a, c), _product(b, d)
    if isinstance(node, Call) and node.operator == "unary -":
        a, b = _numerator(node.arguments[0])
        return Call("unary -", (a,)), b
    return node, ONE


def _product(a: Node, b: Node) -> Node:
    if ONE in (a, b):
        return b if a == ONE else a
    return Call("*", (a, b))
