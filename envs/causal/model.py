"""A causal model over discrete variables, and a question asked of it.

Nodes are indices 0..n-1. `tables[i]` is the conditional probability table of node i: one axis per parent in
the order of `parents[i]`, then an axis over the node's own values; every row sums to 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

LEVELS = ("association", "intervention", "counterfactual")


@dataclass(frozen=True)
class CausalQuery:
    """The distribution of `target`, given an observed and/or an intervened (node, value).

    Observed only is association, intervened only is intervention, both is counterfactual (the observation was
    made before the intervention), neither is the plain marginal.
    """

    target: int
    observed: tuple[int, int] | None = None
    intervened: tuple[int, int] | None = None

    @property
    def level(self) -> str:
        """The rung that the question stands on; the plain marginal counts as association."""
        if self.intervened is None:
            return "association"
        return "intervention" if self.observed is None else "counterfactual"


@dataclass(frozen=True)
class CausalModel:
    """A directed acyclic graph with a conditional probability table for each node."""

    names: tuple[str, ...]
    parents: tuple[tuple[int, ...], ...]
    tables: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def cards(self) -> tuple[int, ...]:
        """The number of values of each node."""
        return tuple(table.shape[-1] for table in self.tables)

    def printed(self) -> CausalModel:
        """The same model with the tables that a prompt shows: rows in hundredths that sum to 1."""
        return replace(self, tables=tuple(round_rows(table) for table in self.tables))

    def sample(self, rng: np.random.Generator) -> list[int]:
        """Draw one joint assignment by ancestral sampling. Nodes must be in topological order."""
        uniforms = rng.random(len(self))
        values: list[int] = []
        for parents, table, uniform in zip(self.parents, self.tables, uniforms, strict=True):
            row = table[tuple(values[p] for p in parents)]
            possible = np.flatnonzero(row)
            rank = np.searchsorted(np.cumsum(row[possible]), uniform, side="right")
            values.append(int(possible[min(rank, len(possible) - 1)]))
        return values


def round_rows(table: np.ndarray) -> np.ndarray:
    """Round rows (last axis) to hundredths so that each still sums to 1, by largest remainder.

    For two values this is plain rounding; for more, plain rounding can give rows such as 0.33, 0.33, 0.33.
    """
    hundredths = np.floor(table * 100 + 1e-9)
    missing = np.rint(100 - hundredths.sum(axis=-1, keepdims=True))
    by_remainder = np.argsort(hundredths - table * 100, axis=-1, kind="stable")
    rank = np.argsort(by_remainder, axis=-1, kind="stable")
    return (hundredths + (rank < missing)) / 100


def hundredths(distribution: np.ndarray) -> list[int]:
    """Round to whole hundredths, exact halves to even: so two values always sum to 100.

    Answers are often exact halves, as products of two-decimal numbers, which floats miss on either side.
    """
    return [int(h) for h in np.rint(np.round(100 * distribution, 9))]


def ancestors(parents: tuple[tuple[int, ...], ...], nodes: Iterable[int]) -> set[int]:
    """The given nodes and all their ancestors."""
    found: set[int] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(parents[node])
    return found


def cut_parents(parents: tuple[tuple[int, ...], ...], query: CausalQuery) -> tuple[tuple[int, ...], ...]:
    """The parents of each node after the query's intervention, if any, has cut the edges into its node."""
    if query.intervened is None:
        return parents
    node = query.intervened[0]
    return (*parents[:node], (), *parents[node + 1 :])


def descendants(parents: tuple[tuple[int, ...], ...], node: int) -> list[int]:
    """The given node and all its descendants, in index order. Nodes must be in topological order."""
    found = {node}
    for child in range(node + 1, len(parents)):
        if found.intersection(parents[child]):
            found.add(child)
    return sorted(found)
