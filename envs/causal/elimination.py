"""Variable elimination: an order by the min-fill heuristic, what it costs, and the elimination itself.

A factor is a scope (a tuple of variables, one an axis) and an array. The cost of an order is known from the
scopes alone, so `plan` needs no arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from rlkit.errors import UserError

Scope = tuple[int, ...]
Factor = tuple[Scope, np.ndarray]

MAX_CELLS = 2**22  # cells of the largest table that an elimination may build
SMALL_JOINT = 256  # cells of a joint table that is summed without an order
MAX_OPERANDS = 8  # factors that one call of einsum multiplies


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
    remaining = sorted(set(near) - {keep})
    order, sums, products = [], 0, 0
    while remaining:
        variable = _least_fill(near, remaining)
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


def _least_fill(near: dict[int, set[int]], variables: list[int]) -> int:
    """The first of the variables whose elimination adds the fewest edges."""
    best, least = variables[0], _fill(near, variables[0])
    for variable in variables[1:]:
        if least == 0:
            break
        fill = _fill(near, variable)
        if fill < least:
            best, least = variable, fill
    return best


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


def marginal(factors: list[Factor], target: int) -> np.ndarray:
    """The normalised product of the factors, with all variables but the target summed out.

    Raises:
        UserError: the product is zero everywhere (impossible evidence), or a table would pass `MAX_CELLS`.
    """
    cards = {v: size for scope, table in factors for v, size in zip(scope, table.shape, strict=True)}
    # Summing a small joint table in one go is faster than finding a good order.
    if prod(cards.values()) > SMALL_JOINT or len(factors) > MAX_OPERANDS:
        factors = _eliminate(factors, plan([scope for scope, _ in factors], cards, target).order)
    table = _product(factors, (target,))
    total = table.sum()
    if not total > 0:
        raise UserError(
            "the observed value has probability zero in this model, so the question has no answer"
        )
    return table / total


def _eliminate(factors: list[Factor], order: Iterable[int]) -> list[Factor]:
    """Sum out the variables one by one; returns the factors that are left."""
    for variable in order:
        joined = [factor for factor in factors if variable in factor[0]]
        scope = tuple(v for v in _joint_scope(joined) if v != variable)
        factors = [factor for factor in factors if variable not in factor[0]]
        factors.append((scope, _product(joined, scope)))
    return factors


def _product(factors: list[Factor], kept: Scope) -> np.ndarray:
    """Multiply factors and sum out what is not kept; the axes of the result are in the order of `kept`."""
    while len(factors) > MAX_OPERANDS:
        some = factors[:MAX_OPERANDS]
        scope = _joint_scope(some)
        factors = [(scope, _product(some, scope)), *factors[MAX_OPERANDS:]]
    axes: dict[int, int] = {}
    operands: list[Any] = []
    cells = 1
    for scope, table in factors:
        for variable, size in zip(scope, table.shape, strict=True):
            if variable not in axes:
                axes[variable] = len(axes)
                cells *= size
        operands += [table, [axes[variable] for variable in scope]]
    check_cells(cells)
    return np.einsum(*operands, [axes[variable] for variable in kept])


def _joint_scope(factors: list[Factor]) -> Scope:
    return tuple(dict.fromkeys(variable for scope, _ in factors for variable in scope))


def check_cells(cells: int) -> None:
    """Raise `UserError` if a table of so many cells would be too large."""
    if cells > MAX_CELLS:
        raise UserError(
            f"exact inference needs a table of {cells} cells, too large: use fewer nodes, parents or values"
        )
