"""Parse prompts in the RLCausal layout, from any source, back into a model and a query.

The input is untrusted: it is parsed line by line with regular expressions that cannot backtrack far, sizes
are bounded, nothing is evaluated, and anything that does not fit raises `UserError` with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from rlkit.envs.causal.model import CausalModel, CausalQuery
from rlkit.errors import UserError, nearest

MAX_CHARACTERS = 1_000_000
MAX_VARIABLES = 200
MAX_ROWS = 4096  # of one table
MAX_VALUES = 64  # of one variable

# Every repetition is bounded, and every pattern starts with a literal or is matched against a single line, so
# that no prompt can make the regular expressions slow.
_NAME = r"([A-Za-z_][A-Za-z0-9_]{0,63})"
_VALUE = r"([A-Za-z0-9_]{1,64})"
_DOMAIN = re.compile(_NAME + r" can take values in \[([A-Za-z0-9_, ]{1,1000})\]")
_EDGE = re.compile(_NAME + r" -> " + _NAME + r";?")
_ROW = re.compile(r"P\(" + _NAME + r"(?: \| ([A-Za-z0-9_=, ]{1,2000}))?\) = \[([0-9., ]{1,2000})\]")
_NUMBER = re.compile(r"[0-9]{1,3}(?:\.[0-9]{0,20})?|\.[0-9]{1,20}")
_QUESTION = re.compile(r"What is the marginal distribution of " + _NAME + r"(?:\s+given ([^?\n]{1,300}))?\?")
# "intervented" is the spelling of the RLCausal release.
_CONDITIONS = (
    re.compile(r"it is observed that (?P<o>\w{1,64}) ?= ?(?P<x>\w{1,64})", re.ASCII),
    re.compile(r"we interven(?:t)?ed to set (?P<j>\w{1,64}) to (?P<c>\w{1,64})", re.ASCII),
    re.compile(
        r"we first observed (?P<o>\w{1,64}) ?= ?(?P<x>\w{1,64}) and then"
        r" interven(?:t)?ed to set (?P<j>\w{1,64}) to (?P<c>\w{1,64})",
        re.ASCII,
    ),
)

Prompt = str | Sequence[Mapping[str, str]]


def read_prompt(prompt: Prompt) -> tuple[CausalModel, CausalQuery]:
    """Parse the model and the query of a prompt.

    Args:
        prompt: Chat messages, or their content as one string.

    Returns:
        The model, with nodes in a topological order and rows scaled to sum to 1, and the query.

    Raises:
        UserError: The prompt is not in this layout, or contradicts itself.
    """
    text = prompt if isinstance(prompt, str) else "\n".join(str(m.get("content", "")) for m in prompt)
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"the prompt has {len(text)} characters, the maximum is {MAX_CHARACTERS}")
    lines = [line.strip() for line in text.splitlines()]
    domains = _read_domains(lines)
    rows = _read_rows(lines, domains)
    parents = {name: row_parents for name, (row_parents, _) in rows.items()}
    _check_edges(lines, parents)
    order = _topological(parents)
    index = {name: i for i, name in enumerate(order)}
    model = CausalModel(
        names=tuple(order),
        parents=tuple(tuple(index[p] for p in parents[name]) for name in order),
        tables=tuple(_table(name, *rows[name], domains) for name in order),
    )
    return model, _read_question(text, index, domains)


def _read_domains(lines: Sequence[str]) -> dict[str, list[str]]:
    domains: dict[str, list[str]] = {}
    for match in filter(None, map(_DOMAIN.fullmatch, lines)):
        values = [value.strip() for value in match[2].split(",")]
        if match[1] in domains or len(set(values)) != len(values) or not 2 <= len(values) <= MAX_VALUES:
            raise UserError(
                f"the values of {match[1]} must be listed once, with 2 to {MAX_VALUES} distinct values"
            )
        domains[match[1]] = values
    if not 1 <= len(domains) <= MAX_VARIABLES:
        raise UserError(
            f"found {len(domains)} lines 'NAME can take values in [..]', expected 1 to {MAX_VARIABLES}"
        )
    return domains


Rows = dict[tuple[int, ...], list[float]]


def _read_rows(lines: Sequence[str], domains: Mapping[str, list[str]]) -> dict[str, tuple[list[str], Rows]]:
    """Return each variable's parents, in the order of its first row, and its rows by parent assignment."""
    variables: dict[str, tuple[list[str], Rows]] = {}
    for match in filter(None, map(_ROW.fullmatch, lines)):
        name = _declared(match[1], domains)
        pairs = [_assignment(part, domains) for part in match[2].split(",")] if match[2] else []
        parents, rows = variables.setdefault(name, ([p for p, _ in pairs], {}))
        key = tuple(value for _, value in pairs)
        if parents != [p for p, _ in pairs] or len(set(parents)) != len(parents) or key in rows:
            raise UserError(
                f"the rows of P({name} | ..) repeat, or do not list the same parents in the same order"
            )
        rows[key] = _distribution(match[3], len(domains[name]), match[0])
    missing = [name for name in domains if name not in variables]
    if missing:
        raise UserError(f"there is no row P({missing[0]}) = [..]")
    return variables


