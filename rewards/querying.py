"""Rewards of queries that a model writes, by what a retriever finds with them.

They read `turns`: the environment has put `ranking`, the ids that were found, best first, beside the model's
turn, and `augmented`, whether it changed the query at all. A turn without a ranking had no query: 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlkit.rewards.retrieval import measure as measure_of

Turns = Sequence[Mapping[str, Any]]


def retrieval(turns: Turns, judged: Sequence[str], grades: Sequence[int], measure: str = "ndcg@10") -> float:
    """A measure of what the queries found, in [0, 1].

    Args:
        turns: the model's turn with its `ranking`.
        judged, grades: ids and grades of the documents that were judged.
        measure: see `rlkit.rewards.retrieval.measure`.
    """
    ranking = last_turn(turns).get("ranking")
    return 0.0 if ranking is None else measure_of(measure, ranking, dict(zip(judged, grades, strict=True)))


def gain(
    turns: Turns,
    judged: Sequence[str],
    grades: Sequence[int],
    original: Sequence[str],
    measure: str = "ndcg@10",
) -> float:
    """The same less the measure of what the task's own query finds (`original`), in [-1, 1].

    Rewriting helps weak retrievers and may hurt strong ones (CRUMB, arXiv 2509.07253).
    """
    own = measure_of(measure, original, dict(zip(judged, grades, strict=True)))
    return retrieval(turns, judged, grades, measure) - own


def priced(
    turns: Turns,
    judged: Sequence[str],
    grades: Sequence[int],
    measure: str = "ndcg@10",
    price: float = 0.05,
) -> float:
    """The measure less a price for changing the query: leaving it as it is costs nothing.

    Raises:
        ValueError: a negative price.
    """
    if price < 0:
        raise ValueError(f"price must not be negative: it is {price}")
    return retrieval(turns, judged, grades, measure) - price * augmented(turns)


def augmented(turns: Turns) -> float:
    """1 if the model changed the query, else 0. A metric."""
    return float(bool(last_turn(turns).get("augmented")))


def last_turn(turns: Turns) -> Mapping[str, Any]:
    """Return the model's last turn; an empty one if it had none."""
    return next((turn for turn in reversed(turns) if turn["role"] == "assistant"), {})
