"""Write worked solutions that go forward through the graph, from the roots to the target, as a person would.

The relevant variables are processed in topological order. Each step multiplies the joint table of the
variables that are still needed by the next variable's table, and sums out variables that no later step reads.
Independent parts stay separate, so on a chain or a tree every step gives a plain marginal. The observed
variable is fixed at its observed value, and the last step divides by the probability of the observation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod

import numpy as np

from rlkit.envs.causal.model import CausalModel, CausalQuery, ancestors, cut_parents, descendants
from rlkit.envs.causal.queries import kind_of

SOLUTION_STYLES = ("verbose", "steps", "mixed")


def deciding_facts(model: CausalModel, query: CausalQuery, names: Sequence[str]) -> str:
    """Return what decides how to answer a query: `b, parents c, do a=1`."""
    parents = [names[parent] for parent in model.parents[query.target]]
    words = [names[query.target], f"parents {' '.join(parents)}" if parents else "no parents"]
    if query.observed:
        words.append(f"seen {names[query.observed[0]]}={query.observed[1]}")
    if query.intervened:
        words.append(f"do {names[query.intervened[0]]}={query.intervened[1]}")
    return ", ".join(words)


def row_name(model: CausalModel, node: int, values: Mapping[int, int], names: Sequence[str]) -> str:
    """Return the name of the row of a node's table for the values of its parents, such as `P(b|a=0)`."""
    conditions = ",".join(f"{names[parent]}={values[parent]}" for parent in model.parents[node])
    return f"P({names[node]}|{conditions})" if conditions else f"P({names[node]})"


def table_row(model: CausalModel, query: CausalQuery, names: Sequence[str]) -> str | None:
    """Return the name of the table row that is the answer, such as `P(b|a=0)`, or None if no row is."""
    if kind_of(model, query) != "row":
        return None
    # An intervention overrides the observation of the same variable.
    values = dict(pair for pair in (query.observed, query.intervened) if pair)
    return row_name(model, query.target, values, names)


@dataclass(frozen=True)
class _Part:
    """Joint table P(scope), or P(scope, observation) if `has_evidence`, with one axis per variable."""

    scope: tuple[int, ...]
    table: np.ndarray
    has_evidence: bool = False


@dataclass
class _Derivation:
    """A query, its graph after the intervention, and the lines of the solution so far."""

    model: CausalModel
    query: CausalQuery
    names: Sequence[str]
    parents: tuple[tuple[int, ...], ...]
    fixed: dict[int, int]  # observed or intervened variable -> value
    table_decimals: int | None  # see `write_steps`
    lines: list[str] = field(default_factory=list)

    @property
    def is_brief(self) -> bool:
        """Whether only rows and arithmetic are written."""
        return self.table_decimals is not None

    def number(self, value: float) -> str:
        """Return a number, in a brief solution with at least the decimals of the tables."""
        return _number(value, self.table_decimals or 0)

    def product(self, value: float) -> str:
        """Return a product or a sum of products, in a brief solution with at least twice these decimals."""
        return _number(value, 2 * (self.table_decimals or 0))

    def row(self, values: Iterable[float]) -> str:
        """Return a list of numbers."""
        return f"[{', '.join(map(self.number, values))}]"


def write_steps(
    model: CausalModel, query: CausalQuery, names: Sequence[str], *, table_decimals: int | None = None
) -> list[str] | None:
    """Return the lines of a worked solution, or None for a counterfactual that needs the twin network.

    A counterfactual is solved only if it reduces to a simpler query: the target is the intervened variable,
    or is not downstream of it, so that the intervention does not change it.

    Args:
        model: Model whose nodes are in topological order.
        query: Query to solve.
        names: Name of each node in the solution.
        table_decimals: Number of decimals of the tables. With it, the solution is brief: it has the
            distributions that are summed over and the arithmetic, with zeros that make the digits line up.
    """
    settings = [pair for pair in (query.intervened, query.observed) if pair]
    if query.level == "counterfactual" and query.intervened:
        node = query.intervened[0]
        if query.target == node:
            settings = [query.intervened]  # it overrides the observation
        elif query.target in descendants(model.parents, node):
            return None
        else:
            step = f"{names[query.target]} is not downstream of {names[node]}: setting that changes nothing."
            simpler = CausalQuery(query.target, query.observed)
            return [step, *(write_steps(model, simpler, names, table_decimals=table_decimals) or [])]
    for node, value in settings:
        if node == query.target:
            return [f"{names[node]} is known to be {value}."]
    parents = cut_parents(model.parents, query)
    lines = _forward(_Derivation(model, query, names, parents, dict(settings), table_decimals))
    return lines if table_decimals is None else [_without_spaces(line) for line in lines]


def _forward(derivation: _Derivation) -> list[str]:
    relevant = _relevant(derivation)
    if not derivation.is_brief:
        relevant_names = ", ".join(derivation.names[node] for node in relevant)
        derivation.lines.append(f"Relevant variables: {relevant_names}.")
    parts: list[_Part] = []
    for step, node in enumerate(relevant):
        if node in derivation.fixed and not derivation.parents[node]:
            # Observing a variable without parents is the same as intervening on it.
            if not derivation.is_brief:
                derivation.lines.append(f"{derivation.names[node]}={derivation.fixed[node]} is given.")
            continue
        # Variables that are read after this step: the target, and the parents of later nodes.
        needed = {derivation.query.target}.union(
            *(derivation.parents[later] for later in relevant[step + 1 :])
        )
        parts = _add(derivation, node, parts, needed - set(derivation.fixed))
    _finish(derivation, next(part for part in parts if derivation.query.target in part.scope))
    return derivation.lines


