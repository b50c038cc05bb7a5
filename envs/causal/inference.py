"""Exact answers to the three levels of questions, by variable elimination.

Association keeps the ancestors of the target and of the observed node, and adds an indicator for the
evidence. Intervention first cuts the edges into the intervened node. A counterfactual is asked in the twin
network (arXiv 2512.20760; Balke and Pearl 1994): a factual and a twin copy of every node that share the
node's exogenous selectors, of which there is one for each assignment of the parents, all independent.
Selectors are summed out in closed form: with equal parent assignments both copies read the same selector and
are equal; with different ones they are independent. So the pair of copies has the table

    p(v, v* | pa, pa*) = p(v | pa) 1[v = v*]            if pa = pa*
                         p(v | pa) p(v* | pa*)          otherwise

One shared uniform per node (the comonotone mechanism) would give other answers.
"""

from __future__ import annotations

import numpy as np

from envs.causal.elimination import Factor, Scope, eliminate, plan
from envs.causal.model import CausalModel, Query, ancestors, cut_parents


def infer(model: CausalModel, query: Query) -> np.ndarray:
    """The exact distribution of the query's target, shape (values of the target,).

    Raises:
        UserError: the observed value has probability zero, or a table would be too large.
    """
    if query.intervened and query.target == query.intervened[0]:
        return _indicator(model, *query.intervened)
    if query.observed and query.intervened:
        factors, keep = _twin_factors(model, query), 2 * query.target + 1
    else:
        factors, keep = _factors(model, query), query.target
    cards = {v: size for scope, table in factors for v, size in zip(scope, table.shape, strict=True)}
    return eliminate(factors, plan([scope for scope, _ in factors], cards, keep).order)


def _indicator(model: CausalModel, node: int, value: int) -> np.ndarray:
    return np.eye(model.cards[node])[value]


def _factors(model: CausalModel, query: Query) -> list[Factor]:
    """The factors of an association, an intervention or a marginal."""
    parents = cut_parents(model.parents, query)
    observed = [query.observed] if query.observed else []
    relevant = ancestors(parents, [query.target, *(node for node, _ in observed)])
    factors: list[Factor] = []
    for node in sorted(relevant):
        clamped = query.intervened is not None and node == query.intervened[0]
        table = _indicator(model, *query.intervened) if clamped else model.tables[node]  # type: ignore[misc]
        factors.append(((*parents[node], node), table))
    return factors + [((node,), _indicator(model, node, value)) for node, value in observed]


def _twin_factors(model: CausalModel, query: Query) -> list[Factor]:
    """The factors of a counterfactual: node i is variable 2i in the factual world and 2i + 1 in its twin."""
    assert query.observed is not None and query.intervened is not None
    clamped = query.intervened[0]
    twins = ancestors(cut_parents(model.parents, query), [query.target])
    factual = ancestors(model.parents, [query.observed[0]])
    factors: list[Factor] = []
    for node in sorted(twins | factual):
        table, parents = model.tables[node], model.parents[node]
        scope = (*(2 * p for p in parents), 2 * node)
        twin_scope = tuple(v + 1 for v in scope)
        if node in twins and node == clamped:
            factors.append(((2 * node + 1,), _indicator(model, *query.intervened)))
        if node in twins and node in factual and node != clamped:
            factors.append(_pair(scope, twin_scope, table))
        elif node in factual:
            factors.append((scope, table))
        elif node != clamped:
            factors.append((twin_scope, table))
    return [*factors, ((2 * query.observed[0],), _indicator(model, *query.observed))]


def _pair(scope: Scope, twin_scope: Scope, table: np.ndarray) -> Factor:
    """The joint table of a node's two copies, with their common selectors summed out."""
    rows = table.reshape(-1, table.shape[-1])
    joint = np.einsum("rv,sw->rvsw", rows, rows)
    for index, row in enumerate(rows):
        joint[index, :, index, :] = np.diag(row)
    return scope + twin_scope, joint.reshape(table.shape * 2)
