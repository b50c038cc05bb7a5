"""Sets of real numbers as intervals: inequalities, intervals, unions and differences in one form."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cmp_to_key
from typing import TypeVar

from rlkit.rewards.latex.nodes import (
    Builder,
    Call,
    Name,
    NamedSet,
    Node,
    Relation,
    Sequence,
    UnreadableError,
    variables,
)
from rlkit.rewards.latex.values import Evaluator, Value, difference, is_real

T = TypeVar("T")
MAX_PIECES = 16  # maximum number of intervals of a set, which are compared pairwise
INFINITY = Name("infinity", is_constant=True)
MINUS_INFINITY = Call("unary -", (INFINITY,))
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}


@dataclass(frozen=True)
class Piece:
    """An interval, or a point if both ends are closed and equal."""

    low: Node
    high: Node
    has_low: bool
    has_high: bool


@dataclass(frozen=True)
class Pieces:
    """A union of intervals, and the variable of the inequality that states it."""

    pieces: tuple[Piece, ...]
    variable: str | None = None


REALS = Piece(MINUS_INFINITY, INFINITY, False, False)


def as_pieces(node: Node) -> Pieces | None:
    """Return a set of real numbers as intervals, or None if the node is none that we can read."""
    match node:
        case NamedSet("R"):
            return Pieces((REALS,))
        case NamedSet("empty"):
            return Pieces(())
        case Sequence(brackets, items) if (
            len(items) == 2 and len(brackets) == 2 and brackets[0] in "([" and brackets[1] in ")]"
        ):
            return Pieces((Piece(items[0], items[1], brackets[0] == "[", brackets[1] == "]"),))
        case Sequence("{}", items):
            return Pieces(tuple(Piece(item, item, True, True) for item in items))
        case Sequence("", items, separator):
            return _combine(items, separator)
        case Relation():
            return _inequality(node)
        case Builder(Name(name), condition):
            pieces = as_pieces(condition)
            return pieces if pieces is not None and pieces.variable in (None, name) else None
        case Builder(NamedSet("R"), condition):  # `x \in \mathbb{R}`, rewritten
            return as_pieces(condition)
        case Call("cup", (first, second)):
            return _join(as_pieces(first), as_pieces(second))
        case Call("cap", (first, second)):
            a, b = as_pieces(first), as_pieces(second)
            return None if a is None or b is None else _intersect(a, b)
        case Call("setminus", (first, second)):
            return _remove(as_pieces(first), as_pieces(second))
    return None


def _inequality(relation: Relation) -> Pieces | None:
    """Return the interval of `a < x \\le b`, `x > a` or `x \\ne a`, with one variable alone on a side."""
    sides, operators = [side.node for side in relation.sides], list(relation.operators)
    if not all(operator in _FLIPPED for operator in operators) or len(sides) > 3:
        return None
    for index in (1,) if len(sides) == 3 else (0, 1):
        name = _free_name(sides[index], sides[:index] + sides[index + 1 :])
        if name is not None:
            break
    else:
        return None
    if len(sides) == 3:
        if operators[0] in (">", ">="):
            sides, operators = sides[::-1], [_FLIPPED[operator] for operator in operators[::-1]]
        if not all(operator in ("<", "<=") for operator in operators):
            return None
        piece = Piece(sides[0], sides[2], operators[0] == "<=", operators[1] == "<=")
        return Pieces((piece,), name)
    bound, operator = sides[1 - index], operators[0]
    if index == 1:
        operator = _FLIPPED[operator]
    below = Piece(MINUS_INFINITY, bound, False, operator == "<=")
    above = Piece(bound, INFINITY, operator == ">=", False)
    if operator == "!=":
        return Pieces((below, above), name)
    return Pieces((below if operator in ("<", "<=") else above,), name)


def _free_name(side: Node, bounds: list[Node]) -> str | None:
    """Return the name of a variable that does not occur in its bounds, or None."""
    if not isinstance(side, Name) or side.is_constant or any(side.name in variables(b) for b in bounds):
        return None
    return side.name


def _combine(items: tuple[Node, ...], separator: str) -> Pieces | None:
    """Return `x < 1 or x > 3` as a union. Where the two overlap, `x > 2, x \\ne 3` means both at once."""
    if len(items) > MAX_PIECES:
        return None
    is_union = separator == "or"
    parts = [as_pieces(item) if is_union or isinstance(item, Relation) else None for item in items]
    unions = [part for part in parts if part is not None]
    if len(unions) != len(parts) or len({part.variable for part in unions}) != 1:
        return None
    result = unions[0]
    for part in unions[1:]:
        both = _intersect(result, part)
        if is_union or (separator == "," and not both.pieces):
            joined = _join(result, part)
            if joined is None:
                return None
            result = joined
        else:
            result = both
    return result


def _join(first: Pieces | None, second: Pieces | None) -> Pieces | None:
    if first is None or second is None:
        return None
    return Pieces(first.pieces + second.pieces, first.variable or second.variable)


def _remove(first: Pieces | None, second: Pieces | None) -> Pieces | None:
    if first is None or second is None:
        return None
    if len(second.pieces) > MAX_PIECES:
        return None
    for piece in second.pieces:
        below = Piece(MINUS_INFINITY, piece.low, False, not piece.has_low)
        above = Piece(piece.high, INFINITY, not piece.has_high, False)
        first = _intersect(first, Pieces(tuple(p for p in (below, above) if p.low != p.high)))
    return first


def _intersect(first: Pieces, second: Pieces) -> Pieces:
    """Return the intersection.

    Raises:
        UnreadableError: A bound is not a real number.
    """
    pieces = []
    for a in first.pieces:
        for b in second.pieces:
            low_order, high_order = compare_bounds(a.low, b.low), compare_bounds(a.high, b.high)
            low = a.low if low_order >= 0 else b.low
            high = a.high if high_order <= 0 else b.high
            has_low = (a.has_low or low_order < 0) and (b.has_low or low_order > 0)
            has_high = (a.has_high or high_order > 0) and (b.has_high or high_order < 0)
            order = compare_bounds(low, high)
            if order < 0 or (order == 0 and has_low and has_high):
                pieces.append(Piece(low, high, has_low, has_high))
    return Pieces(tuple(pieces), first.variable or second.variable)


def same_pieces(
    gold: tuple[Piece, ...], answer: tuple[Piece, ...], same: Callable[[Node, Node], bool]
) -> bool:
    """Return whether two unions of intervals are equal."""
    if all(not variables(bound) for piece in (*gold, *answer) for bound in (piece.low, piece.high)):
        gold, answer = _merge(gold), _merge(answer)
    return match_in_any_order(gold, answer, lambda a, b: _same_piece(a, b, same))


def match_in_any_order(gold: Items[T], answer: Items[T], same: Callable[[T, T], bool]) -> bool:
    """Return whether two sequences have the same items in any order, each as often."""
    if len(gold) != len(answer):
        return False
    unmatched = list(answer)
    for item in gold:
        i = next((i for i, candidate in enumerate(unmatched) if same(item, candidate)), None)
        if i is None:
            return False
        del unmatched[i]
    return True


def _same_piece(a: Piece, b: Piece, same: Callable[[Node, Node], bool]) -> bool:
    return (a.has_low, a.has_high) == (b.has_low, b.has_high) and same(a.low, b.low) and same(a.high, b.high)


def _merge(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """Return the pieces in order, with those that touch joined."""
    for piece in pieces:
        order = compare_bounds(piece.low, piece.high)
        if order > 0 or (order == 0 and not (piece.has_low and piece.has_high)):
            raise UnreadableError("an empty interval")
        if (piece.has_low and piece.low == MINUS_INFINITY) or (piece.has_high and piece.high == INFINITY):
            raise UnreadableError("an interval that contains infinity")
    merged: list[Piece] = []
    for piece in sorted(pieces, key=cmp_to_key(_compare_starts)):
        if merged:
            last = merged[-1]
            order = compare_bounds(piece.low, last.high)
            if order < 0 or (order == 0 and (piece.has_low or last.has_high)):
                ends = compare_bounds(piece.high, last.high)
                high, has_high = (piece.high, piece.has_high) if ends > 0 else (last.high, last.has_high)
                if ends == 0:
                    has_high = last.has_high or piece.has_high
                merged[-1] = Piece(last.low, high, last.has_low, has_high)
                continue
        merged.append(piece)
    return tuple(merged)


def _compare_starts(a: Piece, b: Piece) -> int:
    return compare_bounds(a.low, b.low) or b.has_low - a.has_low


def compare_bounds(a: Node, b: Node) -> int:
    """Return -1, 0 or 1 for two bounds that may be infinite.

    Raises:
        UnreadableError: A bound is not a real number.
    """
    infinities = [(bound == INFINITY) - (bound == MINUS_INFINITY) for bound in (a, b)]
    if any(infinities):
        return (infinities[0] > infinities[1]) - (infinities[0] < infinities[1])
    values: list[Value] = []
    for bound in (a, b):
        if variables(bound):
            raise UnreadableError("a bound with variables")
        value = Evaluator({}).evaluate(bound)
        if not is_real(value):
            raise UnreadableError("a bound that is not real")
        values.append(value)
    gap = difference(*values).real
    if abs(gap) <= 1e-40:
        return 0
    return 1 if gap > 0 else -1
