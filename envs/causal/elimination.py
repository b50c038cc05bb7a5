"""Variable elimination: an order by the min-fill heuristic, its cost, and the elimination itself.

A factor is a scope (a tuple of variables, one per axis) and an array. The cost of an order follows from the
scopes alone, so `plan_elimination` needs no arrays.
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

MAX_CELLS = 2**22  # of any table that an elimination builds: 32 MiB of float64
SMALL_JOINT = 256  # cells up to which a joint table is summed at once, without an elimination order
MAX_OPERANDS = 8  # factors in one call of einsum


@dataclass(frozen=True)
class EliminationPlan:
    """An elimination order and the arithmetic it takes.

    Eliminating a variable with K values from F factors creates a factor of C cells (1 for a scalar). It adds
    C * (K - 1) to `sums` and C * (F - 1) to `products`, as the RLCausal dataset counts them.
    """

    order: tuple[int, ...]
    sums: int
    products: int


def plan_elimination(
    scopes: Iterable[Scope], cards: Mapping[int, int] | Sequence[int], keep: int
) -> EliminationPlan:
    """Order the elimination of all variables but `keep` by min-fill; ties go to the lowest index.

    Args:
        scopes: Scopes of the factors.
        cards: Number of values of each variable.
        keep: Variable that is not eliminated.
    """
    current = [set(scope) for scope in scopes]
    neighbors = _neighbors(current)
    remaining = sorted(set(neighbors) - {keep})
    order, sums, products = [], 0, 0
    while remaining:
        variable = _min_fill_variable(neighbors, remaining)
        joined = [scope for scope in current if variable in scope]
        new_scope = set().union(*joined) - {variable}
        cells = prod(cards[v] for v in new_scope)
        sums += cells * (cards[variable] - 1)
        products += cells * (len(joined) - 1)
        current = [scope for scope in current if variable not in scope]
        if new_scope:
            current.append(new_scope)
        _remove_and_connect(neighbors, variable)
        remaining.remove(variable)
        order.append(variable)
    return EliminationPlan(tuple(order), sums, products)


def _neighbors(scopes: Iterable[set[int]]) -> dict[int, set[int]]:
    """Return the variables that share a scope with each variable."""
    neighbors: dict[int, set[int]] = {}
    for scope in scopes:
        for variable in scope:
            neighbors.setdefault(variable, set()).update(scope)
    for variable, adjacent in neighbors.items():
        adjacent.discard(variable)
    return neighbors


def _min_fill_variable(neighbors: dict[int, set[int]], variables: list[int]) -> int:
    """Return the first of the variables whose elimination adds the fewest edges."""
    best, min_fill = variables[0], _fill(neighbors, variables[0])
    for variable in variables[1:]:
        if min_fill == 0:
            break
        fill = _fill(neighbors, variable)
        if fill < min_fill:
            best, min_fill = variable, fill
    return best


def _fill(neighbors: dict[int, set[int]], variable: int) -> int:
    """Return twice the number of edges that eliminating the variable adds between its neighbors."""
    adjacent = neighbors[variable]
    size = len(adjacent)
    if size <= 1:
        return 0
    return sum(size - 1 - len(adjacent & neighbors[neighbor]) for neighbor in adjacent)


def _remove_and_connect(neighbors: dict[int, set[int]], variable: int) -> None:
    """Remove the variable from the graph and connect its neighbors with one another."""
    adjacent = neighbors.pop(variable)
    for neighbor in adjacent:
        neighbors[neighbor] |= adjacent
        neighbors[neighbor] -= {variable, neighbor}


def marginal(factors: list[Factor], target: int) -> np.ndarray:
    """Return the normalized product of the factors with all variables but the target summed out.

    Raises:
        UserError: The product is zero everywhere (impossible evidence), or a table exceeds `MAX_CELLS`.
    """
    cards = {v: size for scope, table in factors for v, size in zip(scope, table.shape, strict=True)}
    # Summing a small joint table at once is faster than finding a good order.
    if prod(cards.values()) > SMALL_JOINT or len(factors) > MAX_OPERANDS:
        scopes = [scope for scope, _ in factors]
        factors = _eliminate(factors, plan_elimination(scopes, cards, target).order)
    table = _product(factors, (target,))
    total = table.sum()
    if not total > 0:
        raise UserError(
            "the observed value has probability zero in this model, so the question has no answer"
        )
    return table / total


def _eliminate(factors: list[Factor], order: Iterable[int]) -> list[Factor]:
    """Sum out the variables in order and return the factors that remain."""
    for variable in order:
        joined = [factor for factor in factors if variable in factor[0]]
        scope = tuple(v for v in _joint_scope(joined) if v != variable)
        factors = [factor for factor in factors if variable not in factor[0]]
        factors.append((scope, _product(joined, scope)))
    return factors


def _product(factors: list[Factor], output: Scope) -> np.ndarray:
    """Multiply factors and sum out the variables that are not in `output`, the axes of the result."""
    while len(factors) > MAX_OPERANDS:
        chunk = factors[:MAX_OPERANDS]
        scope = _joint_scope(chunk)
        factors = [(scope, _product(chunk, scope)), *factors[MAX_OPERANDS:]]
    # einsum has few axis labels, so the variables of these factors are numbered from 0.
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
    return np.einsum(*operands, [axes[variable] for variable in output])


def _joint_scope(factors: list[Factor]) -> Scope:
    return tuple(dict.fromkeys(variable for scope, _ in factors for variable in scope))


def check_cells(cells: int) -> None:
    """Raise `UserError` if a table of `cells` cells would exceed `MAX_CELLS`."""
    if cells > MAX_CELLS:
        raise UserError(
            f"exact inference needs a table of {cells} cells, which is too large (maximum: {MAX_CELLS}):"
            " use fewer nodes, parents or values"
        )
