"""Exact answers to the three levels of questions, by variable elimination.

Association keeps the ancestors of the target and of the observed node, and fixes the observed value.
Intervention cuts the edges into the intervened node and fixes its value. A counterfactual is asked in the
twin network (arXiv 2512.20760; Balke and Pearl 1994): a factual and a twin copy of every node that share the
node's exogenous selectors, of which there is one for each assignment of the parents, all independent.
Selectors are summed out in closed form: with equal parent assignments both copies read the same selector and
are equal; with different ones they are independent. So the pair of copies has the table

    p(v, v* | pa, pa*) = p(v | pa) 1[v = v*]            if pa = pa*
                         p(v | pa) p(v* | pa*)          otherwise

One shared uniform per node (the comonotone mechanism) would give other answers.
"""

from __future__ import annotations

import numpy as np

from rlkit.envs.causal.elimination import Factor, Scope, check_cells, marginal
from rlkit.envs.causal.model import CausalModel, CausalQuery, ancestors, cut_parents


def infer(model: CausalModel, query: CausalQuery) -> np.ndarray:
    """The exact distribution of the query's target, shape (values of the target,).

    Raises:
        UserError: the observed value has probability zero, or a table would be too large. An observation that
            the target does not depend on is not looked at.
    """
    if query.observed and query.intervened:
        target, known, factors = _twin_factors(model, query.target, query.observed, query.intervened)
    else:
        target, known, factors = _factors(model, query)
    if target in known:
        return np.eye(model.cards[query.target])[known[target]]
    return marginal(_connected([_slice(factor, known) for factor in factors], target), target)


Network = tuple[int, dict[int, int], list[Factor]]  # the target, the known values, the factors


def _factors(model: CausalModel, query: CausalQuery) -> Network:
    """The network of an association, an intervention or a marginal."""
    parents = cut_parents(model.parents, query)
    known = dict(pair for pair in (query.observed, query.intervened) if pair)
    relevant = ancestors(parents, [query.target, *([query.observed[0]] if query.observed else [])])
    clamped = query.intervened[0] if query.intervened else None
    factors = [((*parents[node], node), model.tables[node]) for node in relevant if node != clamped]
    return query.target, known, factors


def _twin_factors(
    model: CausalModel, target: int, observed: tuple[int, int], intervened: tuple[int, int]
) -> Network:
    """The network of a counterfactual: node i is variable 2i in the factual world and 2i + 1 in its twin."""
    clamped = intervened[0]
    twins = ancestors(cut_parents(model.parents, CausalQuery(target, observed, intervened)), [target]) - {
        clamped
    }
    factual = ancestors(model.parents, [observed[0]])
    factors: list[Factor] = []
    for node in twins | factual:
        table = model.tables[node]
        scope = (*(2 * p for p in model.parents[node]), 2 * node)
        twin_scope = tuple(v + 1 for v in scope)
        if node in twins and node in factual:
            factors.append(_pair(scope, twin_scope, table))
        else:
            factors.append((scope, table) if node in factual else (twin_scope, table))
    return 2 * target + 1, {2 * observed[0]: observed[1], 2 * clamped + 1: intervened[1]}, factors


def _slice(factor: Factor, known: dict[int, int]) -> Factor:
    """Fix the known variables of a factor at their values."""
    scope, table = factor
    if known.keys().isdisjoint(scope):
        return factor
    index = tuple(known.get(v, slice(None)) for v in scope)
    return tuple(v for v in scope if v not in known), table[index]


def _connected(factors: list[Factor], target: int) -> list[Factor]:
    """The factors that are linked with the target; the others only scale the result."""
    reached, found, rest = {target}, [], factors
    while linked := [factor for factor in rest if not reached.isdisjoint(factor[0])]:
        rest = [factor for factor in rest if reached.isdisjoint(factor[0])]
        found += linked
        reached.update(*(scope for scope, _ in linked))
    return found


def _pair(scope: Scope, twin_scope: Scope, table: np.ndarray) -> Factor:
    """The joint table of a node's two copies, with their common selectors summed out."""
    check_cells(table.size**2)
    rows = table.reshape(-1, table.shape[-1])
    joint = np.einsum("rv,sw->rvsw", rows, rows)
    for index, row in enumerate(rows):
        joint[index, :, index, :] = np.diag(row)
    return scope + twin_scope, joint.reshape(table.shape * 2)
