"""How hard a query is: the size of its relevant subgraph and the cost of min-fill elimination.

Both are counted as in the RLCausal dataset (arXiv 2512.20760): a counterfactual is measured in the twin
network with one node per selector, although `rlkit.envs.causal.inference` sums the selectors out in closed
form.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from rlkit.envs.causal.elimination import plan_elimination
from rlkit.envs.causal.model import CausalModel, CausalQuery, ancestors, cut_parents


@dataclass(frozen=True)
class Difficulty:
    """Size and elimination cost of a query.

    Attributes:
        relevant_size: Number of ancestors of the target and the observed node, both included, in the network
            of the query's level; 1 if the target is itself observed (association) or intervened on.
        sums: Number of additions of min-fill elimination, see `EliminationPlan`.
        products: Number of multiplications of min-fill elimination, see `EliminationPlan`.
    """

    relevant_size: int
    sums: int
    products: int


def measure_difficulty(model: CausalModel, query: CausalQuery) -> Difficulty:
    """Measure a query. The result depends on the graph and the cardinalities, not on the probabilities."""
    if query.observed and query.intervened:
        return _counterfactual(model, query, query.observed[0], query.intervened[0])
    if query.observed:
        return _association(model, query.target, query.observed[0])
    return _intervention(model, query)


def _association(model: CausalModel, target: int, observed: int) -> Difficulty:
    if target == observed:
        return Difficulty(1, 0, 0)
    relevant = ancestors(model.parents, [target, observed])
    # The evidence is a factor of its own, an indicator over the observed node.
    scopes = [(*model.parents[node], node) for node in relevant] + [(observed,)]
    plan = plan_elimination(scopes, model.cards, target)
    return Difficulty(len(relevant), plan.sums, plan.products)


def _intervention(model: CausalModel, query: CausalQuery) -> Difficulty:
    parents = cut_parents(model.parents, query)
    relevant = ancestors(parents, [query.target])
    # The intervened node is summed out even if the target does not depend on it.
    eliminated = set(relevant)
    if query.intervened:
        eliminated.add(query.intervened[0])
    scopes = [(*parents[node], node) for node in eliminated]
    plan = plan_elimination(scopes, model.cards, query.target)
    return Difficulty(len(relevant), plan.sums, plan.products)


def _counterfactual(model: CausalModel, query: CausalQuery, observed: int, intervened: int) -> Difficulty:
    """Measure in the twin network: 3i is the selector of node i, 3i + 1 its factual copy, 3i + 2 its twin."""
    parents: list[tuple[int, ...]] = []
    cards: list[int] = []
    for node, (node_parents, card) in enumerate(zip(model.parents, model.cards, strict=True)):
        selector = 3 * node
        factual = (*(3 * p + 1 for p in node_parents), selector)
        twin = () if node == intervened else (*(3 * p + 2 for p in node_parents), selector)
        parents += [(), factual, twin]
        # The selector of the node is the joint of one variable per assignment of the parents.
        cards += [card ** prod(model.cards[p] for p in node_parents), card, card]
    target, evidence = 3 * query.target + 2, 3 * observed + 1
    relevant = ancestors(tuple(parents), [target, evidence])
    scopes = [*((*parents[node], node) for node in relevant), (evidence,)]
    plan = plan_elimination(scopes, cards, target)
    size = 1 if query.target == intervened else len(relevant)
    return Difficulty(size, plan.sums, plan.products)
