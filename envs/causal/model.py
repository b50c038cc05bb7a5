"""A causal model over discrete variables, and a query about it.

Nodes are indices 0..n-1. `tables[i]` is the conditional probability table of node i: one axis per parent in
the order of `parents[i]`, then an axis over the values of the node itself. Every row (last axis) sums to 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

LEVELS = ("association", "intervention", "counterfactual")


@dataclass(frozen=True)
class CausalQuery:
    """Query for the distribution of `target`, given an observed and/or an intervened (node, value) pair.

    `observed` alone makes it an association, `intervened` alone an intervention, both a counterfactual (the
    observation precedes the intervention), and neither a plain marginal.
    """

    target: int
    observed: tuple[int, int] | None = None
    intervened: tuple[int, int] | None = None

    @property
    def level(self) -> str:
        """Level of the query in the causal hierarchy. A plain marginal counts as association."""
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
        """Cardinality (number of values) of each node."""
        return tuple(table.shape[-1] for table in self.tables)

    def printed(self, decimals: int = 2) -> CausalModel:
        """Return the model with the tables that a prompt shows: rounded rows that sum to 1."""
        return replace(self, tables=tuple(round_rows(table, decimals) for table in self.tables))

    def sample(self, rng: np.random.Generator) -> list[int]:
        """Draw one joint assignment by ancestral sampling. Nodes must be in topological order."""
        uniforms = rng.random(len(self))
        values: list[int] = []
        for parents, table, uniform in zip(self.parents, self.tables, uniforms, strict=True):
            row = table[tuple(values[p] for p in parents)]
            # Restricted to possible values: rounding must not select a value of probability 0.
            possible = np.flatnonzero(row)
            rank = np.searchsorted(np.cumsum(row[possible]), uniform, side="right")
            values.append(int(possible[min(rank, len(possible) - 1)]))
        return values


def round_rows(table: np.ndarray, decimals: int = 2) -> np.ndarray:
    """Round rows (last axis) by the largest-remainder method, so that each still sums to 1.

    For two values this equals plain rounding. For more, plain rounding can give a row such as 0.33, 0.33,
    0.33.
    """
    scale = 10**decimals
    units = np.floor(table * scale + 1e-9)
    missing = np.rint(scale - units.sum(axis=-1, keepdims=True))
    by_remainder = np.argsort(units - table * scale, axis=-1, kind="stable")
    rank = np.argsort(by_remainder, axis=-1, kind="stable")
    return (units + (rank < missing)) / scale


def hundredths(distribution: np.ndarray) -> list[int]:
    """Round to integer hundredths, exact halves to even, so that two values always sum to 100.

    Answers are products of two-decimal numbers and thus often exact halves, which floats miss on either side.
    The inner rounding to 9 decimals restores them.
    """
    return [int(h) for h in np.rint(np.round(100 * distribution, 9))]


def ancestors(parents: tuple[tuple[int, ...], ...], nodes: Iterable[int]) -> set[int]:
    """Return the nodes and all their ancestors."""
    visited: set[int] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in visited:
            visited.add(node)
            stack.extend(parents[node])
    return visited


def cut_parents(parents: tuple[tuple[int, ...], ...], query: CausalQuery) -> tuple[tuple[int, ...], ...]:
    """Return the parents of each node, with the edges into the intervened node (if any) removed."""
    if query.intervened is None:
        return parents
    node = query.intervened[0]
    return (*parents[:node], (), *parents[node + 1 :])


def descendants(parents: tuple[tuple[int, ...], ...], node: int) -> list[int]:
    """Return the node and all its descendants, in index order. Nodes must be in topological order."""
    reached = {node}
    for child in range(node + 1, len(parents)):
        if reached.intersection(parents[child]):
            reached.add(child)
    return sorted(reached)
