"""Variable elimination: an order by the min-fill heuristic, what it costs, and the elimination itself.

A factor is a scope (a tuple of variables, one an axis) and an array. The cost of an order is known from the
scopes alone, so `plan` needs no arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

import numpy as np

from rlkit.errors import UserError

Scope = tuple[int, ...]
Factor = tuple[Scope, np.ndarray]

MAX_CELLS = 2**22  # cells of the largest table that an elimination may build


@dataclass(frozen=True)
class Plan:
    """The order in which variables are eliminated, and the arithmetic that it takes.

    With C the cells of the new factor (1 for a number), eliminating a variable of K values out of F factors
    adds C * (K - 1) to `sums` and C * (F - 1) to `products`, as the data set RLCausal counts them.
    """

    order: tuple[int, ...]
    sums: int
    products: int


def plan(scopes: Iterable[Scope], cards: Mapping[int, int] | Sequence[int], keep: int) -> Plan:
    """Choose by min-fill the order in which to eliminate all but `keep`; ties go to the lowest index.

    Args:
        scopes: the scopes of the factors.
        cards: the number of values of each variable.
        keep: the variable that stays.
    """
    live = [set(scope) for scope in scopes]
    near = _neighbours(live)
    remaining = set(near) - {keep}
    order, sums, products = [], 0, 0
    while remaining:
        variable = min(remaining, key=lambda v: (_fill(near, v), v))
        joined = [scope for scope in live if variable in scope]
        new = set().union(*joined) - {variable}
        cells = prod(cards[v] for v in new)
        sums += cells * (cards[variable] - 1)
        products += cells * (len(joined) - 1)
        live = [scope for scope in live if variable not in scope]
        if new:
            live.append(new)
        _connect(near, variable)
        remaining.remove(variable)
        order.append(variable)
    return Plan(tuple(order), sums, products)


def _neighbours(scopes: Iterable[set[int]]) -> dict[int, set[int]]:
    near: dict[int, set[int]] = {}
    for scope in scopes:
        for variable in scope:
            near.setdefault(variable, set()).update(scope)
    for variable, others in near.items():
        others.discard(variable)
    return near


def _fill(near: dict[int, set[int]], variable: int) -> int:
    """Twice the number of edges that eliminating the variable would add between its neighbours."""
    others = near[variable]
    size = len(others)
    return sum(size - 1 - len(others & near[other]) for other in others) if size > 1 else 0


def _connect(near: dict[int, set[int]], variable: int) -> None:
    """Take the variable out of the graph and join its neighbours."""
    others = near.pop(variable)
    for other in others:
        near[other] |= others
        near[other] -= {variable, other}


def eliminate(factors: Iterable[Factor], order: Iterable[int]) -> np.ndarray:
    """Multiply the factors, sum out the variables in this order, and normalise.

    Returns:
        The distribution of the one variable that is not in `order`.

    Raises:
        UserError: the evidence has probability zero, or a table would pass `MAX_CELLS`.
    """
    live = list(factors)
    for variable in order:
        joined = [factor for factor in live if variable in factor[0]]
        live = [factor for factor in live if variable not in factor[0]]
        scope, table = reduce(_multiply, joined)
        axis = scope.index(variable)
        live.append((scope[:axis] + scope[axis + 1 :], table.sum(axis=axis)))
    _, table = reduce(_multiply, live)
    total = table.sum()
    if not total > 0:
        raise UserError(
            "the observed value has probability zero in this model, so the question has no answer"
        )
    return table / total


def _multiply(left: Factor, right: Factor) -> Factor:
    (a, x), (b, y) = left, right
    scope = a + tuple(v for v in b if v not in a)
    if x.size * y.size > MAX_CELLS:
        sizes = dict(zip(a + b, x.shape + y.shape, strict=True))
        if prod(sizes.values()) > MAX_CELLS:
            raise UserError(
                "exact inference needs a table that is too large: use fewer nodes, parents or values"
            )
    axes = {v: i for i, v in enumerate(scope)}
    return scope, np.einsum(x, [axes[v] for v in a], y, [axes[v] for v in b], range(len(scope)))
