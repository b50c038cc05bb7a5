r"""Decide whether an answer is equivalent to a reference answer.

Here are the rules for relations, lists, sets and matrices. `scalars` compares values, `equations` equations.
"""

from __future__ import annotations

import re
from collections.abc import Sequence as Items
from functools import lru_cache
from itertools import pairwise

from rlkit.rewards.latex.equations import are_proportional
from rlkit.rewards.latex.nodes import (
    Builder,
    Call,
    Matrix,
    NamedSet,
    Node,
    Quantity,
    Relation,
    Sequence,
    Side,
    Template,
    UnreadableError,
    Words,
    variables,
)
from rlkit.rewards.latex.notation import prepare
from rlkit.rewards.latex.parser import parse
from rlkit.rewards.latex.scalars import literal_digits, same_quantities, same_value
from rlkit.rewards.latex.sets import as_pieces, match_in_any_order, same_pieces
from rlkit.rewards.latex.tokens import clean, without_comma_groups
from rlkit.rewards.latex.units import read_unit

OTHERWISE = Words("otherwise")
MAX_DISTINCT = 24  # maximum number of items of a set that are compared pairwise
MAX_ITEMS = 40  # maximum number of items of an unordered list

_NUMBER_WITH_COMMAS = re.compile(r"[0-9],[0-9]{3}")
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
# A unit of one letter in plain text may be a variable, so it is read only if the reference has no variables.
_TRAILING_UNIT = re.compile(
    r"(.*[0-9})])(?:\s|\\[ ,;:]|~)*"
    r"([A-Za-z]{1,3}(?:\^?\{?[23]\}?)?(?:\s*/\s*[A-Za-z]{1,3}(?:\^?\{?[1-9]\}?)?)?)",
    re.DOTALL,
)


@lru_cache(maxsize=4096)  # the answers of a group have the same reference, and often the same text
def readings(text: str) -> tuple[Node, ...]:
    """Return what a string may mean: `1,000` is a number, or a list of two. Empty if it cannot be read."""
    nodes = []
    without_groups = text if "\\{" in text else without_comma_groups(text)
    for reading in dict.fromkeys((text, without_groups)):
        try:
            nodes.append(parse(reading))
        except (UnreadableError, RecursionError):
            continue
    return tuple(nodes)


def reference_readings(answer: str) -> tuple[Node, ...]:
    """Return what a reference answer means: `1,000` without another comma or a bracket is a number."""
    if _NUMBER_WITH_COMMAS.search(answer) and not re.search(r"[()\[\]{}]|,(?![0-9]{3}(?![0-9]))", answer):
        return readings(without_comma_groups(answer))
    return readings(answer)


def is_same_text(text: str, golds: Items[Node]) -> bool:
    """Return whether a string has a reading that equals one of the reference answer."""
    nodes = list(readings(text))
    if not any(variables(gold) for gold in golds) and (quantity := _read_trailing_unit(text)):
        nodes.append(quantity)
    return any(same(gold, node) for gold in golds for node in nodes)


def _read_trailing_unit(text: str) -> Node | None:
    match = _TRAILING_UNIT.fullmatch(clean(text))
    if match is None:
        return None
    unit = read_unit(re.sub(r"[{}\s]", "", match[2]))
    if unit is None or unit.words or not unit.dimensions:
        return None
    try:
        return Quantity(parse(match[1]), unit)
    except UnreadableError:
        return None


def same(gold: Node, answer: Node) -> bool:
    """Return whether an answer is equivalent to the reference answer; False if either has no value."""
    try:
        gold, answer = prepare(gold), prepare(answer)
        if _is_single(gold) != _is_single(answer):  # `\{5\}` is 5
            gold, answer = _without_braces(gold), _without_braces(answer)
        return _same(gold, answer)
    except (UnreadableError, RecursionError):
        return False


def _is_single(node: Node) -> bool:
    return isinstance(node, Sequence) and node.brackets == "{}" and len(node.items) == 1


def _without_braces(node: Node) -> Node:
    is_nested = (
        isinstance(node, Sequence) and isinstance(node.items[0], Sequence) and node.items[0].brackets == "{}"
    )
    return node.items[0] if isinstance(node, Sequence) and _is_single(node) and not is_nested else node


