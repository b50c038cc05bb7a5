"""Exact answers to questions of the three levels, by variable elimination.

Association keeps the ancestors of the target and of the observed node, and fixes the observed value.
Intervention cuts the edges into the intervened node and fixes its value. A counterfactual is evaluated in the
twin network (arXiv 2512.20760; Balke and Pearl 1994), which has a factual and a twin copy of every node. Both
copies read the node's exogenous selectors, which are independent, one for each assignment of the parents.
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
    """Return the exact distribution of the query's target, shape (number of values of the target,).

    An observation that is independent of the target is ignored, so it may have probability zero.

    Raises:
        UserError: The observed value has probability zero, or a table would be too large.
    """
    if query.observed and query.intervened:
        target, evidence, factors = _twin_factors(model, query.target, query.observed, query.intervened)
    else:
        target, evidence, factors = _factors(model, query)
    if target in evidence:
        return np.eye(model.cards[query.target])[evidence[target]]
    factors = [_slice(factor, evidence) for factor in factors]
    return marginal(_connected(factors, target), target)


Network = tuple[int, dict[int, int], list[Factor]]  # the target, the fixed values (evidence), the factors


def _factors(model: CausalModel, query: CausalQuery) -> Network:
    """Return the network of an association, an intervention or a marginal."""
    parents = cut_parents(model.parents, query)
    evidence = dict(pair for pair in (query.observed, query.intervened) if pair)
    observed = [query.observed[0]] if query.observed else []
    relevant = ancestors(parents, [query.target, *observed])
    intervened = query.intervened[0] if query.intervened else None
    factors = [((*parents[node], node), model.tables[node]) for node in relevant if node != intervened]
    return query.target, evidence, factors


def _twin_factors(
    model: CausalModel, target: int, observed: tuple[int, int], intervened: tuple[int, int]
) -> Network:
    """Return the network of a counterfactual: variable 2i is the factual copy of node i, 2i + 1 its twin."""
    clamped = intervened[0]
    twin_parents = cut_parents(model.parents, CausalQuery(target, observed, intervened))
    twins = ancestors(twin_parents, [target]) - {clamped}
    factual = ancestors(model.parents, [observed[0]])
    factors: list[Factor] = []
    for node in twins | factual:
        table = model.tables[node]
        scope = (*(2 * p for p in model.parents[node]), 2 * node)
        twin_scope = tuple(v + 1 for v in scope)
        if node in twins and node in factual:
            factors.append(_pair(scope, twin_scope, table))
        elif node in factual:
            factors.append((scope, table))
        else:
            factors.append((twin_scope, table))
    evidence = {2 * observed[0]: observed[1], 2 * clamped + 1: intervened[1]}
    return 2 * target + 1, evidence, factors


def _slice(factor: Factor, evidence: dict[int, int]) -> Factor:
    """Fix the variables of a factor that have evidence at their values."""
    scope, table = factor
    if evidence.keys().isdisjoint(scope):
        return factor
    index = tuple(evidence.get(v, slice(None)) for v in scope)
    return tuple(v for v in scope if v not in evidence), table[index]


def _connected(factors: list[Factor], target: int) -> list[Factor]:
    """Return the factors that are connected to the target. The others would only scale the result."""
    reached = {target}
    connected: list[Factor] = []
    unreached = factors
    while linked := [factor for factor in unreached if not reached.isdisjoint(factor[0])]:
        unreached = [factor for factor in unreached if reached.isdisjoint(factor[0])]
        connected += linked
        reached.update(*(scope for scope, _ in linked))
    return connected


def _pair(scope: Scope, twin_scope: Scope, table: np.ndarray) -> Factor:
    """Return the joint table of a node's two copies, with their shared selectors summed out."""
    check_cells(table.size**2)
    rows = table.reshape(-1, table.shape[-1])
    joint = np.einsum("rv,sw->rvsw", rows, rows)
    # Equal parent assignments: both copies read the same selector, so they are equal.
    for index, row in enumerate(rows):
        joint[index, :, index, :] = np.diag(row)
    return scope + twin_scope, joint.reshape(table.shape * 2)
