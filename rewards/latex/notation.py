"""Rewrite an answer before it is compared: `\\pm` as two values, words for sets, sums of matrices."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from rlkit.rewards.latex.nodes import (
    Call,
    Matrix,
    Name,
    NamedSet,
    Node,
    Number,
    Relation,
    Sequence,
    Words,
    transform,
    walk,
)

_WORD_SYNONYMS = {
    "dne": "does not exist",
    "no solutions": "no solution",
    "no real solutions": "no real solution",
    "not defined": "undefined",
    "none of these": "none of the above",
    "all reals": "all real numbers",
}
_WORD_SETS = {
    "all real numbers": NamedSet("R"),
    "empty set": NamedSet("empty"),
    "the empty set": NamedSet("empty"),
    "no solution": NamedSet("empty"),
    "no real solution": NamedSet("empty"),
}


def prepare(node: Node) -> Node:
    """Expand `\\pm`, and replace words and signs that have another notation."""
    if any(
        isinstance(below, Call) and below.operator in ("pm", "mp", "unary pm", "unary mp")
        for below in walk(node)
    ):
        node = _expand_signs(node)
    return transform(node, _replace_notation)


def _expand_signs(node: Node) -> Node:
    """Return a list of the two values of an expression with `\\pm`, also inside a relation or list."""
    if isinstance(node, Sequence) and not node.brackets:
        items = [_expand_signs(item) for item in node.items]
        flat = [
            part
            for item in items
            for part in (item.items if isinstance(item, Sequence) and not item.brackets else [item])
        ]
        return replace(node, items=tuple(flat))
    if isinstance(node, Sequence) and node.brackets == "{}":
        expanded = _expand_signs(Sequence("", node.items))
        return replace(node, items=expanded.items) if isinstance(expanded, Sequence) else node
    if not any(isinstance(below, Call) and below.operator.endswith(("pm", "mp")) for below in walk(node)):
        return node

    def choose(sign: str) -> Node:
        def change(below: Node) -> Node:
            if not isinstance(below, Call) or not below.operator.endswith(("pm", "mp")):
                return below
            plus = below.operator.endswith("pm") == (sign == "+")
            if below.operator.startswith("unary"):
                return below.arguments[0] if plus else Call("unary -", below.arguments)
            return Call("+" if plus else "-", below.arguments)

        return transform(node, change)

    return Sequence("", (choose("+"), choose("-")), "or")


def _replace_notation(node: Node) -> Node:
    if isinstance(node, Words):
        text = _WORD_SYNONYMS.get(node.text, node.text)
        return _WORD_SETS.get(text, Words(text))
    if isinstance(node, Relation) and node.operators == ("in",) and _is_variable(node.sides[0].node):
        return node.sides[1].node  # `x \in S`: the set is the answer
    if isinstance(node, Call) and any(isinstance(argument, Matrix) for argument in node.arguments):
        return _combine_matrices(node)
    return node


def _combine_matrices(node: Call) -> Node:
    """Return a sum of matrices, or a matrix times a number, as one matrix."""
    if node.operator == "unary -":
        node = Call("*", (Number(Fraction(-1)), *node.arguments))
    if len(node.arguments) != 2:
        return node
    first, second = node.arguments
    if isinstance(first, Matrix) and isinstance(second, Matrix):
        shapes = [[len(row) for row in matrix.rows] for matrix in (first, second)]
        if (
            node.operator not in ("+", "-")
            or shapes[0] != shapes[1]
            or {first.kind, second.kind} != {"matrix"}
        ):
            return node
        return Matrix("matrix", tuple(
            tuple(Call(node.operator, (a, b)) for a, b in zip(row_a, row_b, strict=True))
            for row_a, row_b in zip(first.rows, second.rows, strict=True)
        ))  # fmt: skip
    matrix, number = (first, second) if isinstance(first, Matrix) else (second, first)
    if (
        not isinstance(matrix, Matrix)
        or matrix.kind != "matrix"
        or not isinstance(number, Number | Name | Call)
    ):
        return node
    if node.operator != "*" and (node.operator != "/" or matrix is second):
        return node
    return Matrix(
        "matrix", tuple(tuple(Call(node.operator, (cell, number)) for cell in row) for row in matrix.rows)
    )


def _is_variable(node: Node) -> bool:
    return isinstance(node, Name) and not node.is_constant