def _same(gold: Node, answer: Node) -> bool:
    if isinstance(gold, Template) or isinstance(answer, Template):
        return _same_templates(gold, answer)
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        return _same_relations(gold, answer)
    if isinstance(gold, Words) or isinstance(answer, Words):
        return gold == answer
    if _is_set(gold) or _is_set(answer):
        return _same_sets(gold, answer)
    if isinstance(gold, Sequence) or isinstance(answer, Sequence):
        return _same_sequences(gold, answer)
    if isinstance(gold, Matrix) or isinstance(answer, Matrix):
        return _same_matrices(gold, answer)
    return same_quantities(gold, answer)


def _same_templates(gold: Node, answer: Node) -> bool:
    if not (isinstance(gold, Template) and isinstance(answer, Template)) or len(gold.parts) != len(
        answer.parts
    ):
        return False
    return all(_same(g, a) for g, a in zip(gold.parts, answer.parts, strict=True))


def _same_relations(gold: Node, answer: Node) -> bool:
    if (
        isinstance(gold, Relation) and "~" in gold.operators and set(gold.operators) <= {"=", "~"}
    ):  # the exact value and the rounded one are right
        values, name = _equal_parts(gold)
        exact = (
            Relation((Side(Words(name), name), Side(value)), ("=",)) if name else value for value in values
        )
        return any(_same_or_false(candidate, answer) for candidate in exact)
    if isinstance(answer, Relation) and "~" in answer.operators:
        return _same_as_approximation(gold, answer)
    if isinstance(gold, Relation) and set(gold.operators) == {"="}:
        values, name = _equal_parts(gold)
        if (
            len(values) > 1
            and name is None
            and all(_same_or_false(values[-1], value) for value in values[:-1])
        ):
            gold = values[-1]  # a calculation, `2^3 = 8`
    gold_value, gold_name = _assigned(gold)
    if isinstance(answer, Relation) and set(answer.operators) == {"="}:
        values, name = _equal_parts(answer)
        if not isinstance(gold, Relation):
            return all(_same(gold, value) for value in values)
        if gold_value is not None and gold_name == name and all(_same(gold_value, value) for value in values):
            return True
        return _same_equations(gold, answer)
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return _same_equations(gold, answer) or _same_sets(gold, answer)
    if gold_value is not None:
        return _same(gold_value, answer)
    return _same_sets(gold, answer)


def _assigned(node: Node) -> tuple[Node | None, str | None]:
    """Return the value and the name of `name = value`; (None, None) for anything else."""
    if isinstance(node, Relation) and set(node.operators) == {"="} and node.sides[0].name is not None:
        return node.sides[-1].node, node.sides[0].name
    return None, None


def _equal_parts(relation: Relation) -> tuple[list[Node], str | None]:
    """Return the sides of `name = a = b` that must equal the reference, and the name or None.

    A function, such as `\\log_2 8` or `\\sin x`, is a value.
    """
    first, *values = relation.sides
    is_function = isinstance(first.node, Call) and first.node.operator not in ("*", "abs")
    is_named = bool(variables(first.node)) and not is_function
    if first.name is not None and (is_named or isinstance(first.node, Words)):
        return [side.node for side in values], first.name
    return [side.node for side in relation.sides], None


def _same_as_approximation(gold: Node, answer: Relation) -> bool:
    r"""Return whether an answer such as `\sqrt{2} \approx 1.414` is right.

    One side must equal the reference, and the others must be that side, rounded.
    """
    if set(answer.operators) - {"=", "~"}:
        return False
    gold_value, gold_name = _assigned(gold)
    values, name = _equal_parts(answer)
    if gold_name is not None and name is not None and name != gold_name:
        return False
    target = gold if gold_value is None else gold_value
    exact = next((value for value in values if _same_or_false(target, value)), None)
    return exact is not None and all(_is_rounding(exact, value) for value in values)


def _is_rounding(exact: Node, node: Node) -> bool:
    if _same(exact, node):
        return True
    first, second = _value_only(exact), _value_only(node)
    return bool(literal_digits(first) or literal_digits(second)) and same_value(first, second, min_digits=1)


def _value_only(node: Node) -> Node:
    return node.value if isinstance(node, Quantity) else node


def _same_equations(gold: Node, answer: Node) -> bool:
    """Return whether two relations are equivalent: the differences of their sides are proportional."""
    if not (isinstance(gold, Relation) and isinstance(answer, Relation)):
        return False
    gold_pairs, answer_pairs = _pairs(gold), _pairs(answer)
    if len(gold_pairs) != len(answer_pairs):
        return False
    return any(
        all(_same_pair(a, b) for a, b in zip(gold_pairs, pairs, strict=True))
        for pairs in (answer_pairs, answer_pairs[::-1])
    )


