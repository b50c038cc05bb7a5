"""What a parsed answer consists of: expressions, and the sets, relations and words around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeAlias

from rlkit.rewards.latex.units import Unit


class UnreadableError(ValueError):
    """The text is not an answer that can be compared."""


@dataclass(frozen=True)
class Number:
    """A literal. `digits` is the number of significant digits of a decimal, None for an exact number.

    `base` is the base of a numeral such as `52_8`, with `numeral` as it is written.
    """

    value: Fraction
    digits: int | None = None
    base: int | None = None
    numeral: str = ""


@dataclass(frozen=True)
class Name:
    """A variable such as `x`, `v_0` or `y'`, or a constant: "pi", "e", "i", "infinity"."""

    name: str
    is_constant: bool = False


@dataclass(frozen=True)
class Call:
    """An operator or function applied to arguments, such as "+" or "sin"."""

    operator: str
    arguments: tuple[Node, ...]


@dataclass(frozen=True)
class Sequence:
    """Items between brackets: "()", "[]", "(]", "[)", "{}", or "" for a list without brackets.

    `separator` is "or", "and" or ",".
    """

    brackets: str
    items: tuple[Node, ...]
    separator: str = ","


@dataclass(frozen=True)
class Matrix:
    """Rows of a matrix-like environment; `kind` is "matrix", "determinant" or "cases"."""

    kind: str
    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True)
class Side:
    """One side of a relation. `name` is its text if it names a quantity, as in `f(x) = ...`, else None."""

    node: Node
    name: str | None = None


@dataclass(frozen=True)
class Relation:
    """A chain `a = b < c`: the sides and the operators between them."""

    sides: tuple[Side, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True)
class NamedSet:
    """A set of numbers: "R", "Z", "Q", "N", "C", or "empty"."""

    name: str


@dataclass(frozen=True)
class Builder:
    """A set `{x | condition}`."""

    element: Node
    condition: Node


@dataclass(frozen=True)
class Words:
    """An answer in words, normalized."""

    text: str


@dataclass(frozen=True)
class Quantity:
    """A value with a unit."""

    value: Node
    unit: Unit


@dataclass(frozen=True)
class Template:
    """Words and expressions in turn, such as `Alice: 5, Bob: 6`."""

    parts: tuple[Node, ...]


Node: TypeAlias = (
    Number | Name | Call | Sequence | Matrix | Relation | NamedSet | Builder | Words | Quantity | Template
)


def children(node: Node) -> tuple[Node, ...]:
    """Return the nodes directly below a node."""
    match node:
        case Call(arguments=nodes) | Sequence(items=nodes) | Template(parts=nodes):
            return nodes
        case Matrix(rows=rows):
            return tuple(cell for row in rows for cell in row)
        case Relation(sides=sides):
            return tuple(side.node for side in sides)
        case Builder(element, condition):
            return element, condition
        case Quantity(value=value):
            return (value,)
    return ()


def walk(node: Node) -> Iterator[Node]:
    """Yield a node and all nodes below it."""
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        stack += children(current)


def height(node: Node) -> int:
    """Return the number of levels of a tree."""
    levels, level = 0, [node]
    while level:
        levels, level = levels + 1, [child for below in level for child in children(below)]
    return levels


def transform(node: Node, change: Callable[[Node], Node]) -> Node:
    """Return the node with `change` applied to every node below it, then to itself."""

    def visit(below: Node) -> Node:
        return transform(below, change)

    match node:
        case Call(arguments=nodes):
            node = replace(node, arguments=tuple(map(visit, nodes)))
        case Sequence(items=nodes):
            node = replace(node, items=tuple(map(visit, nodes)))
        case Template(parts=nodes):
            node = replace(node, parts=tuple(map(visit, nodes)))
        case Matrix(rows=rows):
            node = replace(node, rows=tuple(tuple(map(visit, row)) for row in rows))
        case Relation(sides=sides):
            node = replace(node, sides=tuple(replace(side, node=visit(side.node)) for side in sides))
        case Builder(element, condition):
            node = Builder(visit(element), visit(condition))
        case Quantity(value=value):
            node = replace(node, value=visit(value))
    return change(node)


def variables(node: Node) -> frozenset[str]:
    """Return the names of the variables in a node."""
    return frozenset(below.name for below in walk(node) if isinstance(below, Name) and not below.is_constant)
