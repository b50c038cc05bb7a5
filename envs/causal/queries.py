"""Draw random tables for a graph and random queries about a model (arXiv 2512.20760, data generation)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rlkit.envs.causal.graphs import Parents
from rlkit.envs.causal.model import CausalModel, CausalQuery, descendants

KINDS = ("given", "row", "arithmetic")


def draw_model(
    parents: Parents, cardinality: int, concentration: float, rng: np.random.Generator
) -> CausalModel:
    """Draw each node's table, with independent symmetric Dirichlet rows, and assign v0, v1, .. at random."""
    alpha = np.full(cardinality, concentration)
    tables = tuple(rng.dirichlet(alpha, size=(cardinality,) * len(node_parents)) for node_parents in parents)
    names = tuple(f"v{i}" for i in rng.permutation(len(parents)))
    return CausalModel(names, parents, tables)


def kind_of(model: CausalModel, query: CausalQuery) -> str:
    """Return what answering a query requires, regardless of the numbers: "given", "row" or "arithmetic".

    The target of "given" has a known value, because it is observed or set. The answer of "row" is a row of
    the target's table. All others require arithmetic.
    """
    observed, intervened = query.observed, query.intervened
    if intervened and query.target not in descendants(model.parents, intervened[0]):
        intervened = None  # it changes nothing
    setting = intervened or observed
    if setting and setting[0] == query.target:
        return "given"
    if set(model.parents[query.target]) - {setting[0] if setting else None}:
        return "arithmetic"
    # What is downstream of the target changes its distribution by Bayes' rule.
    is_downstream = observed and observed[0] in descendants(model.parents, query.target)
    return "arithmetic" if is_downstream else "row"


def draw_query(model: CausalModel, level: str, rng: np.random.Generator) -> CausalQuery:
    """Draw a query of a level. Observed values come from an ancestral sample, so they are possible."""
    return _DRAW_BY_LEVEL[level](model, rng)


def _association(model: CausalModel, rng: np.random.Generator) -> CausalQuery:
    observed = int(rng.integers(len(model)))
    value = model.sample(rng)[observed]
    return CausalQuery(int(rng.integers(len(model))), observed=(observed, value))


def _intervention(model: CausalModel, rng: np.random.Generator) -> CausalQuery:
    intervened = _draw_intervention(model, rng)
    return CausalQuery(int(rng.integers(len(model))), intervened=intervened)


def _counterfactual(model: CausalModel, rng: np.random.Generator) -> CausalQuery:
    """Draw a query whose observed node is the intervened node or one of its descendants."""
    intervened = _draw_intervention(model, rng)
    observed = int(rng.choice(descendants(model.parents, intervened[0])))
    value = model.sample(rng)[observed]
    return CausalQuery(int(rng.integers(len(model))), (observed, value), intervened)


def _draw_intervention(model: CausalModel, rng: np.random.Generator) -> tuple[int, int]:
    """Draw a node and one of its values. The last node is excluded: it has no children to affect."""
    node = int(rng.integers(len(model) - 1))
    return node, int(rng.integers(model.cards[node]))


_DRAW_BY_LEVEL: dict[str, Callable[[CausalModel, np.random.Generator], CausalQuery]] = {
    "association": _association,
    "intervention": _intervention,
    "counterfactual": _counterfactual,
}