def _pairs(relation: Relation) -> list[tuple[Node, str, Node]]:
    return [
        (a.node, operator, b.node)
        for (a, b), operator in zip(pairwise(relation.sides), relation.operators, strict=True)
    ]


def _same_pair(gold: tuple[Node, str, Node], answer: tuple[Node, str, Node]) -> bool:
    a, operator, b = gold
    c, answer_operator, d = answer
    if operator == answer_operator and _same_or_false(a, c) and _same_or_false(b, d):
        return not _same_or_false(a, b)  # all identities, such as `x = x`, say nothing
    if operator not in ("=", "!=", "<", ">", "<=", ">="):
        return False
    if answer_operator in _FLIPPED and operator != answer_operator:
        c, answer_operator, d = d, _FLIPPED[answer_operator], c
    if operator != answer_operator:
        return False
    return are_proportional(Call("-", (a, b)), Call("-", (c, d)), positive=operator in _FLIPPED)


def _same_or_false(gold: Node, answer: Node) -> bool:
    try:
        return _same(gold, answer)
    except UnreadableError:
        return False


# Sets, lists and matrices


def _is_set(node: Node) -> bool:
    if isinstance(node, Call):
        return node.operator in ("cup", "cap", "setminus")
    return isinstance(node, NamedSet | Builder)


def _same_sets(gold: Node, answer: Node) -> bool:
    """Return whether two sets of real numbers are equal, as intervals, inequalities or unions."""
    if gold == answer and not isinstance(gold, Relation):
        return True
    first, second = as_pieces(gold), as_pieces(answer)
    if first is not None and second is not None:
        if first.variable and second.variable and first.variable != second.variable:
            return False
        return same_pieces(first.pieces, second.pieces, _same_or_false)
    if isinstance(gold, Builder) and isinstance(answer, Builder):
        return _same(gold.element, answer.element) and _same(gold.condition, answer.condition)
    if isinstance(gold, Call) and isinstance(answer, Call) and gold.operator == answer.operator:
        match_arguments = _all_same if gold.operator == "setminus" else _match
        return match_arguments(gold.arguments, answer.arguments)
    return False


def _same_sequences(gold: Node, answer: Node) -> bool:
    if isinstance(gold, Sequence) and isinstance(answer, Sequence):
        if _is_inequality(gold) != _is_inequality(answer) and as_pieces(gold) and as_pieces(answer):
            return _same_sets(gold, answer)
        return _same_items(gold, answer)
    if isinstance(gold, Matrix) or isinstance(answer, Matrix):  # a vector as a tuple
        gold_items, answer_items = _vector(gold), _vector(answer)
        return gold_items is not None and answer_items is not None and _all_same(gold_items, answer_items)
    first, second = as_pieces(gold), as_pieces(answer)
    if first is not None and second is not None and _is_inequality(gold) != _is_inequality(answer):
        return _same_sets(gold, answer)
    return False


def _is_inequality(node: Node) -> bool:
    relations = node.items if isinstance(node, Sequence) else (node,)
    return any(isinstance(item, Relation) for item in relations)


def _vector(node: Node) -> Items[Node] | None:
    """Return the entries of a tuple or of a matrix with one row or column."""
    if isinstance(node, Sequence):
        return node.items if node.brackets == "()" else None
    if (
        not isinstance(node, Matrix)
        or node.kind != "matrix"
        or (len(node.rows) > 1 and len(node.rows[0]) > 1)
    ):
        return None
    return [cell for row in node.rows for cell in row]


