"""Random tables for a graph, and random questions about a model (arXiv 2512.20760, data generation)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rlkit.envs.causal.graphs import Parents
from rlkit.envs.causal.model import CausalModel, CausalQuery, descendants


def draw_model(
    parents: Parents, cardinality: int, concentration: float, rng: np.random.Generator
) -> CausalModel:
    """Give each node a table of independent symmetric Dirichlet rows, and a name v0, v1, .. at random."""
    alpha = np.full(cardinality, concentration)
    tables = tuple(rng.dirichlet(alpha, size=(cardinality,) * len(above)) for above in parents)
    names = tuple(f"v{i}" for i in rng.permutation(len(parents)))
    return CausalModel(names, parents, tables)


def draw_query(model: CausalModel, level: str, rng: np.random.Generator) -> CausalQuery:
    """Draw a question of a level. Observed values come from one ancestral sample, so they are possible."""
    return _DRAW[level](model, rng)


def _association(model: CausalModel, rng: np.random.Generator) -> CausalQuery:
    observed = int(rng.integers(len(model)))
    value = model.sample(rng)[observed]
    return CausalQuery(int(rng.integers(len(model))), observed=(observed, value))


def _intervention(model: CausalModel, rng: np.random.Generator) -> CausalQuery:
    intervened = _draw_intervention(model, rng)
    return CausalQuery(int(rng.integers(len(model))), intervened=intervened)


def _counterfactual(model: CausalModel, rng: np.random.Generator) -> CausalQuery:
    """The observation is at the intervened node or downstream of it, made before the intervention."""
    intervened = _draw_intervention(model, rng)
    observed = int(rng.choice(descendants(model.parents, intervened[0])))
    value = model.sample(rng)[observed]
    return CausalQuery(int(rng.integers(len(model))), (observed, value), intervened)


def _draw_intervention(model: CausalModel, rng: np.random.Generator) -> tuple[int, int]:
    """Any node but the last, set to any of its values."""
    node = int(rng.integers(len(model) - 1))
    return node, int(rng.integers(model.cards[node]))


_DRAW: dict[str, Callable[[CausalModel, np.random.Generator], CausalQuery]] = {
    "association": _association,
    "intervention": _intervention,
    "counterfactual": _counterfactual,
}