def _declared(name: str, domains: Mapping[str, list[str]]) -> str:
    """Return the name, or raise `UserError` if the prompt does not list its values."""
    if name not in domains:
        raise UserError(f"the values of {name} are not listed{nearest(name, domains)}")
    return name


def _value(name: str, value: str, domains: Mapping[str, list[str]]) -> int:
    values = domains[_declared(name, domains)]
    if value not in values:
        raise UserError(f"{name} cannot be {value}; its values are {', '.join(values)}")
    return values.index(value)


def _assignment(text: str, domains: Mapping[str, list[str]]) -> tuple[str, int]:
    name, _, value = text.strip().partition("=")
    return name.strip(), _value(name.strip(), value.strip(), domains)


def _distribution(text: str, size: int, line: str) -> list[float]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != size or not all(_NUMBER.fullmatch(part) for part in parts):
        raise UserError(f"expected {size} probabilities in {line[:80]!r}")
    row = [float(part) for part in parts]
    # Each printed value has a rounding error of at most 0.005, so the sum may differ from 1.
    if max(row) > 1 or abs(sum(row) - 1) > 0.005 * size + 1e-9:
        raise UserError(f"the probabilities do not sum to 1 in {line[:80]!r}")
    return [p / sum(row) for p in row]


def _check_edges(lines: Sequence[str], parents: Mapping[str, list[str]]) -> None:
    edges = {(m[1], m[2]) for m in filter(None, map(_EDGE.fullmatch, lines))}
    from_tables = {(parent, name) for name, node_parents in parents.items() for parent in node_parents}
    if edges != from_tables:
        a, b = min(edges ^ from_tables)  # the first in alphabetical order, so that the message is stable
        raise UserError(f"the graph and the tables disagree about the edge {a} -> {b}")


def _topological(parents: Mapping[str, list[str]]) -> list[str]:
    """Return the variables in topological order, ties in the order of the prompt."""
    order: list[str] = []
    remaining = list(parents)
    while remaining:
        ready = next((name for name in remaining if set(parents[name]) <= set(order)), None)
        if ready is None:
            raise UserError("the graph has a cycle")
        order.append(ready)
        remaining.remove(ready)
    return order


def _table(name: str, parents: list[str], rows: Rows, domains: Mapping[str, list[str]]) -> np.ndarray:
    shape = [len(domains[p]) for p in parents]
    if prod(shape) > MAX_ROWS:
        raise UserError(f"P({name} | ..) needs {prod(shape)} rows, the maximum is {MAX_ROWS}")
    if len(rows) != prod(shape):
        raise UserError(
            f"P({name} | ..) has {len(rows)} rows, but its parents have {prod(shape)} assignments"
        )
    return np.array([rows[key] for key in sorted(rows)]).reshape(*shape, len(domains[name]))


def _read_question(text: str, index: Mapping[str, int], domains: Mapping[str, list[str]]) -> CausalQuery:
    questions = list(_QUESTION.finditer(text))
    if len(questions) != 1:
        raise UserError(
            f"found {len(questions)} questions 'What is the marginal distribution of ..?', expected 1"
        )
    target, condition = questions[0].groups()
    if condition is None:
        return CausalQuery(index[_declared(target, domains)])
    match = next(filter(None, (pattern.fullmatch(condition.strip()) for pattern in _CONDITIONS)), None)
    if match is None:
        raise UserError(f"cannot parse the condition {condition[:80]!r}")
    fields = match.groupdict()

    def setting(name_group: str, value_group: str) -> tuple[int, int] | None:
        if name_group not in fields:
            return None
        value = _value(fields[name_group], fields[value_group], domains)
        return index[fields[name_group]], value

    return CausalQuery(index[_declared(target, domains)], setting("o", "x"), setting("j", "c"))