def _same_items(gold: Sequence, answer: Sequence) -> bool:
    gold_names, gold_items = _named_items(gold)
    answer_names, answer_items = _named_items(answer)
    if any(isinstance(item, Relation) for item in (*gold_items, *answer_items)):
        return _same_relation_lists(gold, answer)
    if len(set(gold_names)) > 1:  # `x = 1, y = 2`
        if len(set(answer_names)) > 1:
            if "or" in (gold.separator, answer.separator) and gold.separator != answer.separator:
                return False
            gold_pairs = list(zip(gold_names, gold_items, strict=True))
            answer_pairs = list(zip(answer_names, answer_items, strict=True))
            return match_in_any_order(gold_pairs, answer_pairs, _same_assignment)
        return not answer_names and answer.brackets in ("", "()") and _all_same(gold_items, answer_items)
    if len(set(answer_names)) > 1:
        by_name = [
            item for _, item in sorted(zip(answer_names, answer_items, strict=True), key=lambda pair: pair[0])
        ]
        return gold.brackets == "()" and not gold_names and _all_same(gold_items, by_name)
    if gold_names and answer_names and gold_names[0] != answer_names[0]:
        return False
    if (gold_names and answer.brackets == "()") or (answer_names and gold.brackets == "()"):
        return False  # `x = 1, 2` is no point
    brackets = gold.brackets, answer.brackets
    if "{}" in brackets:
        return set(brackets) <= {"{}", ""} and _match(_distinct(gold_items), _distinct(answer_items))
    if brackets == ("", ""):
        return _match(gold_items, answer_items) or _same_sets_of_inequalities(gold, answer)
    if brackets in (("", "()"), ("()", "")):
        return _all_same(gold_items, answer_items)
    return brackets[0] == brackets[1] and _all_same(gold_items, answer_items)


def _same_assignment(gold: tuple[str, Node], answer: tuple[str, Node]) -> bool:
    return gold[0] == answer[0] and _same_or_false(gold[1], answer[1])


def _named_items(sequence: Sequence) -> tuple[list[str], list[Node]]:
    """Return the names and values of `x = 1, y = 2`, or of `x = 1, 2`; no names for anything else."""
    if sequence.brackets:
        return [], list(sequence.items)
    assigned = [_assigned(item) for item in sequence.items]
    if all(name is not None for _, name in assigned):
        return [name or "" for _, name in assigned], [value for value, _ in assigned if value is not None]
    first_value, first_name = assigned[0]
    if first_name is not None and first_value is not None and all(name is None for _, name in assigned[1:]):
        return [first_name], [first_value, *sequence.items[1:]]
    return [], list(sequence.items)


def _same_relation_lists(gold: Sequence, answer: Sequence) -> bool:
    is_mixed = any(len({isinstance(item, Relation) for item in node.items}) > 1 for node in (gold, answer))
    if gold.brackets != answer.brackets or is_mixed:
        return False
    return _match(gold.items, answer.items) or _same_sets_of_inequalities(gold, answer)


def _same_sets_of_inequalities(gold: Node, answer: Node) -> bool:
    return _is_inequality(gold) and _is_inequality(answer) and _same_sets(gold, answer)


def _all_same(gold: Items[Node], answer: Items[Node]) -> bool:
    return len(gold) == len(answer) and all(_same_or_false(g, a) for g, a in zip(gold, answer, strict=True))


def _match(gold: Items[Node], answer: Items[Node]) -> bool:
    """Return whether two lists have the same items in any order, each as often."""
    if len(gold) > MAX_ITEMS:
        return False
    return match_in_any_order(gold, answer, _same_or_false)


def _distinct(items: Items[Node]) -> list[Node]:
    if len(items) > MAX_DISTINCT:
        return list(items)
    distinct: list[Node] = []
    for item in items:
        if not any(_same_or_false(item, earlier) for earlier in distinct):
            distinct.append(item)
    return distinct


def _same_matrices(gold: Node, answer: Node) -> bool:
    if not (isinstance(gold, Matrix) and isinstance(answer, Matrix)) or gold.kind != answer.kind:
        return False
    if gold.kind == "cases":
        return _same_cases(list(gold.rows), list(answer.rows))
    return len(gold.rows) == len(answer.rows) and all(
        _all_same(g, a) for g, a in zip(gold.rows, answer.rows, strict=True)
    )


def _same_cases(gold: list[tuple[Node, ...]], answer: list[tuple[Node, ...]]) -> bool:
    """Compare the rows of a piecewise definition in any order; `otherwise`, once, matches any condition."""
    if len(gold) > MAX_ITEMS or sum(row[-1] == OTHERWISE for row in answer) > 1:
        return False
    otherwise_last = sorted(gold, key=lambda row: row[-1] == OTHERWISE)
    return match_in_any_order(otherwise_last, answer, _same_case)


def _same_case(gold: tuple[Node, ...], answer: tuple[Node, ...]) -> bool:
    if len(gold) != len(answer) or not _same_or_false(gold[0], answer[0]):
        return False
    return OTHERWISE in (gold[-1], answer[-1]) or _all_same(gold[1:], answer[1:])
