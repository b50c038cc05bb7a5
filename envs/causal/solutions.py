"""Worked solutions: forward through the graph, from the roots to the target, the way a person computes.

The relevant variables are taken in topological order. The table of the variables that are still needed is
multiplied with the next variable's table, and what no later step reads is summed out. Independent parts stay
separate, so on a chain or a tree this writes plain marginals. The observed variable enters at its observed
value, and the last step divides by the probability of the observation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod

import numpy as np

from rlkit.envs.causal.model import CausalModel, CausalQuery, ancestors, cut_parents, descendants


def table_row(model: CausalModel, query: CausalQuery, names: Sequence[str]) -> str | None:
    """Name the table row that is the answer as it stands, such as `P(b|a=0)`; None where there is none.

    That is so for an intervention or an observation if nothing but it stands above the target, and if the
    target tells nothing about what was observed.
    """
    setting = query.intervened or query.observed
    if query.level == "counterfactual" or setting is None or setting[0] == query.target:
        return None
    above = model.parents[query.target]
    if set(above) - {setting[0]} or (
        query.observed and setting[0] in descendants(model.parents, query.target)
    ):
        return None
    target = names[query.target]
    return f"P({target}|{names[setting[0]]}={setting[1]})" if above else f"P({target})"


@dataclass(frozen=True)
class _Part:
    """P(scope, observed) if the part has met the observation, else P(scope); one axis a variable."""

    scope: tuple[int, ...]
    table: np.ndarray
    observed: bool = False


@dataclass
class _Work:
    model: CausalModel
    query: CausalQuery
    names: Sequence[str]
    parents: tuple[tuple[int, ...], ...]
    fixed: dict[int, int]  # values of the variables that were observed or set
    lines: list[str] = field(default_factory=list)


def work_out(model: CausalModel, query: CausalQuery, names: Sequence[str]) -> list[str] | None:
    """The steps that lead to the answer, one a line.

    A counterfactual is worked out only where it is not one: if the target is the intervened variable, or is
    not downstream of it and so keeps the value that it had.

    Args:
        model: its nodes in topological order.
        query: what is asked.
        names: how to call the nodes.
    """
    settings = [pair for pair in (query.intervened, query.observed) if pair]
    if query.level == "counterfactual" and query.intervened:
        node = query.intervened[0]
        if query.target == node:
            settings = [query.intervened]
        elif query.target in descendants(model.parents, node):
            return None
        else:
            step = f"{names[query.target]} is not downstream of {names[node]}: setting that changes nothing."
            return [step, *(work_out(model, CausalQuery(query.target, query.observed), names) or [])]
    for node, value in settings:
        if node == query.target:
            return [f"{names[node]} is known to be {value}."]
    work = _Work(model, query, names, cut_parents(model.parents, query), dict(settings))
    return _forward(work)


def _forward(work: _Work) -> list[str]:
    relevant = _relevant(work)
    work.lines.append(f"Relevant variables: {', '.join(work.names[node] for node in relevant)}.")
    parts: list[_Part] = []
    for step, node in enumerate(relevant):
        if node in work.fixed and not work.parents[node]:
            # Observing a variable without parents is the same as setting it.
            work.lines.append(f"{work.names[node]}={work.fixed[node]} is given.")
            continue
        later = {work.query.target}.union(*(work.parents[other] for other in relevant[step + 1 :]))
        parts = _add(work, node, parts, later - set(work.fixed))
    _finish(work, next(part for part in parts if work.query.target in part.scope))
    return work.lines


def _relevant(work: _Work) -> list[int]:
    """Ancestors of the target and the observed variable that are connected with the target, in order."""
    observed = [work.query.observed[0]] if work.query.observed else []
    candidates = ancestors(work.parents, [work.query.target, *observed])
    reached, grown = {work.query.target}, True
    while grown:
        families = [{node, *work.parents[node]} for node in candidates]
        bigger = reached.union(*(family for family in families if family & reached))
        grown, reached = bigger != reached, bigger
    return sorted(reached)


def _add(work: _Work, node: int, parts: list[_Part], needed: set[int]) -> list[_Part]:
    """Join the parts that hold the node's parents with its table, and sum out what is not needed later."""
    evidence = work.query.observed[0] if work.query.observed else None
    above = work.parents[node]
    touched = [p for p in parts if set(p.scope) & set(above) or (p.observed and evidence in above)]
    variables = [v for part in touched for v in part.scope] + ([] if node == evidence else [node])
    scope = tuple(v for v in variables if v in needed)
    summed = [v for v in variables if v not in needed]
    seen = node == evidence or any(part.observed for part in touched)
    table = np.zeros([work.model.cards[v] for v in scope])
    lines = []
    for values in _assignments(work, scope):
        terms = []
        for hidden in _assignments(work, summed):
            known = {**work.fixed, **values, **hidden}
            row = work.model.tables[node][tuple(known[p] for p in above)]
            terms.append([*(p.table[tuple(known[v] for v in p.scope)] for p in touched), row[known[node]]])
        total = sum(prod(term) for term in terms)
        table[tuple(values[v] for v in scope)] = total
        lines.append(f"{_label(work, values, seen)} = {_arithmetic(terms, total)}")
    work.lines += lines if touched or not scope else [f"P({work.names[node]}) = {_list(table)}"]
    return [part for part in parts if part not in touched] + [_Part(scope, table, seen)]


def _finish(work: _Work, part: _Part) -> None:
    target = work.names[work.query.target]
    if not part.observed or work.query.observed is None:
        if len(work.lines) > 2:
            work.lines.append(f"P({target}) = {_list(part.table)}")
        return
    given = f"{work.names[work.query.observed[0]]}={work.query.observed[1]}"
    total = part.table.sum()
    work.lines.append(f"P({given}) = {' + '.join(_number(p) for p in part.table)} = {_number(total)}")
    shares = ", ".join(f"{_number(p)}/{_number(total)}" for p in part.table)
    work.lines.append(f"P({target}|{given}) = [{shares}] = {_list(part.table / total)}")


def _assignments(work: _Work, scope: Sequence[int]) -> Iterable[dict[int, int]]:
    for values in product(*(range(work.model.cards[v]) for v in scope)):
        yield dict(zip(scope, values, strict=True))


def _label(work: _Work, values: dict[int, int], observed: bool) -> str:
    pairs = list(values.items()) + ([work.query.observed] if observed and work.query.observed else [])
    return f"P({','.join(f'{work.names[node]}={value}' for node, value in pairs)})"


def _arithmetic(terms: list[list[float]], total: float) -> str:
    text = " + ".join("*".join(_number(factor) for factor in term) for term in terms)
    return text if text == _number(total) else f"{text} = {_number(total)}"


def _number(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".")


def _list(values: np.ndarray) -> str:
    return f"[{', '.join(_number(value) for value in values)}]"