def _relevant(derivation: _Derivation) -> list[int]:
    """Return, in topological order, the ancestors of target and observation connected to the target."""
    observed = [derivation.query.observed[0]] if derivation.query.observed else []
    candidates = ancestors(derivation.parents, [derivation.query.target, *observed])
    families = [{node, *derivation.parents[node]} for node in candidates]
    # Grow by families (a node and its parents), which share a table, until nothing changes.
    reached = {derivation.query.target}
    while True:
        larger = reached.union(*(family for family in families if family & reached))
        if larger == reached:
            return sorted(reached)
        reached = larger


def _add(derivation: _Derivation, node: int, parts: list[_Part], needed: set[int]) -> list[_Part]:
    """Multiply the parts that contain the node's parents by its table, and sum out unneeded variables.

    Each cell of the new part is written as one line: P(values) = sum of products = number.
    """
    names = derivation.names
    evidence = derivation.query.observed[0] if derivation.query.observed else None
    parents = derivation.parents[node]
    # The observed variable is fixed, so it is in no scope. `has_evidence` marks the part that depends on it.
    joined = [p for p in parts if set(p.scope) & set(parents) or (p.has_evidence and evidence in parents)]
    variables = [v for part in joined for v in part.scope]
    if node != evidence:
        variables.append(node)
    scope = tuple(v for v in variables if v in needed)
    summed = [v for v in variables if v not in needed]
    has_evidence = node == evidence or any(part.has_evidence for part in joined)
    table = np.zeros([derivation.model.cards[v] for v in scope])
    lines = []
    for values in _assignments(derivation, scope):
        terms = []
        for hidden in _assignments(derivation, summed):
            assignment = {**derivation.fixed, **values, **hidden}
            factors = [part.table[tuple(assignment[v] for v in part.scope)] for part in joined]
            row = derivation.model.tables[node][tuple(assignment[p] for p in parents)]
            terms.append([*factors, row[assignment[node]]])
        total = sum(prod(term) for term in terms)
        table[tuple(values[v] for v in scope)] = total
        lines.append(f"{_label(derivation, values, has_evidence)} = {_arithmetic(derivation, terms, total)}")
    if joined or not scope:
        if derivation.is_brief and len(scope) == 1 and not has_evidence:
            lines.pop()  # the last probability is 1 minus the others
            if node != derivation.query.target:
                lines.append(f"P({names[node]}) = {derivation.row(table)}")
        derivation.lines += lines
    else:  # none of its parents is free, so its table needs no arithmetic
        name = f"P({names[node]})"
        if derivation.is_brief:
            name = row_name(derivation.model, node, derivation.fixed, names)
        derivation.lines.append(f"{name} = {derivation.row(table)}")
    return [part for part in parts if part not in joined] + [_Part(scope, table, has_evidence)]


def _finish(derivation: _Derivation, part: _Part) -> None:
    """Write the distribution of the target, divided by the probability of the observation if there is one."""
    target = derivation.names[derivation.query.target]
    if not part.has_evidence or derivation.query.observed is None:
        # With fewer lines, the last one already is this distribution.
        if len(derivation.lines) > 2 and not derivation.is_brief:
            derivation.lines.append(f"P({target}) = {derivation.row(part.table)}")
        return
    observation = f"{derivation.names[derivation.query.observed[0]]}={derivation.query.observed[1]}"
    total = part.table.sum()
    joint = [derivation.product(p) for p in part.table]
    derivation.lines.append(f"P({observation}) = {' + '.join(joint)} = {derivation.product(total)}")
    fractions = ", ".join(f"{p}/{derivation.product(total)}" for p in joint)
    posterior = derivation.row(part.table / total)
    derivation.lines.append(f"P({target}|{observation}) = [{fractions}] = {posterior}")


def _assignments(derivation: _Derivation, scope: Sequence[int]) -> Iterable[dict[int, int]]:
    for values in product(*(range(derivation.model.cards[v]) for v in scope)):
        yield dict(zip(scope, values, strict=True))


def _label(derivation: _Derivation, values: dict[int, int], has_evidence: bool) -> str:
    pairs = list(values.items())
    if has_evidence and derivation.query.observed:
        pairs.append(derivation.query.observed)
    return f"P({','.join(f'{derivation.names[node]}={value}' for node, value in pairs)})"


def _arithmetic(derivation: _Derivation, terms: list[list[float]], total: float) -> str:
    """Return `0.2*0.6 + 0.8*0.1 = 0.12 + 0.08 = 0.2`."""
    steps = [" + ".join("*".join(map(derivation.number, term)) for term in terms)]
    products = [round(prod(term), 4) for term in terms]
    if _number(sum(products)) == _number(total):  # otherwise their rounding would make the sum look wrong
        steps.append(" + ".join(map(derivation.product, products)))
    return " = ".join(dict.fromkeys([*steps, derivation.product(total)]))


def _number(value: float, min_decimals: int = 0) -> str:
    """Return a number with up to four decimals, and zeros up to `min_decimals`."""
    whole, decimals = f"{value:.4f}".split(".")
    return f"{whole}.{decimals.rstrip('0').ljust(min_decimals, '0')}".rstrip(".")


def _without_spaces(line: str) -> str:
    return line.replace(" = ", "=").replace(" + ", "+")
