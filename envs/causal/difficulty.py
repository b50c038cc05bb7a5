"""How hard a query is: the size of its relevant subgraph and the cost of min-fill elimination.

Counted as the data set RLCausal counts (arXiv 2512.20760): for counterfactuals in the twin network with its
selectors as nodes of their own, though `rlkit.envs.causal.inference` sums selectors out in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from rlkit.envs.causal.elimination import plan
from rlkit.envs.causal.model import CausalModel, CausalQuery, ancestors, cut_parents


@dataclass(frozen=True)
class Difficulty:
    """How hard a query is.

    `relevant_size` is the number of ancestors of the target and the observed node, both included, after the
    level's change of the graph; 1 if the target is the node that was observed (association) or intervened on.
    `sums` and `products` are those of min-fill elimination, see `rlkit.envs.causal.elimination.Plan`.
    """

    relevant_size: int
    sums: int
    products: int


def difficulty(model: CausalModel, query: CausalQuery) -> Difficulty:
    """Measure a query. The result depends on the graph and the numbers of values, not on the tables."""
    if query.observed and query.intervened:
        return _counterfactual(model, query, *query.observed[:1], *query.intervened[:1])
    if query.observed:
        return _association(model, query.target, query.observed[0])
    return _intervention(model, query)


def _association(model: CausalModel, target: int, observed: int) -> Difficulty:
    if target == observed:
        return Difficulty(1, 0, 0)
    relevant = ancestors(model.parents, [target, observed])
    scopes = [(*model.parents[v], v) for v in relevant] + [(observed,)]
    cost = plan(scopes, model.cards, target)
    return Difficulty(len(relevant), cost.sums, cost.products)


def _intervention(model: CausalModel, query: CausalQuery) -> Difficulty:
    parents = cut_parents(model.parents, query)
    relevant = ancestors(parents, [query.target])
    # The node that is set is summed out even where the target does not depend on it.
    counted = relevant | ({query.intervened[0]} if query.intervened else set())
    cost = plan([(*parents[v], v) for v in counted], model.cards, query.target)
    return Difficulty(len(relevant), cost.sums, cost.products)


def _counterfactual(model: CausalModel, query: CausalQuery, observed: int, clamped: int) -> Difficulty:
    """In the twin network 3i is the selector of node i, 3i + 1 its factual copy and 3i + 2 its twin."""
    parents: list[tuple[int, ...]] = []
    cards: list[int] = []
    for node, (above, size) in enumerate(zip(model.parents, model.cards, strict=True)):
        factual = (*(3 * p + 1 for p in above), 3 * node)
        twin = () if node == clamped else (*(3 * p + 2 for p in above), 3 * node)
        parents += [(), factual, twin]
        cards += [size ** prod(model.cards[p] for p in above), size, size]
    target, evidence = 3 * query.target + 2, 3 * observed + 1
    relevant = ancestors(tuple(parents), [target, evidence])
    cost = plan([*((*parents[v], v) for v in relevant), (evidence,)], cards, target)
    size = 1 if query.target == clamped else len(relevant)
    return Difficulty(size, cost.sums, cost.products)
